"""Small checkpoints with random values, and their comparison, for the tests of conversion."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import write_tokenizer_json

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import Progress, WriteOptions
from megavl.checkpoint.convert.hf_folder import DEEPSEEK
from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.convert.shapes import full_shapes
from megavl.checkpoint.convert.verify import all_tensors
from megavl.checkpoint.hf_names import unused_names
from megavl.config import DecoderConfig, ModelConfig
from megavl.model.sizes import SIZES

TINY = SIZES["tiny"]
_TINY_SAM = SIZES["tiny_hybrid"].sam
assert _TINY_SAM is not None
HYBRID = replace(  # grouped heads, and the widths that transformers derives from the neck
    SIZES["tiny_hybrid"],
    decoder=DecoderConfig(layers=3, hidden=96, heads=6, kv_heads=2, ffn=136, vocab=500, rope_theta=500.0),
    sam=replace(_TINY_SAM, neck=16, downsample=(32, 64)),
)
MODELS = {"tiny": TINY, "hybrid": HYBRID, "tiny_hybrid": SIZES["tiny_hybrid"]}


def random_contents(model: ModelConfig, folder: Path | None = None, dtype: torch.dtype = torch.bfloat16) -> Contents:
    """Random weights and unused tensors; with a folder, a tokenizer in it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {**full_shapes(model), **dict.fromkeys(unused_names(model), (3, 5))}
    lazies = {
        name: in_memory(torch.randn(shape, generator=generator).to(dtype), name) for name, shape in shapes.items()
    }
    unused = {name: lazies.pop(name) for name in unused_names(model)}
    files = {"tokenizer.json": write_tokenizer_json(folder / "tokenizer.json")} if folder else {}
    return Contents(model=model, tensors=lazies, unused=unused, files=files)


def bar(what: str, total: int) -> AbstractContextManager[Progress]:
    return nullcontext(lambda count: None)


def write_source(folder: Path, model: Any = TINY, **choices: Any) -> Path:
    """A checkpoint in the released form."""
    folder.mkdir(parents=True)
    files = folder.with_name(folder.name + "_files")
    files.mkdir()
    DEEPSEEK.write(random_contents(model, files, **choices), folder, WriteOptions(), lambda count: None)
    return folder


def assert_equal(ours: Contents, theirs: Contents) -> None:
    left, right = dict(all_tensors(ours)), dict(all_tensors(theirs))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor.read(), right[name].read()), name


def edit_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
