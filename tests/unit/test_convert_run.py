"""Conversions from folder to folder: every pair of formats bit-exact, verified, and no half targets."""

import fcntl
import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_samples import MODELS, TINY, assert_equal, bar, edit_weights, random_contents, write_source
from safetensors import safe_open
from safetensors.torch import load_file

from megavl.checkpoint.convert import carried, dist, run, safetensors_file
from megavl.checkpoint.convert.contents import Training
from megavl.checkpoint.convert.formats import FormatName, WriteOptions
from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.convert.run import Request, convert, open_checkpoint
from megavl.checkpoint.convert.target_lock import locked
from megavl.checkpoint.folder import CheckpointError
from megavl.config import ParallelConfig


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_source(tmp_path_factory.mktemp("source") / name, model) for name, model in MODELS.items()}


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
    try:
        with pytest.raises(CheckpointError, match=f"{target}: another conversion is writing it"):
            convert(Request(source=sources["tiny"], target=target, to="hf-deepseek"), bar)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert started == b"w"
    assert not target.exists()
    draft, _ = sorted(tmp_path.iterdir())
    assert (draft / "config.json").exists()  # as the first left it
    (draft / "stale").touch()
    convert(Request(source=sources["tiny"], target=target, to="hf-deepseek"), bar)
    assert list(tmp_path.iterdir()) == [target]
    assert not (target / "stale").exists()
    assert_equal(open_checkpoint(target)[1], open_checkpoint(sources["tiny"])[1])


def test_two_conversions_at_once_make_one_target(sources: dict[str, Path], tmp_path: Path) -> None:
    """The second starts while the first writes and refuses; planned before and carried out after it, too."""
    target, refusals = tmp_path / "t", []
    request = Request(source=sources["tiny"], target=target, to="hf-transformers")
    late = replace(request, source=sources["hybrid"])
    planned = run.plan(late)

    def second(count: int) -> None:
        if not refusals:
            with pytest.raises(CheckpointError, match=f"{target}: another conversion is writing it") as refused:
                convert(late, bar)
            refusals.append(refused)

    convert(request, lambda what, total: nullcontext(second))
    assert refusals
    with pytest.raises(CheckpointError, match=f"{target}: exists already"):
        run.carry_out(planned, late, bar)
    assert list(tmp_path.iterdir()) == [target]
    assert_equal(open_checkpoint(target)[1], open_checkpoint(sources["tiny"])[1])


def test_a_lock_removed_by_its_holder_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file opened before and locked after the holder removed it guards nothing: another may lock a new one."""
    flock, path = fcntl.flock, tmp_path / ".t.lock"

    def holder_ends_first(lock: Any, how: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", holder_ends_first)
    with locked(tmp_path / "t"), pytest.raises(CheckpointError, match="another conversion"), locked(tmp_path / "t"):
        pass
    assert list(tmp_path.iterdir()) == []
