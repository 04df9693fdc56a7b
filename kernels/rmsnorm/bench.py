"""RMSNorm at the decoder widths of DeepSeek-VL. Shapes: rows of 4,096 tokens, h hidden size."""

import torch
from torch import Tensor
from torch.nn import functional

from megavl.kernels.benchmark import Call, Case, Direction, backward_of
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.rmsnorm.op import rms_norm
from megavl.kernels.rmsnorm.reference import rms_norm_reference

EPS = 1e-6
WIDTHS = {"1.3b": (2048, 49), "7b": (4096, 61)}
"""Model -> (hidden size, norms of the decoder: two a layer and the last)."""

try:
    from liger_kernel.transformers.functional import liger_rms_norm
except ImportError:
    liger_rms_norm = None


def cases() -> list[Case]:
    """Micro-batches of 1 and 8 rows of 4,096 tokens, each direction by itself."""
    return [
        _case(model, micro_batch, direction)
        for model in WIDTHS
        for micro_batch in (1, 8)
        for direction in ("forward", "backward")
    ]


def _case(model: str, micro_batch: int, direction: Direction) -> Case:
    hidden, calls = WIDTHS[model]
    rows = 4096 * micro_batch
    passes = 2 if direction == "forward" else 3  # read x, write y; read dy and x, write dx

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        x = torch.randn(rows, hidden, device=device, dtype=dtype)
        weight = 1 + 0.1 * torch.randn(hidden, device=device, dtype=dtype)
        if direction == "forward":
            return {name: lambda f=f: f(x, weight) for name, f in implementations().items()}  # type: ignore[misc]
        return {
            name: backward_of(f, [x.clone().requires_grad_(), weight.clone().requires_grad_()])
            for name, f in implementations().items()
        }

    return Case(
        op="rmsnorm",
        name=f"{model} mb{micro_batch} rows{rows} h{hidden}",
        direction=direction,
        make=make,
        flops=0.0,
        bytes=2.0 * passes * rows * hidden,
        check=check,
        share_ms=f"{model} {calls / micro_batch}",
    )


def implementations() -> dict:
    """Kernel and peers by name."""
    found = {"triton": _ours, "eager": _eager, "compile": torch.compile(_eager), "torch": _torch}
    return found if liger_rms_norm is None else {**found, "liger": _liger}


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradients at a small odd shape."""
    inputs = [torch.randn(7, 97, device=device, dtype=dtype), torch.randn(97, device=device, dtype=dtype)]
    hold_to_reference(_ours, _eager, inputs)


def _ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, EPS)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, EPS)


def _liger(x: Tensor, weight: Tensor) -> Tensor:
    return liger_rms_norm(x, weight, EPS)
