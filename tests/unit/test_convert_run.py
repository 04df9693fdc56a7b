"""Conversions from folder to folder: every pair of formats bit-exact, every damaged source refused, no half targets."""

import json
import os
import shutil
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_samples import MODELS, TINY, random_contents
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megavl.checkpoint.convert import carried, dist, run, safetensors_file
from megavl.checkpoint.convert.contents import Contents, Training
from megavl.checkpoint.convert.formats import FormatName, Progress, WriteOptions
from megavl.checkpoint.convert.hf_folder import DEEPSEEK
from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.convert.run import Request, convert, open_checkpoint
from megavl.checkpoint.convert.verify import all_tensors
from megavl.checkpoint.folder import CheckpointError
from megavl.config import ParallelConfig


def bar(what: str, total: int) -> AbstractContextManager[Progress]:
    return nullcontext(lambda count: None)


def write_source(folder: Path, model: Any = TINY, **choices: Any) -> Path:
    """A checkpoint in the released form."""
    folder.mkdir(parents=True)
    files = folder.with_name(folder.name + "_files")
    files.mkdir()
    DEEPSEEK.write(random_contents(model, files, **choices), folder, WriteOptions(), lambda count: None)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_source(tmp_path_factory.mktemp("source") / name, model) for name, model in MODELS.items()}


def assert_equal(ours: Contents, theirs: Contents) -> None:
    left, right = dict(all_tensors(ours)), dict(all_tensors(theirs))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor.read(), right[name].read()), name


OLD = WriteOptions(names="4.56")


def ranks(**layout: Any) -> tuple[FormatName, WriteOptions]:
    return "megatron-ranks", WriteOptions(parallel=ParallelConfig(**layout))


DIST: tuple[FormatName, WriteOptions] = ("megatron-dist", WriteOptions())
NEW: tuple[FormatName, WriteOptions] = ("hf-transformers", WriteOptions())
RELEASED: tuple[FormatName, WriteOptions] = ("hf-deepseek", WriteOptions())
LAYOUTS = [DIST, ranks(tensor=2, pipeline=2), ranks(pipeline=3, layout="1,1,2"), ranks(tensor=4), DIST, RELEASED]
DIALECTS = [
    NEW,
    ("hf-transformers", OLD),
    DIST,
    ("hf-transformers", OLD),
    ranks(pipeline=3, layout="0,1,2"),
    NEW,
    RELEASED,
]
CHAINS = {
    "tiny-layouts": ("tiny", LAYOUTS),
    "tiny_hybrid-layouts": ("tiny_hybrid", LAYOUTS),
    "hybrid-dialects": ("hybrid", DIALECTS),
    "tiny-new": ("tiny", [NEW, RELEASED]),
}


@pytest.mark.parametrize("case", CHAINS)
def test_there_and_back(case: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Bytes per tensor, unused ones too, sizes and tokenizer come back after any way round."""
    name, chain = CHAINS[case]
    path = sources[name]
    for at, (to, options) in enumerate(chain):
        target = tmp_path / str(at)
        record = convert(Request(source=path, target=target, to=to, options=options), bar)
        assert len(record["verified"]["sha256"]) == record["tensors"] + record["unused"]
        assert json.loads((target / "conversion.json").read_text())["verified"] == record["verified"]
        path = target
    found, contents = open_checkpoint(path)
    original = open_checkpoint(sources[name])[1]
    assert found.name == "hf-deepseek"
    assert contents.model == original.model == MODELS[name]
    assert_equal(contents, original)
    stored, first = (load_file(folder / "model.safetensors") for folder in (path, sources[name]))
    assert stored.keys() == first.keys()
    assert all(torch.equal(stored[n], first[n]) for n in stored)
    assert (path / "tokenizer.json").read_bytes() == (sources[name] / "tokenizer.json").read_bytes()


def test_cast_and_dropped_unused(sources: dict[str, Path], tmp_path: Path) -> None:
    options = WriteOptions(drop_unused=True)
    target = tmp_path / "t"
    convert(Request(source=sources["tiny"], target=target, to="hf-deepseek", options=options, dtype=torch.float16), bar)
    original, contents = (open_checkpoint(path)[1] for path in (sources["tiny"], target))
    assert not contents.unused
    for name, tensor in contents.tensors.items():
        assert torch.equal(tensor.read(), original.tensors[name].read().half())
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float16"


def test_training_state_goes_along(tmp_path: Path) -> None:
    """Moments, steps and description through rank files and back; a cast would part weights and moments."""
    contents = random_contents(TINY)
    moments = {
        f"exp_avg.{n}": in_memory(torch.randn(t.shape), n) for n, t in contents.tensors.items() if "layers.1" in n
    }
    training = Training(
        step=7, adam_step=6, optimizer=moments, description={"tokenizer": "a" * 64, "extra": {"row": 5}}
    )
    contents = replace(contents, training=training)
    (tmp_path / "run").mkdir()
    dist.FORMAT.write(contents, tmp_path / "run", WriteOptions(), lambda count: None)
    carried.write_unused(contents, tmp_path / "run", lambda count: None)
    path = tmp_path / "run"
    for at, (to, options) in enumerate([ranks(tensor=2, pipeline=2), ranks(pipeline=3, layout="1,1,2"), DIST]):
        convert(Request(source=path, target=tmp_path / str(at), to=to, options=options), bar)
        path = tmp_path / str(at)
    back = open_checkpoint(path)[1]
    assert_equal(back, contents)
    assert back.training is not None
    assert (back.training.step, back.training.adam_step) == (7, 6)
    assert back.training.description["extra"] == {"row": 5}
    with pytest.raises(CheckpointError, match="--dtype changes weights that the optimizer's state belongs to"):
        convert(Request(source=path, target=tmp_path / "t", to="megatron-dist", dtype=torch.float16), bar)


def test_sharded_files_are_those_of_the_safetensors_package(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small shards, small pieces: the package reads the same values, every shard within the limit, the index true."""
    contents = open_checkpoint(sources["hybrid"])[1]
    monkeypatch.setattr(safetensors_file, "PIECE", 1000)
    safetensors_file.write_shards(contents.tensors, tmp_path, lambda count: None, limit=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    read = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(read[name], tensor.read()) for name, tensor in contents.tensors.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in contents.tensors.values())
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [read[name].nbytes for name in opened.keys()]  # noqa: SIM118 - not a dict
        assert len(sizes) == 1 or sum(sizes) <= 200_000


def test_bin_files(sources: dict[str, Path], tmp_path: Path) -> None:
    """`pytorch_model.bin`, whole and sharded, gives what safetensors gives."""
    state = load_file(sources["tiny"] / "model.safetensors")
    names = list(state)
    for kind in ("whole", "sharded"):
        (tmp_path / kind).mkdir()
        shutil.copy(sources["tiny"] / "config.json", tmp_path / kind)
    torch.save(state, tmp_path / "whole" / "pytorch_model.bin")
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, tmp_path / "sharded" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for kind in ("whole", "sharded"):
        assert_equal(open_checkpoint(tmp_path / kind)[1], open_checkpoint(sources["tiny"])[1])


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def replace_header(folder: Path, change: Any) -> None:
    """Edit the header and leave the bytes after it."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header) or json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + length :])


def shard(folder: Path, weight_map: dict[str, str], **files: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    for name, state in files.items():
        save_file(state, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


FIRST = "vision_model.vision_tower.pos_embed"
ONE = torch.ones(2)


def overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name.endswith("norm1.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def link(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)


REFUSED: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"not a checkpoint of any known format"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "config of another architecture": (
        lambda f: edit_json(f / "config.json", language_config={"model_type": "mistral"}),
        r"model_type of the language model is 'mistral', megavl has 'llama'",
    ),
    "config without towers": (
        lambda f: edit_json(f / "config.json", vision_config={"cls": "CLIPVisionTower", "params": {}}),
        r"no field image_size",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no weights, looked for model\.safetensors"),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 500_000),
        r"model\.safetensors: tensors take [\d,]+ bytes by the header, the file has [\d,]+ for them",
    ),
    "truncated header": (
        lambda f: os.truncate(f / "model.safetensors", 100),
        r"a header of [\d,]+ bytes in a file of 100, truncated or damaged",
    ),
    "overlap": (lambda f: replace_header(f, overlap), r"blocks.0.norm1.weight.*starts at.*tensors overlap"),
    "beyond the file": (
        lambda f: replace_header(f, lambda h: h[FIRST].update(data_offsets=[2**40, 2**40 + 2048])),
        r"tensors take 1,099,511,629,824 bytes by the header, the file has",
    ),
    "size of a tensor": (
        lambda f: replace_header(f, lambda h: h[FIRST].update(shape=[1, 17, 64])),
        r"pos_embed of shape \(1, 17, 64\) needs 2,176 bytes, the header gives 2,048",
    ),
    "unknown type": (
        lambda f: replace_header(f, lambda h: h[FIRST].update(dtype="F4")),
        r"pos_embed is of type F4, known are",
    ),
    "name twice in a header": (
        lambda f: replace_header(f, lambda h: json.dumps(h)[:-1] + f', "{FIRST}": {json.dumps(h[FIRST])}}}'),
        rf"the header is damaged \({FIRST} occurs twice\)",
    ),
    "tensor missing": (
        lambda f: edit_weights(f, lambda s: s.pop(FIRST)),
        r"1 of \d+ tensors are missing \(first: \['vision_model\.vision_tower\.pos_embed'\]\)",
    ),
    "tensor too many": (
        lambda f: edit_weights(f, lambda s: s.update(more=ONE)),
        r"1 have no place in the model \(first: \['more'\]\)",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda s: s.update({"language_model.model.norm.weight": torch.ones(5).bfloat16()})),
        r"language_model\.model\.norm\.weight: shape \(5,\), the model has \(128,\)",
    ),
    "mixed types": (
        lambda f: edit_weights(f, lambda s: s.update({"language_model.model.norm.weight": torch.ones(128)})),
        r"types are mixed: .* is torch\.bfloat16, .*norm\.weight is torch\.float32; --dtype gives",
    ),
    "missing shard": (
        lambda f: shard(f, {"a": "x.safetensors", "b": "y.safetensors"}, x={"a": ONE}),
        r"shard y\.safetensors is missing, one of 2",
    ),
    "tensor in two shards": (
        lambda f: shard(
            f, {"a": "x.safetensors", "b": "y.safetensors"}, x={"a": ONE}, y={"a": ONE.clone(), "b": ONE + 1}
        ),
        r"1 tensors occur twice, a in x\.safetensors and y\.safetensors",
    ),
    "index beyond a shard": (
        lambda f: shard(f, {"a": "x.safetensors", "b": "x.safetensors"}, x={"a": ONE}),
        r"index\.json: b is said to be in x\.safetensors and is not",
    ),
    "path in the index": (
        lambda f: shard(f, {"a": "../x.safetensors"}, x={"a": ONE}),
        r"a is said to be in '\.\./x\.safetensors', not a \.safetensors of this folder",
    ),
    "absolute path in the index": (lambda f: shard(f, {"a": "/etc/x.safetensors"}, x={"a": ONE}), r"'/etc/x\.safe"),
    "link": (link, r"model\.safetensors: a link to .*outside\.safetensors, outside the checkpoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_sources_are_refused(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    damage, message = REFUSED[name]
    source = shutil.copytree(sources["tiny"], tmp_path / "source")
    damage(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(Request(source=source, target=tmp_path / "out" / "t", to="hf-transformers"), bar)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert not list(tmp_path.glob("out/*"))
    assert not list(tmp_path.glob("out/.*"))


def test_links_of_the_hugging_face_cache_are_followed(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    for at, path in enumerate(sorted(sources["tiny"].iterdir())):
        shutil.copy(path, tmp_path / "blobs" / str(at))
        (snapshot / path.name).symlink_to(f"../../blobs/{at}")
    assert_equal(open_checkpoint(snapshot)[1], open_checkpoint(sources["tiny"])[1])


def test_targets_that_cannot_be(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["tiny"]
    with pytest.raises(CheckpointError, match="exists already"):
        convert(Request(source=source, target=tmp_path, to="hf-deepseek"), bar)
    with pytest.raises(CheckpointError, match="lies inside the source"):
        convert(Request(source=source, target=source / "t", to="hf-deepseek"), bar)
    with pytest.raises(CheckpointError, match=r"downsample is \(64, 64\), transformers has \(64, 128\)"):
        convert(Request(source=sources["tiny_hybrid"], target=tmp_path / "t", to="hf-transformers"), bar)
    with pytest.raises(CheckpointError, match=r"absent\.json: neither tokenizer\.json nor tokenizer\.model"):
        convert(
            Request(source=source, target=tmp_path / "t", to="hf-deepseek", tokenizer=tmp_path / "absent.json"), bar
        )
    assert list(tmp_path.iterdir()) == []


def test_nan_is_counted(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    edit_weights(source, lambda state: state[name][3, :7].fill_(float("nan")))
    record = convert(Request(source=source, target=tmp_path / "t", to="hf-transformers"), bar)
    assert record["verified"]["nan"] == {"decoder.layers.1.mlp.linear_fc1.weight": 7}


def test_verification_sees_one_wrong_byte(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def wrong(handle: int, content: Any, offset: int) -> int:
        changed = bytearray(content)
        if offset > 1_000_000:
            changed[-1] ^= 1
        return real(handle, changed, offset)

    monkeypatch.setattr(safetensors_file.os, "pwrite", wrong)
    with pytest.raises(CheckpointError, match=r"what was written is not the source: .* has other values"):
        convert(Request(source=sources["tiny"], target=tmp_path / "t", to="hf-transformers"), bar)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["space", "fallocate", "pwrite"])
def test_a_full_disk(where: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    if where == "space":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    else:
        monkeypatch.setattr(safetensors_file.os, "posix_fallocate" if where == "fallocate" else "pwrite", full)
    message = "needs .* bytes, the disk has 1,000 free" if where == "space" else "cannot be written, No space left"
    with pytest.raises(CheckpointError, match=message):
        convert(Request(source=sources["tiny"], target=tmp_path / "t", to="hf-transformers"), bar)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_no_target_and_the_next_starts_clean(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "t"
    reader, writer = os.pipe()
    child = os.fork()  # as good as another program, without its 6 seconds of imports
    if child == 0:

        def stop(count: int) -> None:
            os.write(writer, b"w")
            time.sleep(60)
            os._exit(1)

        convert(Request(source=sources["tiny"], target=target, to="hf-deepseek"), lambda what, total: nullcontext(stop))
        os._exit(1)
    started = os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert started == b"w"
    assert not target.exists()
    (draft,) = tmp_path.iterdir()
    (draft / "stale").touch()
    convert(Request(source=sources["tiny"], target=target, to="hf-deepseek"), bar)
    assert list(tmp_path.iterdir()) == [target]
    assert not (target / "stale").exists()
    assert_equal(open_checkpoint(target)[1], open_checkpoint(sources["tiny"])[1])
