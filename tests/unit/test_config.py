"""`validate` finds every contradiction of a recipe, all at once, with the field and both numbers."""

import dataclasses
from typing import Any

import pytest

from megavl.config import (
    DataConfig,
    KernelsConfig,
    OptimConfig,
    ParallelConfig,
    Recipe,
    SourceConfig,
    StageConfig,
)
from megavl.model.sizes import SIZES
from megavl.validate import validate


def base(size: str = "tiny_hybrid") -> Recipe:
    return Recipe(
        run_dir="run",
        model=SIZES[size],
        parallel=ParallelConfig(),
        data=DataConfig(
            tokenizer="t.model",
            sources=(
                SourceConfig(name="text", path="a", modality="language", share=0.7),
                SourceConfig(name="images", path="b", modality="multimodal", share=0.3),
            ),
            seq_length=128,
        ),
        stage=StageConfig(number=2, steps=10, global_batch=8),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=2),
    )


def change(recipe: Any, dotted: str, value: Any) -> Any:
    """A copy with one nested field replaced."""
    name, _, rest = dotted.partition(".")
    inner = change(getattr(recipe, name), rest, value) if rest else value
    return dataclasses.replace(recipe, **{name: inner})


@pytest.mark.parametrize("size", sorted(SIZES))
def test_sizes_are_consistent(size: str) -> None:
    assert validate(change(base(size), "data.seq_length", 1024)) == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.decoder.layers", 0, ["model.decoder.layers 0 is not above 0"]),
        ("model.decoder.norm_eps", 0.0, ["model.decoder.norm_eps 0.0 is not above 0"]),
        ("model.siglip.patch_size", 0, ["model.siglip.patch_size 0 is not above 0"]),
        ("model.sam.window", -2, ["model.sam.window -2 is not above 0"]),
        ("model.decoder.heads", 3, ["hidden 128", "heads 3"]),
        ("model.decoder.kv_heads", 3, ["heads 4", "kv_heads 3"]),
        ("model.siglip.patch_size", 5, ["image_size 32", "patch_size 5"]),
        ("model.sam.heads", 5, ["model.sam.width 64", "heads 5"]),
        ("model.sam.global_layers", (1, 4), ["[4]", "4 layers"]),
        ("model.sam.upsample", 24, ["24", "16"]),
        ("model.sam", None, ["hybrid", "1 tower"]),
        ("model.adaptor", "mlp_gelu", ["mlp_gelu", "2 tower"]),
        ("model.background", (1, 2, 300), ["300", "255"]),
        ("data.sources", (), ["0 sources"]),
        ("data.seq_length", 16, ["seq_length 16", "16 tokens"]),
        ("data.seq_length", 4096, ["4096", "2048"]),
        ("data.language_warmup", 1.5, ["1.5", "0 to 1"]),
        ("stage.number", 0, ["stage.number 0"]),
        ("stage.micro_batch", 3, ["global_batch 8", "micro_batch 3"]),
        ("stage.micro_batch", 0, ["global_batch 8", "micro_batch 0"]),
        ("optim.warmup_steps", 11, ["warmup_steps 11", "steps 10"]),
        ("optim.lr", 0.0, ["optim.lr 0.0"]),
        ("optim.beta2", 1.0, ["1.0"]),
        ("optim.final", -0.5, ["-0.5"]),
        ("checkpoint.keep", 0, ["keep 0"]),
        ("logging.every", 0, ["every 0"]),
        ("run_dir", "", ["run_dir"]),
        (
            "kernels",
            KernelsConfig(interpolate="triton", interpolate_conv="triton"),
            ["kernels.interpolate_conv triton", "kernels.interpolate triton would never run"],
        ),
    ],
)
def test_each_problem(field: str, value: Any, words: list[str]) -> None:
    problems = validate(change(base(), field, value))
    assert any(all(word in problem for word in words) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_shares() -> None:
    low = SourceConfig(name="text", path="a", modality="language", share=0.5)
    problems = validate(change(base(), "data.sources", (low, dataclasses.replace(low, share=0.4))))
    assert any("0.9" in p for p in problems)
    assert any("2 sources have 1 different names" in p for p in problems)


def test_all_at_once() -> None:
    broken = change(change(change(base(), "optim.lr", -1.0), "stage.steps", 0), "checkpoint.keep", 0)
    problems = " ".join(validate(broken))
    assert all(word in problems for word in ("optim.lr -1.0", "stage.steps 0", "checkpoint.keep 0"))
