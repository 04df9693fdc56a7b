"""Interpolation behind SAM's neck: 64 x 64 to 96 x 96 with 256 channels, one path. Shapes: i images."""

import torch
from torch import Tensor

from megavl.kernels.benchmark import Call, Case, Direction, backward_of
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.interpolate.op import interpolate
from megavl.kernels.interpolate.reference import interpolate_reference

CHANNELS, SOURCE, TARGET = 256, 64, 96


def cases() -> list[Case]:
    """1, 4 and 8 images, each direction by itself; 4 are those of one packed row."""
    return [_case(images, direction) for images in (1, 4, 8) for direction in ("forward", "backward")]


def _case(images: int, direction: Direction) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        x = torch.randn(images, CHANNELS, SOURCE, SOURCE, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        if direction == "forward":
            return {name: lambda f=f: f(x) for name, f in implementations().items()}  # type: ignore[misc]
        return {name: backward_of(f, [x.clone().requires_grad_()]) for name, f in implementations().items()}

    # Two paths leave SAM; in training only the one through neck_hd has a gradient.
    calls = {"forward": 2, "backward": 1}[direction] * 4 / images
    return Case(
        op="interpolate",
        name=f"7b images{images} {SOURCE} to {TARGET} c{CHANNELS}",
        direction=direction,
        make=make,
        flops=0.0,
        bytes=2.0 * images * CHANNELS * (SOURCE**2 + TARGET**2),
        check=check,
        share_ms=f"7b {calls}, 1.3b_hybrid {calls}",
    )


def implementations() -> dict:
    """Kernel and peers by name. `eager` and `compile` convert to fp32 and back, as the released model."""
    return {"triton": _ours, "eager": _eager, "compile": torch.compile(_eager), "matrices": _matrices}


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradient at a small shape of the real ratio."""
    x = torch.randn(1, 19, 6, 4, device=device, dtype=dtype)
    hold_to_reference(lambda a: interpolate(a, (9, 6)), lambda a: interpolate_reference(a, (9, 6)), [x])


def _ours(x: Tensor) -> Tensor:
    return interpolate(x, (TARGET, TARGET))


def _eager(x: Tensor) -> Tensor:
    return interpolate_reference(x, (TARGET, TARGET))


def _matrices(x: Tensor) -> Tensor:
    """Two fp32 matrix products, the model's way without kernels: deterministic as well."""
    place = torch.arange(TARGET, device=x.device)
    centre = ((place + 0.5) * SOURCE / TARGET - 0.5).clamp(0, SOURCE - 1)
    weights = (1 - (centre[:, None] - torch.arange(SOURCE, device=x.device)).abs()).clamp(min=0)  # [TARGET, SOURCE]
    return (weights @ x.float() @ weights.T).to(x.dtype)
