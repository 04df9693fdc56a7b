"""The name tables against the published checkpoints' tensor lists, and every way there and back."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megavl.checkpoint import hf_names
from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.hf_names import Dialect, entries, fuse_qkv, split_qkv, transformers_dialect, unused_names
from megavl.config import DecoderConfig, ModelConfig, SamConfig, SiglipConfig
from megavl.model.sizes import SIZES, count_parameters, count_unused_parameters
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import VisionTowers

FIXTURES = Path(__file__).parents[1] / "fixtures"
DIALECTS: tuple[Dialect, ...] = ("original", "transformers", "transformers-4")
SMALL = ModelConfig(
    decoder=DecoderConfig(layers=2, hidden=24, heads=6, kv_heads=2, ffn=10, vocab=7),
    siglip=SiglipConfig(image_size=16, patch_size=8, width=8, layers=2, heads=2, mlp=12),
    sam=SamConfig(
        image_size=32, patch_size=8, width=8, layers=2, heads=2, mlp=12, window=3, global_layers=(1,), neck=4,
        upsample=8, downsample=(6, 10),
    ),
    adaptor="hybrid",
    background=(0, 0, 0),
)  # fmt: skip


def read_tensor_list(size: str) -> dict[str, tuple[int, ...]]:
    """Expand the fixture of `size` to {name: shape}."""
    shapes: dict[str, tuple[int, ...]] = {}
    for line in (FIXTURES / f"tensors_{size}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        template, shape = line.split()
        pieces = re.split(r"\{(.*?)\}", template)
        choices = [[piece] if at % 2 == 0 else expand(piece) for at, piece in enumerate(pieces)]
        for name in itertools.product(*choices):
            shapes["".join(name)] = tuple(int(side) for side in shape.split("x"))
    return shapes


def expand(piece: str) -> list[str]:
    first, dots, last = piece.partition("..")
    return [str(number) for number in range(int(first), int(last) + 1)] if dots else piece.split(",")


def megavl_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by megavl's names: towers and adaptor as built, the decoder written out."""
    with torch.device("meta"):
        parts = {"first_stage.towers.": VisionTowers(model), "first_stage.adaptor.": make_adaptor(model)}
    shapes = {prefix + name: tuple(p.shape) for prefix, part in parts.items() for name, p in part.named_parameters()}
    size = model.decoder
    head_size = size.hidden // size.heads
    for layer in range(size.layers):
        prefix = f"decoder.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "pre_mlp_layernorm.weight"] = (size.hidden,)
        shapes[prefix + "self_attention.linear_qkv.weight"] = (
            (size.heads + 2 * size.kv_heads) * head_size,
            size.hidden,
        )
        shapes[prefix + "self_attention.linear_proj.weight"] = (size.hidden, size.hidden)
        shapes[prefix + "mlp.linear_fc1.weight"] = (2 * size.ffn, size.hidden)
        shapes[prefix + "mlp.linear_fc2.weight"] = (size.hidden, size.ffn)
    shapes["decoder.final_layernorm.weight"] = (size.hidden,)
    shapes["first_stage.embedding.weight"] = shapes["last_stage.head.weight"] = (size.vocab, size.hidden)
    return shapes


def random_state(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in megavl_shapes(model).items()}


def to_megavl(state: dict[str, Tensor], model: ModelConfig, dialect: Dialect) -> dict[str, Tensor]:
    lazy = {name: in_memory(tensor, name) for name, tensor in state.items()}
    return {name: tensor.read() for name, tensor in hf_names.to_megavl(lazy, model, dialect).items()}


def from_megavl(state: dict[str, Tensor], model: ModelConfig, dialect: Dialect) -> dict[str, Tensor]:
    lazy = {name: in_memory(tensor, name) for name, tensor in state.items()}
    return {name: tensor.read() for name, tensor in hf_names.from_megavl(lazy, model, dialect).items()}


@pytest.mark.parametrize(("size", "tensors"), [("7b", 775), ("1.3b", 529)])
def test_original_names_are_those_published(size: str, tensors: int) -> None:
    published = read_tensor_list(size)
    assert len(published) == tensors
    ours = [name for entry in entries(SIZES[size]) for name in entry.original]
    assert len(ours) == len(set(ours))
    assert set(ours) | set(unused_names(SIZES[size])) == set(published)
    assert not set(ours) & set(unused_names(SIZES[size]))


@pytest.mark.parametrize("size", ["7b", "1.3b"])
def test_published_shapes_become_those_of_the_model(size: str) -> None:
    published = {name: torch.empty(shape, device="meta") for name, shape in read_tensor_list(size).items()}
    unused = sum(published[name].numel() for name in unused_names(SIZES[size]))
    converted = to_megavl(published, SIZES[size], "original")
    assert {name: tuple(t.shape) for name, t in converted.items()} == megavl_shapes(SIZES[size])
    assert sum(t.numel() for t in converted.values()) == sum(count_parameters(SIZES[size]).values())
    assert unused == count_unused_parameters(SIZES[size])


@pytest.mark.parametrize("size", ["tiny", "tiny_hybrid", "1.3b_hybrid"])
def test_other_sizes_have_one_entry_per_tensor(size: str) -> None:
    ours = [entry.ours for entry in entries(SIZES[size])]
    assert sorted(ours) == sorted(megavl_shapes(SIZES[size]))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_there_and_back(dialect: Dialect) -> None:
    state = random_state(SMALL)
    theirs = from_megavl(state, SMALL, dialect)
    back = to_megavl(theirs, SMALL, dialect)
    assert state.keys() == back.keys()
    assert all(torch.equal(state[name], back[name]) for name in state)


def test_between_the_dialects_without_our_names() -> None:
    """SigLIP's qkv by thirds, its position table without the leading 1: written out once, not by the tables."""
    state = random_state(SMALL)
    original = from_megavl(state, SMALL, "original")
    transformers = from_megavl(state, SMALL, "transformers")
    tower = "vision_model.vision_tower_low.vision_tower."
    fused = original[tower + "blocks.1.attn.qkv.bias"]
    for part, third in zip("qkv", (fused[:8], fused[8:16], fused[16:]), strict=True):
        name = f"model.vision_model.encoder.layers.1.self_attn.{part}_proj.bias"
        assert torch.equal(transformers[name], third)
    table = transformers["model.vision_model.embeddings.position_embedding.weight"]
    assert torch.equal(table, original[tower + "pos_embed"][0])
    sam = original["vision_model.vision_tower_high.vision_tower.neck_hd.3.bias"]
    assert torch.equal(transformers["model.high_res_vision_neck.layer_norm2.bias"], sam)
    old = from_megavl(state, SMALL, "transformers-4")
    assert torch.equal(old["model.vision_model.vision_model.embeddings.position_embedding.weight"], table)
    assert (transformers_dialect(old), transformers_dialect(transformers)) == ("transformers-4", "transformers")


def test_grouped_qkv_layout() -> None:
    """Each row holds its own (kind, head): the fused order is q q q k v for each of two groups."""
    query = torch.arange(6).repeat_interleave(4)[:, None].expand(24, 24)
    key, value = (
        torch.tensor([10 * kind, 10 * kind + 1]).repeat_interleave(4)[:, None].expand(8, 24) for kind in (1, 2)
    )
    fused = fuse_qkv(*(in_memory(part, "") for part in (query, key, value)), groups=2)
    assert fused.read()[::4, 0].tolist() == [0, 1, 2, 10, 20, 3, 4, 5, 11, 21]
    for rows in ((0, 40), (3, 17), (12, 13), (24, 40)):
        assert torch.equal(fused.read(*rows), fused.read()[slice(*rows)])
    for part, expected in zip(split_qkv(fused, heads=6, groups=2), (query, key, value), strict=True):
        assert torch.equal(part.read(), expected)


def test_gate_lies_above_up() -> None:
    state = random_state(SMALL)
    fused = state["decoder.layers.0.mlp.linear_fc1.weight"]
    original = from_megavl(state, SMALL, "original")
    assert torch.equal(original["language_model.model.layers.0.mlp.gate_proj.weight"], fused[:10])
    assert torch.equal(original["language_model.model.layers.0.mlp.up_proj.weight"], fused[10:])


def test_unused_tensors_are_dropped_and_others_refused() -> None:
    original = from_megavl(random_state(SMALL), SMALL, "original")
    complete = original | {name: torch.zeros(1) for name in unused_names(SMALL)}
    assert len(to_megavl(complete, SMALL, "original")) == len(megavl_shapes(SMALL))
    with pytest.raises(ValueError, match=r"^0 of \d+ tensors are missing .* 1 have no place in the model .*extra"):
        to_megavl(original | {"extra.weight": torch.zeros(1)}, SMALL, "original")
    del original["aligner.layers.1.bias"]
    with pytest.raises(ValueError, match=r"^1 of \d+ tensors are missing \(first: \['aligner\.layers\.1\.bias'\]\)"):
        to_megavl(original, SMALL, "original")


def test_another_models_heads_are_refused() -> None:
    theirs = from_megavl(random_state(SMALL), SMALL, "transformers")
    theirs["model.language_model.layers.1.self_attn.k_proj.weight"] = torch.zeros(24, 24)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn.*\(24, 24\), \(24, 24\), \(8, 24\).*model has"):
        to_megavl(theirs, SMALL, "transformers")


def test_ablation_adaptors_have_no_other_name() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="pool_w has no name outside megavl"):
        entries(replace(SMALL, adaptor="pool_w"))
