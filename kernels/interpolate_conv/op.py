"""Interpolation and the stride-2 convolution behind it as one differentiable operator.

Forward, the larger map is never in memory. Backward goes through the operators that it consists of: the gradient of
the larger map and that map itself are made for the time of the call.

A showcase, not a default: what it saves is one pass over the larger map, and no time of it has been measured yet.

Shapes: i images, c and k channels before and after, y and x rows and columns.
"""

import torch
import triton
from torch import Tensor

from megavl.kernels.configurations import configuration
from megavl.kernels.interpolate.op import channels_last, check_map, interpolate
from megavl.kernels.interpolate_conv.kernel import blocks, interpolate_conv_forward
from megavl.kernels.launch import INTERPRETING
from megavl.kernels.strided_conv.op import check_weight, weight_rows


def interpolate_conv(features: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """`strided_conv(interpolate(features, size), weight)`; differentiable, with equal bits in every run.

    Args:
        features: [i, c, y, x], fp32, fp16 or bf16. Channels-last in memory is read in place, else a copy is made.
        weight: [k, c, 3, 3] in the same type.
        size: rows and columns of the map between the two.

    Returns:
        [i, k, ceil(size[0] / 2), ceil(size[1] / 2)], channels-last in memory.

    Raises:
        ValueError: unsupported type, device, shape or size.
    """
    check_map(features, size)
    check_weight(features, weight)
    return _interpolate_conv(features, weight, size[0], size[1])


@torch.library.custom_op("megavl::interpolate_conv", mutates_args=())
def _interpolate_conv(features: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    x, k = channels_last(features), weight.shape[0]
    i, s_y, s_x, c = x.shape
    y = torch.empty(i, (rows + 1) // 2, (columns + 1) // 2, k, dtype=x.dtype, device=x.device)
    if y.numel():
        shape, pixels = f"{s_y}x{s_x} to {rows}x{columns} c{c} k{k}", y.numel() // k
        tile = configuration("interpolate_conv", "forward", shape, blocks(x.dtype, k, c), x)
        interpolate_conv_forward[(triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(k, tile["BLOCK_N"]))](
            *(x, weight_rows(weight), y, *x.stride()[:3], pixels),
            **{"S_Y": s_y, "S_X": s_x, "T_Y": rows, "T_X": columns, "C": c, "K": k, "UPCAST": INTERPRETING},
            **tile,
        )
    return y.permute(0, 3, 1, 2)


@_interpolate_conv.register_fake
def _(features: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    y = features.new_empty(features.shape[0], (rows + 1) // 2, (columns + 1) // 2, weight.shape[0])
    return y.permute(0, 3, 1, 2)


def _setup_context(ctx, inputs, output) -> None:
    features, weight, ctx.rows, ctx.columns = inputs
    ctx.save_for_backward(features, weight)


def _backward(ctx, gradient: Tensor):
    features, weight = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dup = torch.ops.megavl.strided_conv_backward_input(gradient, weight, ctx.rows, ctx.columns)
        dx = torch.ops.megavl.interpolate_backward(dup, *features.shape[2:])
    if ctx.needs_input_grad[1]:
        up = interpolate(features.detach(), (ctx.rows, ctx.columns))
        dw = torch.ops.megavl.strided_conv_backward_weight(gradient, up)
    return dx, dw, None, None


_interpolate_conv.register_autograd(_backward, setup_context=_setup_context)
