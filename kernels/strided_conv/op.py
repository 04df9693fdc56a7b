"""Stride-2 3x3 convolution as a differentiable operator.

A showcase, not a default: cuDNN in channels-last layout stays what `auto` takes, until a measurement says otherwise for
a shape (no time of this kernel has been measured yet).

Shapes: i images, c and k channels before and after, y and x rows and columns.
"""

import torch
import triton
from torch import Tensor

from megavl.kernels.configurations import configuration
from megavl.kernels.interpolate.op import channels_last
from megavl.kernels.launch import INTERPRETING, check_tensor, num_programs
from megavl.kernels.strided_conv.kernel import blocks, conv_backward_input, conv_backward_weight, conv_forward

MAX_SPLITS = 8
"""Programs that share the pixels of one tile of the weight's gradient; each writes a part of its own, in fp32."""


def strided_conv(features: Tensor, weight: Tensor) -> Tensor:
    """Convolution with stride 2, padding 1 and no bias; differentiable, with equal bits in every run.

    Args:
        features: [i, c, y, x], fp32, fp16 or bf16. Channels-last in memory is read in place, else a copy is made.
        weight: [k, c, 3, 3] in the same type.

    Returns:
        [i, k, ceil(y / 2), ceil(x / 2)], channels-last in memory.

    Raises:
        ValueError: unsupported type, device or shape.
    """
    check_tensor("features", features)
    if features.dim() != 4 or not all(features.shape[2:]):
        raise ValueError(f"features has shape {tuple(features.shape)}; supported is [images, channels, rows, columns]")
    check_weight(features, weight)
    return _strided_conv(features, weight)


def check_weight(features: Tensor, weight: Tensor) -> None:
    """Refuse a weight that does not fit the features, [i, c, y, x]."""
    check_tensor("weight", weight, like=features, dtypes=(features.dtype,))
    if not features.shape[1]:
        raise ValueError(f"features has shape {tuple(features.shape)}; supported are 1 channel and more")
    if weight.dim() != 4 or weight.shape[1:] != (features.shape[1], 3, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; supported is [k, {features.shape[1]}, 3, 3]")


def weight_rows(weight: Tensor) -> Tensor:
    """[k, 3, 3, c], contiguous."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _shape(rows: int, columns: int, c: int, k: int) -> str:
    """What configurations are kept for."""
    return f"{rows}x{columns} c{c} k{k}"


@torch.library.custom_op("megavl::strided_conv", mutates_args=())
def _strided_conv(features: Tensor, weight: Tensor) -> Tensor:
    x, k = channels_last(features), weight.shape[0]
    i, rows, columns, c = x.shape
    y = torch.empty(i, (rows + 1) // 2, (columns + 1) // 2, k, dtype=x.dtype, device=x.device)
    if y.numel():
        tile = configuration("strided_conv", "forward", _shape(rows, columns, c, k), blocks(x.dtype, k, c), x)
        pixels = y.numel() // k
        conv_forward[(triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(k, tile["BLOCK_N"]))](
            *(x, weight_rows(weight), y, *x.stride()[:3], pixels),
            **{"Y": rows, "X": columns, "C": c, "K": k, "UPCAST": INTERPRETING},
            **tile,
        )
    return y.permute(0, 3, 1, 2)


@_strided_conv.register_fake
def _(features: Tensor, weight: Tensor) -> Tensor:
    i, _, rows, columns = features.shape
    return features.new_empty(i, (rows + 1) // 2, (columns + 1) // 2, weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.custom_op("megavl::strided_conv_backward_input", mutates_args=())
def _backward_input(gradient: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    """Gradient of the features, [i, c, rows, columns]: one launch per parity of row and column."""
    dy = channels_last(gradient)
    i, (k, c) = dy.shape[0], weight.shape[:2]
    dx = torch.empty(i, rows, columns, c, dtype=dy.dtype, device=dy.device)
    if not k:
        dx.zero_()
    elif dx.numel():
        default, shape, w = blocks(dy.dtype, c, k), _shape(rows, columns, c, k), weight_rows(weight)
        for odd_y, odd_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            tile = configuration("strided_conv", f"dx parity {odd_y}{odd_x}", shape, default, dy)
            pixels = i * ((rows + 1 - odd_y) // 2) * ((columns + 1 - odd_x) // 2)
            if pixels:  # a map of one row has no odd one
                conv_backward_input[(triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(c, tile["BLOCK_N"]))](
                    *(dy, w, dx, *dy.stride()[:3], pixels),
                    **{"Y": rows, "X": columns, "C": c, "K": k, "ODD_Y": odd_y, "ODD_X": odd_x, "UPCAST": INTERPRETING},
                    **tile,
                )
    return dx.permute(0, 3, 1, 2)


@_backward_input.register_fake
def _(gradient: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    return gradient.new_empty(gradient.shape[0], rows, columns, weight.shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("megavl::strided_conv_backward_weight", mutates_args=())
def _backward_weight(gradient: Tensor, features: Tensor) -> Tensor:
    """Gradient of the weight, [k, c, 3, 3]."""
    dy, x = channels_last(gradient).contiguous(), channels_last(features)
    (_, rows, columns, c), k = x.shape, dy.shape[-1]
    if not dy.numel():
        return x.new_zeros(k, c, 3, 3)
    tile = configuration("strided_conv", "dw", _shape(rows, columns, c, k), blocks(x.dtype, c, 64), x)
    pixels = dy.numel() // k
    tiles = triton.cdiv(k, tile["BLOCK_M"]) * triton.cdiv(c, tile["BLOCK_N"])
    splits = max(1, min(MAX_SPLITS, num_programs(x.device) // (9 * tiles), triton.cdiv(pixels, tile["BLOCK_K"])))
    if INTERPRETING:
        splits = min(2, triton.cdiv(pixels, tile["BLOCK_K"]))  # the ordered sum is to be tested as well
    per_split = triton.cdiv(triton.cdiv(pixels, splits), tile["BLOCK_K"]) * tile["BLOCK_K"]
    parts = torch.empty(splits, k, 3, 3, c, dtype=torch.float32, device=x.device)
    conv_backward_weight[(tiles, 9, splits)](
        *(dy, x, parts, *x.stride()[:3], pixels, per_split),
        **{"Y": rows, "X": columns, "C": c, "K": k, "UPCAST": INTERPRETING},
        **tile,
    )
    return parts.sum(0).to(x.dtype).permute(0, 3, 1, 2).contiguous()


@_backward_weight.register_fake
def _(gradient: Tensor, features: Tensor) -> Tensor:
    return features.new_empty(gradient.shape[1], features.shape[1], 3, 3)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor):
    features, weight = ctx.saved_tensors
    dx = _backward_input(gradient, weight, *features.shape[2:]) if ctx.needs_input_grad[0] else None
    dw = _backward_weight(gradient, features) if ctx.needs_input_grad[1] else None
    return dx, dw


_strided_conv.register_autograd(_backward, setup_context=_setup_context)
