"""SwiGLU at the feed-forward sizes of DeepSeek-VL. Shapes: rows of 4,096 tokens, f hidden dimension of the layer."""

import torch
from torch import Tensor

from megavl.kernels.benchmark import Call, Case, Direction, backward_of
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.swiglu.op import swiglu
from megavl.kernels.swiglu.reference import swiglu_reference

LAYERS = {"1.3b": (5632, 24), "7b": (11008, 30)}
"""Model -> (hidden dimension of the feed-forward network, layers)."""

try:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
except ImportError:
    LigerSiLUMulFunction = None


def cases() -> list[Case]:
    """Micro-batches of 1 and 8 rows of 4,096 tokens, each direction by itself."""
    return [
        _case(model, micro_batch, direction)
        for model in LAYERS
        for micro_batch in (1, 8)
        for direction in ("forward", "backward")
    ]


def _case(model: str, micro_batch: int, direction: Direction) -> Case:
    f, layers = LAYERS[model]
    rows = 4096 * micro_batch
    passes = 3 if direction == "forward" else 5  # read gate, up, write y; read dy, gate, up, write dgate, dup

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        gate_up = torch.randn(rows, 2 * f, device=device, dtype=dtype)
        if direction == "forward":
            return {name: lambda g=g: g(gate_up) for name, g in implementations().items()}  # type: ignore[misc]
        leaf = gate_up.requires_grad_()
        # Liger's gradient overwrites what it saved, so it cannot be repeated over one graph.
        return {name: backward_of(g, [leaf]) for name, g in implementations().items() if name != "liger"}

    return Case(
        op="swiglu",
        name=f"{model} mb{micro_batch} rows{rows} f{f}",
        direction=direction,
        make=make,
        flops=0.0,
        bytes=2.0 * passes * rows * f,
        check=check,
        share_ms=f"{model} {layers / micro_batch}",
    )


def implementations() -> dict:
    """Kernel and peers by name."""
    found = {"triton": swiglu, "eager": swiglu_reference, "compile": torch.compile(swiglu_reference)}
    return found if LigerSiLUMulFunction is None else {**found, "liger": _liger}


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradient at a small odd shape."""
    hold_to_reference(swiglu, swiglu_reference, [torch.randn(5, 2 * 67, device=device, dtype=dtype)])


def _liger(gate_up: Tensor) -> Tensor:
    return LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))
