"""The name tables of separately published weights against lists written from the architectures, and what is refused."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megavl.checkpoint.convert.assemble import Source, assemble, join
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.public_config import check_language, check_sam, check_siglip
from megavl.checkpoint.convert.public_names import FRESH_PREFIXES, Found, Part, find_part
from megavl.checkpoint.convert.shapes import full_shapes
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.hf_names import entries, unused_names
from megavl.config import ModelConfig
from megavl.model.sizes import SIZES

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 102400,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def read_list(name: str) -> dict[str, tuple[int, ...]]:
    """Expand a fixture to {name: shape}."""
    shapes: dict[str, tuple[int, ...]] = {}
    for line in (FIXTURES / f"public_{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        template, shape = line.split()
        pieces = re.split(r"\{(.*?)\}", template)
        choices = [[piece] if at % 2 == 0 else expand(piece) for at, piece in enumerate(pieces)]
        for filled in itertools.product(*choices):
            assert "".join(filled) not in shapes, filled
            shapes["".join(filled)] = tuple(int(side) for side in shape.split("x"))
    return shapes


def expand(piece: str) -> list[str]:
    first, dots, last = piece.partition("..")
    return [str(number) for number in range(int(first), int(last) + 1)] if dots else piece.split(",")


def without_values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Tensors that only know shape and name."""

    def make(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(
            shape=shape,
            dtype=torch.float32,
            rows=lambda first, stop: torch.empty((stop - first, *shape[1:]), device="meta"),
            source=name,
        )

    return {name: make(name, shape) for name, shape in shapes.items()}


def llama_list(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """A Llama checkpoint of the model's sizes, written out."""
    size = model.decoder
    d = size.hidden // size.heads
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (size.hidden,)}
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = (size.vocab, size.hidden)
    for n in range(size.layers):
        layer = f"model.layers.{n}."
        shapes[layer + "self_attn.q_proj.weight"] = shapes[layer + "self_attn.o_proj.weight"] = (size.hidden,) * 2
        for name in ("k_proj", "v_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (size.kv_heads * d, size.hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{layer}mlp.{name}.weight"] = (size.ffn, size.hidden)
        shapes[layer + "mlp.down_proj.weight"] = (size.hidden, size.ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (size.hidden,)
    return shapes


def sources(model: ModelConfig) -> dict[Part, Source]:
    """Public checkpoints of a released size."""
    size = model.decoder
    heads = {"num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "num_hidden_layers": size.layers}
    config = LLAMA | heads | {"hidden_size": size.hidden, "intermediate_size": size.ffn}
    texts = read_list("siglip_text_open_clip")
    siglip = {"visual.trunk." + name: shape for name, shape in read_list("siglip_l_timm").items()} | texts
    sam = Source(origin="sam.pth", tensors=without_values(read_list("sam_b_meta")))
    return {
        "language": Source(origin="llm", tensors=without_values(llama_list(model)), config=config),
        "siglip": Source(origin="siglip", tensors=without_values(siglip)),
        **({"sam": sam} if model.sam else {}),
    }


def used_names(found: Found) -> list[str]:
    return [part.source for parts in found.parts.values() for part in parts] + [t.source for t in found.unused.values()]


def below(prefixes: str | tuple[str, ...], shapes: Iterable[str]) -> set[str]:
    return {name for name in shapes if name.startswith(prefixes) and not name.startswith(FRESH_PREFIXES)}


@pytest.mark.parametrize(
    ("part", "ours", "lists", "left"),
    [
        ("language", ("first_stage.embedding.", "decoder.", "last_stage."), [], 0),
        ("siglip", "first_stage.towers.siglip.", ["siglip_l_timm"], 0),
        ("siglip", "first_stage.towers.siglip.", ["siglip_l_timm", "siglip_text_open_clip"], 296),
        ("sam", "first_stage.towers.sam.", ["sam_b_meta"], 137),
    ],
)
def test_every_name_of_both_sides_once(part: Part, ours: str, lists: list[str], left: int) -> None:
    model = SIZES["7b"]
    theirs = {name: shape for listed in lists for name, shape in read_list(listed).items()} or llama_list(model)
    found = find_part(part, without_values(theirs), model, "public")
    shapes = full_shapes(model)
    assert found.parts.keys() == below(ours, shapes)
    used = used_names(found)
    assert len(used) == len(set(used)) == len(theirs) - left
    assert sum(found.left_over.values()) == left
    for name, parts in found.parts.items():
        assert join(name, parts, shapes[name], model.decoder.kv_heads).shape == shapes[name]


@pytest.mark.parametrize("size", list(SIZES))
def test_shapes_have_the_names_of_the_tables(size: str) -> None:
    assert sorted(full_shapes(SIZES[size])) == sorted(entry.ours for entry in entries(SIZES[size]))


def test_everything_that_is_left_over_absent_or_fresh_is_told() -> None:
    contents, inventory = assemble(sources(SIZES["7b"]), SIZES["7b"], seed=3)
    assert {name: t.shape for name, t in contents.tensors.items()} == full_shapes(SIZES["7b"])
    assert inventory.found["siglip"].left_over == {"logit_bias": 1, "logit_scale": 1, "text": 294}
    assert inventory.found["sam"].left_over == {"mask_decoder": 120, "prompt_encoder": 17}
    assert set(inventory.fresh) == {name for name in contents.tensors if name.startswith(FRESH_PREFIXES)}
    assert len(inventory.fresh) == 6 + 6 + 2 + 1  # adaptor, neck_hd, downsamples, alpha
    assert {*contents.unused, *inventory.absent} == set(unused_names(SIZES["7b"]))
    assert len(contents.unused) == 13
    assert contents.unused["vision_model.vision_tower_low.vision_tower.attn_pool.kv.bias"].shape == (2048,)
    told = "\n".join(inventory.lines())
    for words in ("timm names below visual.trunk.", "294 text", "120 mask_decoder", "fresh from seed 3: 15", "absent"):
        assert words in told
    assert all(name in told for name in (*inventory.fresh, *inventory.absent))


def test_one_type_for_all() -> None:
    given = sources(SIZES["1.3b"])
    contents, _ = assemble(given, SIZES["1.3b"], seed=0)
    assert {tensor.dtype for tensor in contents.tensors.values()} == {torch.float32}
    half = {name: replace(t, dtype=torch.bfloat16) for name, t in given["language"].tensors.items()}
    given["language"] = replace(given["language"], tensors=half)
    with pytest.raises(CheckpointError, match=r"language torch\.bfloat16, siglip torch\.float32; --dtype"):
        assemble(given, SIZES["1.3b"], seed=0)
    contents, _ = assemble(given, SIZES["1.3b"], seed=0, dtype=torch.float16)
    assert {t.dtype for t in (*contents.tensors.values(), *contents.unused.values())} == {torch.float16}


def change(tensors: Mapping[str, LazyTensor], name: str, shape: tuple[int, ...] | None) -> dict[str, LazyTensor]:
    """With another shape of one tensor, or without it."""
    return {**{n: t for n, t in tensors.items() if n != name}, **(without_values({name: shape}) if shape else {})}


@pytest.mark.parametrize(
    ("part", "name", "shape", "words"),
    [
        ("siglip", "visual.trunk.blocks.7.attn.qkv.bias", None, "siglip: no tensor visual.trunk.blocks.7.attn.qkv"),
        ("siglip", "visual.trunk.pos_embed", (1, 196, 1024), "14 x 14 patches for 24 x 24"),
        ("siglip", "visual.trunk.norm.bias", (768,), "norm.bias has shape (768,), the model (1024,)"),
        ("siglip", "visual.trunk.blocks.24.norm1.bias", (1024,), "25 layers, model.siglip has 24"),
        ("siglip", "visual.trunk.blocks.3.ls1.gamma", (1024,), "blocks.3.ls1.gamma has no place in a layer"),
        ("siglip", "visual.trunk.patch_embed.proj.weight", None, "not a checkpoint of siglip"),
        ("siglip", "other.patch_embed.proj.weight", (1,), "2 models in it could be siglip"),
        ("sam", "image_encoder.pos_embed", (1, 32, 32, 768), "32 x 32 patches for 64 x 64"),
        ("sam", "image_encoder.blocks.2.attn.rel_pos_h", (27, 64), "blocks.2.attn.rel_pos_h has shape (27, 64)"),
        ("language", "model.layers.1.self_attn.q_proj.bias", (4096,), "q_proj.bias has no place in a layer"),
        ("language", "model.layers.1.self_attn.k_proj.weight", (1024, 4096), "(1024, 4096), the model (4096, 4096)"),
        ("language", "lm_head.weight", None, "llm: no tensor lm_head.weight"),
    ],
)  # fmt: skip
def test_refused(part: Part, name: str, shape: tuple[int, ...] | None, words: str) -> None:
    given = sources(SIZES["7b"])
    given[part] = replace(given[part], tensors=change(given[part].tensors, name, shape))
    with pytest.raises(CheckpointError) as refusal:
        assemble(given, SIZES["7b"], seed=0)
    assert words in str(refusal.value)


def test_old_rotary_frequencies_are_left_over() -> None:
    model = SIZES["7b"]
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    tensors = without_values(llama_list(model) | {name.format(n): (64,) for n in range(30)})
    assert find_part("language", tensors, model, "llm").left_over == {name.format("*"): 30}


@pytest.mark.parametrize(("size", "given"), [("1.3b", "language, siglip, sam"), ("7b", "language, siglip")])
def test_the_parts_must_be_those_of_the_model(size: str, given: str) -> None:
    all_parts = sources(SIZES["7b"])
    with pytest.raises(CheckpointError, match=f"given are {given}$"):
        assemble({part: all_parts[part] for part in given.split(", ")}, SIZES[size], seed=0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_hidden_layers": 32}, "num_hidden_layers is 32, the model has 30"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, the model has 32"),
        ({"head_dim": 64}, "head_dim is 64, the model has 128"),
        ({"vocab_size": 102416, "rms_norm_eps": 1e-5}, "102416, the model has 102400; rms_norm_eps is 1e-05"),
        ({"rope_theta": 500000.0}, "rope_theta is 500000.0"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_theta is 1000000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear', the model has 'default'"),
        ({"attention_bias": True}, "attention_bias is True, the model has False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', the model has 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_another_language_model_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        check_language(LLAMA | changed, SIZES["7b"].decoder, "llm")
    assert words in str(refusal.value)
    assert str(refusal.value).startswith("llm/config.json: ")


def test_configs_that_fit() -> None:
    """What is left out has the defaults of `transformers`; a vision config may lie inside a larger one."""
    left_out = {name: LLAMA[name] for name in ("model_type", "num_hidden_layers", "vocab_size")}
    check_language(left_out, SIZES["7b"].decoder, "llm")
    check_siglip(
        {"vision_config": {"num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh"}}, SIZES["7b"].siglip, ""
    )
    check_siglip({"architecture": "vit_large_patch16_siglip_384"}, SIZES["7b"].siglip, "")
    check_siglip(None, SIZES["7b"].siglip, "")
    sam = {"num_attention_heads": 12, "window_size": 14, "global_attn_indexes": [2, 5, 8, 11], "hidden_act": "gelu"}
    check_sam(sam, SIZES["7b"].sam, "")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_language(None, SIZES["7b"].decoder, "llm")
    with pytest.raises(CheckpointError, match=r"num_attention_heads is 12, the model has 16"):
        check_siglip({"vision_config": {"num_attention_heads": 12}}, SIZES["7b"].siglip, "s")
    with pytest.raises(CheckpointError, match=r"global_attn_indexes is \[2\], the model has \[2, 5, 8, 11\]"):
        check_sam({**sam, "global_attn_indexes": [2]}, SIZES["7b"].sam, "s")


def test_fixtures_count_what_is_published() -> None:
    """Parameters of Meta's SAM-B with its one buffer, and of SigLIP-L with its pooling."""
    assert sum(torch.Size(shape).numel() for shape in read_list("sam_b_meta").values()) == 93_735_472 + 256
    assert sum(torch.Size(shape).numel() for shape in read_list("siglip_l_timm").values()) == 303_688_704 + 12_595_200
