"""SAM attention as an operator: fused forward pass, plain PyTorch gradient.

Shapes: i images, g grid rows, f grid columns, c channels, d head size, y and x rows and columns of an area
(the grid, or one window).
"""

import math

import torch
import triton
from torch import Tensor

from megavl.kernels.configurations import configuration
from megavl.kernels.launch import INTERPRETING, check_tensor
from megavl.kernels.sam_attention.backward import sam_attention_gradients
from megavl.kernels.sam_attention.kernel import (
    global_attention,
    global_blocks,
    position_terms,
    term_blocks,
    window_attention,
    window_blocks,
)

MAX_GRID = 128
"""Patches along a side of a grid attended as a whole: a grid row is one tile."""
MAX_WINDOW = 32
"""Patches along a side of a window: a tile holds whole rows of a window."""
MAX_HEAD = 128
"""Largest head size: queries, keys and output of a tile live in one program."""


def sam_attention(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None = None, window: int = 0
) -> Tensor:
    """Attention with decomposed relative positions over the patch grid, or within windows of it.

    Partition into windows, padding and the way back happen inside. The gradient is a slow path (backward.py): no
    training stage needs it.

    Args:
        qkv: output of the qkv projection on the unpadded grid, [i, g, f, 3c], fp32, fp16 or bf16; any strides.
        rel_pos_h: one row per distance between rows of an area, from 1 - y to y - 1, [2y - 1, d].
        rel_pos_w: the same between columns, [2x - 1, d].
        qkv_bias: bias of the qkv projection, [3c]. Where windows stick out of the grid, the patches outside take part
            with it as their q, k and v, as in SAM. Not read where none sticks out.
        window: side of the windows in patches, 0 for the whole grid.

    Returns:
        [i, g, f, c], contiguous, before the output projection.

    Raises:
        ValueError: unsupported type, device or size, or a position table that does not fit the area.
    """
    check_tensor("qkv", qkv)
    for name, tensor in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w), ("qkv_bias", qkv_bias)):
        if tensor is not None:
            check_tensor(name, tensor, like=qkv, dtypes=(qkv.dtype,))
    if qkv.dim() != 4:
        raise ValueError(f"qkv has {qkv.dim()} dimensions; supported is [images, rows, columns, 3 * channels]")
    _check_area(qkv.shape[1], qkv.shape[2], window)
    _check_tables(qkv, rel_pos_h, rel_pos_w, qkv_bias, window)
    return _sam_attention(qkv, rel_pos_h, rel_pos_w, qkv_bias, window)


def _check_area(g: int, f: int, window: int) -> None:
    """Refuse areas that do not fit a tile."""
    if not 0 <= window <= MAX_WINDOW:
        raise ValueError(f"window is {window}; supported are 1 to {MAX_WINDOW}, and 0 for the whole grid")
    if not window and max(g, f) > MAX_GRID:
        raise ValueError(f"qkv has a grid of {g} x {f} patches; supported are up to {MAX_GRID} a side")


def _check_tables(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None, window: int) -> None:
    """Refuse parameters whose shapes contradict qkv and the window."""
    g, f, width = qkv.shape[1:]
    if rel_pos_h.dim() != 2 or not 0 < rel_pos_h.shape[1] <= MAX_HEAD:
        shape = tuple(rel_pos_h.shape)
        raise ValueError(
            f"rel_pos_h has shape {shape}; supported is [2 * rows - 1, head size], head size 1 to {MAX_HEAD}"
        )
    d = rel_pos_h.shape[1]
    if width % (3 * d):
        raise ValueError(f"qkv has {width} channels, not a multiple of 3 * {d}, the head size of rel_pos_h")
    for name, table, side in (("rel_pos_h", rel_pos_h, window or g), ("rel_pos_w", rel_pos_w, window or f)):
        if side and table.shape != (2 * side - 1, d):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; an area of {side} patches needs {(2 * side - 1, d)}"
            )
    if qkv_bias is None:
        if window and (g % window or f % window):
            raise ValueError(f"qkv_bias is missing; windows of {window} stick out of a grid of {g} x {f} patches")
    elif qkv_bias.shape != (width,):
        raise ValueError(f"qkv_bias has shape {tuple(qkv_bias.shape)}, qkv has {width} channels")


@torch.library.custom_op("megavl::sam_attention", mutates_args=())
def _sam_attention(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None, window: int) -> Tensor:
    """y [i, g, f, c]."""
    c = qkv.shape[-1] // 3
    y = torch.empty(*qkv.shape[:-1], c, dtype=qkv.dtype, device=qkv.device)
    if y.numel():
        reach = sum((size - 1) * stride for size, stride in zip(qkv.shape[1:], qkv.stride()[1:], strict=True))
        if qkv.stride(-1) != 1 or reach >= 2**31:  # offsets within an image are int32
            qkv = qkv.contiguous()
        if window:
            _attend_windows(qkv, rel_pos_h.contiguous(), rel_pos_w.contiguous(), qkv_bias, window, y)
        else:
            _attend_grid(qkv, rel_pos_h.contiguous(), rel_pos_w.contiguous(), y)
    return y


def _attend_grid(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, y: Tensor) -> None:
    """Fill y: the position terms of all queries, then attention."""
    images, g, f, c = y.shape
    d = rel_pos_h.shape[1]
    heads, tokens = c // d, g * f
    by_image, by_row, by_column, _ = qkv.stride()
    shape = {"HEADS": heads, "D": d, "UPCAST": INTERPRETING}
    rows = torch.empty(images * heads, g, tokens, dtype=qkv.dtype, device=qkv.device)
    columns = torch.empty(images * heads, tokens, f, dtype=qkv.dtype, device=qkv.device)
    position_terms[(images * heads * g,)](
        *(qkv, rel_pos_h, rows, by_image, by_row, by_column),
        **shape,
        **{"LINES": g, "TOKENS": f, "LINE_OUT": f, "TOKEN_OUT": 1, "TERM_OUT": tokens},
        **term_blocks(g, f, d),
    )
    position_terms[(images * heads * f,)](
        *(qkv, rel_pos_w, columns, by_image, by_column, by_row),
        **shape,
        **{"LINES": f, "TOKENS": g, "LINE_OUT": f, "TOKEN_OUT": f * f, "TERM_OUT": 1},
        **term_blocks(f, g, d),
    )
    blocks = configuration("sam_attention", "global", f"{g}x{f} d{d}", global_blocks(tokens, f, d, qkv.dtype), qkv)
    global_attention[(images * heads * triton.cdiv(tokens, blocks["BLOCK_M"]),)](
        *(qkv, rows, columns, y, by_image, by_row, by_column, math.log2(math.e) * d**-0.5),
        **shape,
        GRID_H=g,
        GRID_W=f,
        **blocks,
    )


def _attend_windows(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None, window: int, y: Tensor
) -> None:
    """Fill y, window by window."""
    images, g, f, c = y.shape
    d = rel_pos_h.shape[1]
    # Without padding the bias is never read; a pointer it must be.
    bias = qkv.new_empty(0) if qkv_bias is None else qkv_bias.contiguous()
    default = window_blocks(window, d, qkv.dtype)
    blocks = configuration("sam_attention", "window", f"{window} of {g}x{f} d{d}", default, qkv)
    num_windows = images * triton.cdiv(g, window) * triton.cdiv(f, window)
    window_attention[(num_windows * (c // d) * triton.cdiv(window, blocks["ROWS"]),)](
        *(qkv, bias, rel_pos_h, rel_pos_w, y, *qkv.stride()[:3], g, f, math.log2(math.e) * d**-0.5),
        HEADS=c // d,
        D=d,
        SIDE=window,
        UPCAST=INTERPRETING,
        **blocks,
    )


@_sam_attention.register_fake
def _(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None, window: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)


@torch.library.custom_op("megavl::sam_attention_backward", mutates_args=())
def _sam_attention_backward(
    dy: Tensor, qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dqkv, drel_pos_h, drel_pos_w, dqkv_bias or [0])."""
    if not dy.numel():
        dbias = qkv.new_empty(0) if qkv_bias is None else torch.zeros_like(qkv_bias)
        return qkv.new_empty(qkv.shape), torch.zeros_like(rel_pos_h), torch.zeros_like(rel_pos_w), dbias
    return sam_attention_gradients(dy, qkv, rel_pos_h, rel_pos_w, qkv_bias, window)


@_sam_attention_backward.register_fake
def _(
    dy: Tensor, qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = qkv.new_empty(0) if qkv_bias is None else qkv_bias.new_empty(qkv_bias.shape)
    dh, dw = (table.new_empty(table.shape) for table in (rel_pos_h, rel_pos_w))
    return qkv.new_empty(qkv.shape), dh, dw, dbias


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.window = inputs
    ctx.has_bias = tensors[-1] is not None
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _backward(ctx, dy: Tensor):
    tensors = ctx.saved_tensors if ctx.has_bias else (*ctx.saved_tensors, None)
    dqkv, dh, dw, dbias = _sam_attention_backward(dy, *tensors, ctx.window)
    return dqkv, dh, dw, dbias if ctx.has_bias else None, None


_sam_attention.register_autograd(_backward, setup_context=_setup_context)
