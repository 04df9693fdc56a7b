"""The Megatron formats: the same bytes through every layout, and one sentence for what is damaged."""

import pickle
import resource
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megavl.checkpoint.convert import dist, dist_write, rank_write, ranks
from megavl.checkpoint.convert.contents import Contents, Training
from megavl.checkpoint.convert.formats import Format, WriteOptions
from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.convert.shapes import full_shapes
from megavl.checkpoint.folder import CheckpointError
from megavl.config import DecoderConfig, ModelConfig, ParallelConfig, SiglipConfig
from megavl.model.sizes import SIZES

SMALL = ModelConfig(
    decoder=DecoderConfig(layers=3, hidden=8, heads=4, kv_heads=2, ffn=12, vocab=16),
    siglip=SiglipConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp=16),
    sam=None,
    adaptor="mlp_gelu",
    background=(127, 127, 127),
)
ANY = ParallelConfig()
TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)
WAY = {
    "dist": (dist.FORMAT, ANY),
    "tp2pp2": (ranks.FORMAT, TP2_PP2),
    "pp3_uneven": (ranks.FORMAT, ParallelConfig(pipeline=3, layout="1,1,2")),
    "tp4": (ranks.FORMAT, ParallelConfig(tensor=4)),
    "pp2vpp2": (ranks.FORMAT, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "dist_again": (dist.FORMAT, ANY),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces to a tensor, as in a large model."""
    monkeypatch.setattr(dist_write, "PIECE_BYTES", 100_000)
    monkeypatch.setattr(rank_write, "PIECE_BYTES", 70_000)


def random_tensors(model: ModelConfig) -> dict[str, Tensor]:
    """bf16 weights, and optimizer state of the decoder as if the rest were frozen."""
    generator = torch.Generator().manual_seed(7)
    shapes = full_shapes(model)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    state = {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for kind in ("exp_avg", "exp_avg_sq", "param")
        for name, shape in shapes.items()
        if name.startswith("decoder.")
    }
    return weights | state


def contents_of(model: ModelConfig, tensors: dict[str, Tensor], *, trained: bool = True) -> Contents:
    lazy = {name: in_memory(tensor, name) for name, tensor in tensors.items()}
    weights = {name: lazy[name] for name in full_shapes(model)}
    optimizer = {name: tensor for name, tensor in lazy.items() if name not in weights}
    description = {"tokenizer": "a" * 64, "extra": {"rows": 28}, "layout": {"ranks": 4}}
    training = Training(step=7, adam_step=6, optimizer=optimizer, description=description)
    return Contents(model=model, tensors=weights, training=training if trained else None)


def write(form: Format, contents: Contents, folder: Path, parallel: ParallelConfig = ANY) -> int:
    """Write `contents`; the bytes that were reported."""
    folder.mkdir()
    written: list[int] = []
    form.write(contents, folder, WriteOptions(parallel=parallel), written.append)
    return sum(written)


def assert_same(contents: Contents, tensors: dict[str, Tensor]) -> None:
    """Names, types and bits."""
    assert contents.training is not None
    lazy = {**contents.tensors, **contents.training.optimizer}
    assert lazy.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert lazy[name].dtype == tensor.dtype, name
        assert torch.equal(lazy[name].read(), tensor), name
        middle = max(1, lazy[name].num_rows // 2)
        assert torch.equal(lazy[name].read(0, middle), tensor[:middle] if tensor.dim() else tensor), name


@pytest.mark.parametrize("size", ["tiny", "tiny_hybrid"])
def test_the_same_bytes_through_every_layout(tmp_path: Path, size: str) -> None:
    model = SIZES[size]
    tensors = random_tensors(model)
    contents = contents_of(model, tensors)
    for name, (form, parallel) in WAY.items():
        planned = list(form.plan(contents, WriteOptions(parallel=parallel)))
        written = write(form, contents, tmp_path / name, parallel)
        assert written == sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in planned)
        assert form.detect(tmp_path / name)
        contents = form.read(tmp_path / name)
        assert contents.model == model
        assert_same(contents, tensors)
    assert contents.training is not None
    assert (contents.training.step, contents.training.adam_step) == (7, 6)
    assert contents.training.description["extra"] == {"rows": 28}
    assert contents.training.description["layout"] == {}  # random states belong to a layout and are not converted


def test_rank_files_hold_what_megatron_would_save(tmp_path: Path) -> None:
    """Read by torch alone: local names, and parts in the shape of the parameters."""
    tensors = random_tensors(SMALL)
    write(ranks.FORMAT, contents_of(SMALL, tensors), tmp_path / "run", ParallelConfig(tensor=2, pipeline=2))
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "7"
    file = tmp_path / "run" / "iter_0000007" / "mp_rank_01_001" / "model_optim_rng.pt"
    saved = torch.load(file, weights_only=True)
    assert saved["checkpoint_version"] == 3.0
    assert saved["iteration"] == 7
    gate, up = tensors["decoder.layers.1.mlp.linear_fc1.weight"].chunk(2)
    expected = torch.cat([gate[6:], up[6:]])
    assert torch.equal(saved["model"]["decoder.layers.0.mlp.linear_fc1.weight"], expected)
    moment = tensors["exp_avg.decoder.layers.2.mlp.linear_fc2.weight"][:, 6:]
    assert torch.equal(saved["optimizer"]["model"]["exp_avg"]["decoder.layers.1.mlp.linear_fc2.weight"], moment)
    assert "first_stage.embedding.weight" not in saved["model"]
    assert ranks.describe(tmp_path / "run") == "tensor 2, pipeline 2, layers 1,2"


def test_weights_without_a_run_are_a_release(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    write(ranks.FORMAT, contents_of(SMALL, tensors, trained=False), tmp_path / "run")
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (tmp_path / "run" / "release" / "mp_rank_00" / "model_optim_rng.pt").is_file()
    assert ranks.read(tmp_path / "run").training is None


def test_chunks_of_any_layout_are_read(tmp_path: Path) -> None:
    """A tensor saved in a grid of chunks, one of which is strided, by torch's own writer."""
    full = torch.arange(48, dtype=torch.float32).view(6, 8)
    folder = tmp_path / "grid"
    folder.mkdir()
    with (folder / "a.distcp").open("wb") as stream:
        results, boxes = [], [(r, c) for r in (0, 4) for c in (0, 3)]
        for row, column in boxes:
            chunk = full[row : (row or -2) + 4 if row else 4, column : 3 if column == 0 else 8]
            start = stream.tell()
            torch.save(chunk.t().contiguous().t() if row else chunk.clone(), stream)
            place = dcp.filesystem._StorageInfo("a.distcp", start, stream.tell() - start)
            results.append((dcp.metadata.MetadataIndex("x", (row, column)), place, chunk.shape))
    chunks = [dcp.metadata.ChunkStorageMetadata(index.offset, shape) for index, _, shape in results]
    entry = dcp.metadata.TensorStorageMetadata(dcp.metadata.TensorProperties(torch.float32), full.shape, chunks)
    index = dcp.metadata.Metadata({"x": entry}, storage_data={index: place for index, place, _ in results})
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    read = dist.read_tensors(folder)["x"]
    assert torch.equal(read.read(), full)
    assert torch.equal(read.read(3, 5), full[3:5])
    entry.chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="x has 3 chunks, 4 make up its shape"):
        dist.read_tensors(folder)


def change(path: Path, edit: Callable[[dict], object]) -> None:
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def first_file(root: Path) -> Path:
    return root / "iter_0000007" / "mp_rank_00_000" / "model_optim_rng.pt"


def other_file(root: Path) -> Path:
    return root / "iter_0000007" / "mp_rank_01_001" / "model_optim_rng.pt"


FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda r: other_file(r).unlink(), "needs 4 rank files, 3 are there; missing: .*mp_rank_01_001"),
    "truncated": (lambda r: other_file(r).write_bytes(other_file(r).read_bytes()[:-2000]), "mp_rank_01_001.*truncated"),
    "pickle": (
        lambda r: torch.save({"checkpoint_version": 3.0, "args": Namespace(a=1)}, other_file(r)),
        "mp_rank_01_001.*argparse.Namespace",
    ),
    "args": (lambda r: change(first_file(r), lambda c: c.update(args=[1])), "mp_rank_00_000.*args is a list"),
    "iteration": (lambda r: change(other_file(r), lambda c: c.update(iteration=8)), "iteration 8, .* has 7"),
    "another_model": (
        lambda r: change(other_file(r), lambda c: c["args"].update(num_layers=9)),
        "mp_rank_01_001.*its args differ",
    ),
    "layout": (
        lambda r: change(first_file(r), lambda c: c["args"].update(decoder_layers_per_stage=[1, 1])),
        "places 2 layers, the model has 3",
    ),
    "no_tensor": (lambda r: change(other_file(r), lambda c: c["model"].pop(FC2)), f"no tensor model.{FC2}"),
    "surplus": (
        lambda r: change(other_file(r), lambda c: c["model"].update(more=torch.zeros(2))),
        "mp_rank_01_001.*1 tensors have no place in it, the first is model.more",
    ),
    "shape": (
        lambda r: change(other_file(r), lambda c: c["model"].update({FC2: torch.zeros(8, 5)})),
        r"mp_rank_01_001.*has shape \(8, 5\), this rank's is \(8, 6\)",
    ),
    "type": (
        lambda r: change(other_file(r), lambda c: c["model"].update({FC2: torch.zeros(8, 6)})),
        "mp_rank_01_001.*is torch.float32, torch.bfloat16 on the first",
    ),
    "latest": (
        lambda r: (r / "latest_checkpointed_iteration.txt").write_text("../../x"),
        "'../../x' is neither a number",
    ),
}


@pytest.fixture(scope="module")
def rank_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "run"
    write(ranks.FORMAT, contents_of(SMALL, random_tensors(SMALL)), folder, TP2_PP2)
    return folder


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_rank_files_are_refused(tmp_path: Path, rank_folder: Path, case: str) -> None:
    damage, sentence = DAMAGE[case]
    root = shutil.copytree(rank_folder, tmp_path / "run")
    damage(root)
    with pytest.raises(CheckpointError, match=sentence):
        ranks.read(root)


def test_copies_that_differ_are_refused(tmp_path: Path, rank_folder: Path) -> None:
    """Every tensor rank has the norms: which of two would be the right one?"""
    root = shutil.copytree(rank_folder, tmp_path / "run")
    name = "decoder.final_layernorm.weight"
    change(other_file(root), lambda c: c["model"].update({name: c["model"][name] + 1}))
    contents = ranks.read(root)
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001.*differs from .*mp_rank_00_001.*of 16 bytes"):
        contents.tensors[name].read()


def test_a_layout_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    contents = contents_of(SMALL, random_tensors(SMALL))
    for parallel, sentence in (
        (ParallelConfig(tensor=4), "kv_heads = 2 does not divide by parallel.tensor = 4"),
        (ParallelConfig(pipeline=2, layout="1,1"), "places 2 layers, the model has 3"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            ranks.write(contents, tmp_path, WriteOptions(parallel=parallel), lambda _: None)


def test_damaged_dist_checkpoints_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write(dist.FORMAT, contents_of(SMALL, random_tensors(SMALL)), whole)
    largest = max(whole.glob("*.distcp"), key=lambda path: path.stat().st_size).name
    for number, (damage, sentence) in enumerate(
        (
            (lambda f: (f / largest).write_bytes((f / largest).read_bytes()[:-50]), "it has .* bytes, .* to "),
            (lambda f: (f / largest).unlink(), f"{largest}: missing"),
            (lambda f: (f / "model.json").write_text("{}"), "model.json.*missing"),
            (lambda f: (f / "model.json").unlink(), "neither model.json nor a recipe"),
            (lambda f: (f / "metadata.json").unlink(), "this checkpoint is incomplete"),
            (lambda f: (f / "state.json").write_text('{"step": "x"}'), "no usable step"),
        )
    ):
        folder = shutil.copytree(whole, tmp_path / str(number))
        damage(folder)
        assert dist.detect(folder)
        with pytest.raises(CheckpointError, match=sentence):
            dist.read(folder)


@pytest.mark.parametrize("limit", [3_000, 10_000])
@pytest.mark.parametrize("form", [dist.FORMAT, ranks.FORMAT], ids=lambda form: form.name)
def test_a_full_disk_stops_every_thread(tmp_path: Path, form: Format, limit: int) -> None:
    """Files cannot grow beyond `limit` bytes: nothing that is left looks complete."""
    contents = contents_of(SMALL, random_tensors(SMALL))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|cannot be written"):
            write(form, contents, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "new" / "metadata.json").exists()
    assert not (tmp_path / "new" / "latest_checkpointed_iteration.txt").exists()
