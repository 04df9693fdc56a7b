"""Bilinear interpolation as a differentiable operator. Shapes: i images, c channels, y and x rows and columns."""

import torch
import triton
from torch import Tensor

from megavl.kernels.interpolate.kernel import blocks, interpolate_backward, interpolate_forward, taps
from megavl.kernels.launch import check_tensor

MAX_SIDE = 8192
"""Samples along a side, before or after: positions are exact in integers."""


def interpolate(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`; differentiable.

    Weights and sums are fp32 in every type. The gradient gathers, in a fixed order: equal bits in every run, where
    PyTorch's own adds with atomics on CUDA.

    Args:
        features: [i, c, y, x], fp32, fp16 or bf16. Channels-last in memory is read in place, else a copy is made.
        size: rows and columns of the result.

    Returns:
        [i, c, *size] in the type of `features`, channels-last in memory.

    Raises:
        ValueError: unsupported type, device, shape or size.
    """
    check_map(features, size)
    return _interpolate(features, size[0], size[1])


def check_map(features: Tensor, size: tuple[int, int]) -> None:
    """Refuse a map or a size that cannot be interpolated."""
    check_tensor("features", features)
    if features.dim() != 4:
        raise ValueError(f"features has {features.dim()} dimensions; supported is [images, channels, rows, columns]")
    for name, sides in (("features", features.shape[2:]), ("size", size)):
        if len(sides) != 2 or not all(0 < side <= MAX_SIDE for side in sides):
            raise ValueError(f"{name} has sides {tuple(sides)}; supported are two of 1 to {MAX_SIDE}")


def channels_last(features: Tensor) -> Tensor:
    """[i, c, y, x] as [i, y, x, c] with adjacent channels; a copy only where strides make it necessary."""
    pixels = features.permute(0, 2, 3, 1)
    return pixels if pixels.stride(-1) == 1 or pixels.shape[-1] == 1 else pixels.contiguous()


@torch.library.custom_op("megavl::interpolate", mutates_args=())
def _interpolate(features: Tensor, rows: int, columns: int) -> Tensor:
    x = channels_last(features)
    i, s_y, s_x, c = x.shape
    y = torch.empty(i, rows, columns, c, dtype=x.dtype, device=x.device)
    if y.numel():
        tile, pixels = blocks(c), i * rows * columns
        interpolate_forward[(triton.cdiv(pixels, tile["BLOCK_P"]), triton.cdiv(c, tile["BLOCK_C"]))](
            *(x, y, *x.stride()[:3], pixels, c), S_Y=s_y, S_X=s_x, T_Y=rows, T_X=columns, **tile
        )
    return y.permute(0, 3, 1, 2)


@_interpolate.register_fake
def _(features: Tensor, rows: int, columns: int) -> Tensor:
    i, c, _, _ = features.shape
    return features.new_empty(i, rows, columns, c).permute(0, 3, 1, 2)


@torch.library.custom_op("megavl::interpolate_backward", mutates_args=())
def _interpolate_backward(gradient: Tensor, rows: int, columns: int) -> Tensor:
    """Gradient of the input of `rows` by `columns`, [i, c, rows, columns]."""
    dy = channels_last(gradient)
    i, t_y, t_x, c = dy.shape
    dx = torch.empty(i, rows, columns, c, dtype=dy.dtype, device=dy.device)
    if dx.numel():
        tile, pixels = blocks(c), i * rows * columns
        interpolate_backward[(triton.cdiv(pixels, tile["BLOCK_P"]), triton.cdiv(c, tile["BLOCK_C"]))](
            *(dy, dx, *dy.stride()[:3], pixels, c),
            **{"S_Y": rows, "S_X": columns, "T_Y": t_y, "T_X": t_x},
            **{"TAPS_Y": taps(rows, t_y), "TAPS_X": taps(columns, t_x)},
            **tile,
        )
    return dx.permute(0, 3, 1, 2)


@_interpolate_backward.register_fake
def _(gradient: Tensor, rows: int, columns: int) -> Tensor:
    i, c, _, _ = gradient.shape
    return gradient.new_empty(i, rows, columns, c).permute(0, 3, 1, 2)


def _setup_context(ctx, inputs, output) -> None:
    ctx.rows, ctx.columns = inputs[0].shape[2:]


def _backward(ctx, gradient: Tensor):
    return _interpolate_backward(gradient, ctx.rows, ctx.columns), None, None


_interpolate.register_autograd(_backward, setup_context=_setup_context)
