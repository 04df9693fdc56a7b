"""Interpolation 64 to 96 and the first convolution behind it, one path. Shapes: i images.

Beside `triton`, `triton_separate` is the two operators one after the other; `eager` interpolates in fp32 and leaves the
convolution to cuDNN, channels last, as the released model.
"""

import torch
from torch import Tensor

from megavl.kernels.benchmark import Call, Case, Direction, backward_of
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.interpolate.op import interpolate
from megavl.kernels.interpolate_conv.op import interpolate_conv
from megavl.kernels.interpolate_conv.reference import interpolate_conv_reference
from megavl.kernels.strided_conv.op import strided_conv

SOURCE, TARGET, C, K = 64, 96, 256, 512


def cases() -> list[Case]:
    """1, 4 and 8 images, each direction by itself; 4 are those of one packed row."""
    return [_case(images, direction) for images in (1, 4, 8) for direction in ("forward", "backward")]


def _case(images: int, direction: Direction) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        x = torch.randn(images, C, SOURCE, SOURCE, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        w = (torch.randn(K, C, 3, 3, device=device) / (9 * C) ** 0.5).to(dtype)
        w = w.contiguous(memory_format=torch.channels_last)
        if direction == "forward":
            return {name: lambda f=f: f(x, w) for name, f in implementations().items()}  # type: ignore[misc]
        return {
            name: backward_of(f, [x.clone().requires_grad_(), w.clone().requires_grad_()])
            for name, f in implementations().items()
        }

    flops = 2.0 * images * (TARGET // 2) ** 2 * 9 * C * K
    values = images * (SOURCE**2 * C + (TARGET // 2) ** 2 * K) + 9 * C * K
    if direction == "backward":  # both gradients; x, dy and the weight are read, dx and dW written
        flops, values = 2 * flops, 2 * values - images * (TARGET // 2) ** 2 * K
    return Case(
        op="interpolate_conv",
        name=f"7b images{images} {SOURCE} to {TARGET} c{C} k{K}",
        direction=direction,
        make=make,
        flops=flops,
        bytes=2.0 * values,
        check=check,
        share_ms=f"7b {8 / images}, 1.3b_hybrid {8 / images}",  # two paths of four images
    )


def implementations() -> dict:
    """Kernel and peers by name."""
    return {"triton": _ours, "triton_separate": _separate, "eager": _eager, "compile": torch.compile(_eager)}


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradients at a small shape of the real ratio."""
    inputs: list[Tensor] = [torch.randn(2, 5, 4, 6, device=device), torch.randn(6, 5, 3, 3, device=device) / 7]
    hold_to_reference(
        lambda x, w: interpolate_conv(x, w, (6, 9)),
        lambda x, w: interpolate_conv_reference(x, w, (6, 9)),
        [x.to(dtype) for x in inputs],
    )


def _ours(x: Tensor, w: Tensor) -> Tensor:
    return interpolate_conv(x, w, (TARGET, TARGET))


def _separate(x: Tensor, w: Tensor) -> Tensor:
    return strided_conv(interpolate(x, (TARGET, TARGET)), w)


def _eager(x: Tensor, w: Tensor) -> Tensor:
    return interpolate_conv_reference(x, w, (TARGET, TARGET))
