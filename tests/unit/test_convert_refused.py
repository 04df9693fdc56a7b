"""Sources that are refused and targets that cannot be: one sentence each, nothing written, the source as before."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_samples import MODELS, assert_equal, bar, edit_weights, write_source
from safetensors.torch import save_file

from megavl.checkpoint.convert.run import Request, convert, open_checkpoint
from megavl.checkpoint.folder import CheckpointError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_source(tmp_path_factory.mktemp("source") / name, model) for name, model in MODELS.items()}


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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
