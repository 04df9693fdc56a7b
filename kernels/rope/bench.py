"""Rotary embedding of the queries (or keys) of DeepSeek-VL. Shapes: t tokens, n heads, d = 128 head size."""

import torch
from torch import Tensor

from megavl.kernels.benchmark import Call, Case, Direction, backward_of
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.rope.op import rotate
from megavl.kernels.rope.reference import rotate_reference

HEADS = {"1.3b": (16, 24), "7b": (32, 30)}
"""Model -> (heads, layers); queries and keys have the same number of heads in both."""
HEAD_SIZE = 128


def cases() -> list[Case]:
    """Micro-batches of 1 and 8 rows of 4,096 tokens, each direction by itself."""
    return [
        _case(model, micro_batch, direction)
        for model in HEADS
        for micro_batch in (1, 8)
        for direction in ("forward", "backward")
    ]


def _case(model: str, micro_batch: int, direction: Direction) -> Case:
    heads, layers = HEADS[model]
    tokens = 4096 * micro_batch

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        x = torch.randn(tokens, heads, HEAD_SIZE, device=device, dtype=dtype)
        tables = angles(tokens, HEAD_SIZE, device)
        if direction == "forward":
            return {name: lambda f=f: f(x, *tables) for name, f in implementations().items()}  # type: ignore[misc]
        leaf = x.requires_grad_()
        return {name: backward_of(f, [leaf, *tables]) for name, f in implementations().items()}

    return Case(
        op="rope",
        name=f"{model} mb{micro_batch} tokens{tokens} heads{heads}",
        direction=direction,
        make=make,
        flops=0.0,
        bytes=2.0 * 2 * tokens * heads * HEAD_SIZE + 4.0 * tokens * HEAD_SIZE,  # heads in and out, the fp32 tables
        check=check,
        share_ms=f"{model} {2 * layers / micro_batch}",
    )


def implementations() -> dict:
    """Kernel and peers by name."""
    return {"triton": rotate, "eager": rotate_reference, "compile": torch.compile(rotate_reference)}


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradient at a small odd shape."""
    cos, sin = angles(7, 34, device)
    hold_to_reference(
        lambda x: rotate(x, cos, sin),
        lambda x: rotate_reference(x, cos, sin),
        [torch.randn(7, 3, 34, device=device, dtype=dtype)],
    )


def angles(tokens: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cosine, sine) fp32 [t, 1, d/2] of positions that restart every 1,024 tokens, as in packed rows."""
    positions = torch.arange(tokens, device=device) % 1024
    frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, device=device) / head_size)
    turned = (positions[:, None] * frequencies).unsqueeze(1)  # [t, 1, d/2]
    return turned.cos(), turned.sin()
