"""The two convolutions behind SAM's neck, one path, against cuDNN in channels-last layout. Shapes: i images."""

import torch
from torch import Tensor

from megavl.kernels.benchmark import Call, Case, Direction, backward_of
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.strided_conv.op import strided_conv
from megavl.kernels.strided_conv.reference import strided_conv_reference

LAYERS = {"conv1": (96, 256, 512), "conv2": (48, 512, 1024)}
"""Layer -> (side of the map, channels before, channels after)."""


def cases() -> list[Case]:
    """1, 4 and 8 images, each direction by itself; 4 are those of one packed row."""
    return [
        _case(layer, images, direction)
        for layer in LAYERS
        for images in (1, 4, 8)
        for direction in ("forward", "backward")
    ]


def _case(layer: str, images: int, direction: Direction) -> Case:
    side, c, k = LAYERS[layer]

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        x = torch.randn(images, c, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        w = (torch.randn(k, c, 3, 3, device=device) / (9 * c) ** 0.5).to(dtype)
        w = w.contiguous(memory_format=torch.channels_last)
        found = {"triton": strided_conv, "eager": strided_conv_reference}  # eager: cuDNN, channels last
        if direction == "forward":
            return {name: lambda f=f: f(x, w) for name, f in found.items()}  # type: ignore[misc]
        return {
            name: backward_of(f, [x.clone().requires_grad_(), w.clone().requires_grad_()]) for name, f in found.items()
        }

    flops = 2.0 * images * (side // 2) ** 2 * 9 * c * k
    values = images * (side**2 * c + (side // 2) ** 2 * k) + 9 * c * k
    if direction == "backward":  # both gradients; x, dy and the weight are read, dx and dW written
        flops, values = 2 * flops, 2 * values - images * (side // 2) ** 2 * k
    # Two paths leave SAM; in training both have a gradient here, as the convolutions are shared.
    return Case(
        op="strided_conv",
        name=f"7b {layer} images{images} side{side} c{c} k{k}",
        direction=direction,
        make=make,
        flops=flops,
        bytes=2.0 * values,
        check=check,
        share_ms=f"7b {8 / images}, 1.3b_hybrid {8 / images}",
    )


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradients at a small odd shape."""
    inputs: list[Tensor] = [torch.randn(2, 5, 5, 7, device=device), torch.randn(6, 5, 3, 3, device=device) / 7]
    hold_to_reference(strided_conv, strided_conv_reference, [x.to(dtype) for x in inputs])
