"""Image features into the embedded tokens: one pass forward, a gather backward.

index      index[slots[j] - start] = j where that row is here, -1 in all other rows (filled beforehand)
forward    y[r] = features[index[r]] if index[r] >= 0 else embedded[r]
backward   dembedded[r] = 0 if index[r] >= 0 else dy[r];  dfeatures[j] = dy[slots[j] - start] if that row is here else 0

A program copies BLOCK columns of one row. Which row it reads is decided on the device, so the host waits for nothing.
"""

import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant

BLOCK = 2048
"""Columns of a program: with 4 warps each thread moves two times 16 bytes of bf16."""
INDEX_BLOCK = 256
"""Features of a program that builds the index."""


@triton.jit
def index_rows(
    p_slots,  # [n] positions in the stream, int64
    p_index,  # [rows] feature of each row, int32; -1 before
    start,
    rows,
    n,
    BLOCK: tl.constexpr,
):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_row = tl.load(p_slots + o_n, mask=o_n < n, other=-1) - start  # [BLOCK]
    tl.store(p_index + b_row, o_n, mask=(o_n < n) & (b_row >= 0) & (b_row < rows))


@triton.jit
def scatter_forward(
    p_embedded,  # [rows, h] text, rows embedded_stride apart
    p_features,  # [n, h] images, rows features_stride apart
    p_index,  # [rows] feature of each row, -1 for text
    p_y,  # [rows, h] output
    embedded_stride,
    features_stride,
    h,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i_feature = tl.load(p_index + i_row).to(tl.int64)
    # A bound instead of a second mask: the interpreter of triton 3.9 would make the joined mask int32 and refuse it.
    m_image = o_h < tl.where(i_feature >= 0, h, 0)
    m_text = o_h < tl.where(i_feature >= 0, 0, h)
    # A load that is masked off as a whole moves nothing: each row is read from one of the two.
    b_image = tl.load(p_features + i_feature * features_stride + o_h, mask=m_image, other=0.0)  # [BLOCK]
    b_text = tl.load(p_embedded + i_row * embedded_stride + o_h, mask=m_text, other=0.0)  # [BLOCK]
    b_y = tl.where(i_feature >= 0, b_image.to(p_y.dtype.element_ty), b_text)
    tl.store(p_y + i_row * h + o_h, b_y, mask=o_h < h)


@triton.jit
def scatter_backward_embedded(
    p_dy,  # [rows, h] gradient of the output, rows dy_stride apart
    p_index,  # [rows] feature of each row, -1 for text
    p_dx,  # [rows, h] gradient of the text
    dy_stride,
    h,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_text = o_h < tl.where(tl.load(p_index + i_row) >= 0, 0, h)
    b_dy = tl.load(p_dy + i_row * dy_stride + o_h, mask=m_text, other=0.0)  # [BLOCK]
    tl.store(p_dx + i_row * h + o_h, b_dy, mask=o_h < h)


@triton.jit
def scatter_backward_features(
    p_dy,  # [rows, h] gradient of the output, rows dy_stride apart
    p_slots,  # [n] positions in the stream, int64
    p_dx,  # [n, h] gradient of the features
    dy_stride,
    start,
    rows,
    h,
    BLOCK: tl.constexpr,
):
    i_feature = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i_row = tl.load(p_slots + i_feature) - start
    m_here = o_h < tl.where((i_row >= 0) & (i_row < rows), h, 0)
    b_dy = tl.load(p_dy + i_row * dy_stride + o_h, mask=m_here, other=0.0)  # [BLOCK]
    tl.store(p_dx + i_feature * h + o_h, b_dy.to(p_dx.dtype.element_ty), mask=o_h < h)


def variants() -> list[Variant]:
    """bf16; the hidden sizes of both releases are multiples of 16, as Triton is told."""
    expected = {80: ("LDG.E.128", "STG.E.128"), 90: ("LDG.E.128", "STG.E.128")}
    rows, text = {"p_dy": "*bf16", "p_index": "*i32", "p_dx": "*bf16"}, {"dy_stride": "i32", "h": "i32"}
    kernels = {
        "forward": (
            scatter_forward,
            {"p_embedded": "*bf16", "p_features": "*bf16", "p_index": "*i32", "p_y": "*bf16"},
            {"embedded_stride": "i32", "features_stride": "i32", "h": "i32"},
        ),
        "backward embedded": (scatter_backward_embedded, rows, text),
        "backward features": (
            scatter_backward_features,
            {"p_dy": "*bf16", "p_slots": "*i64", "p_dx": "*bf16"},
            {"dy_stride": "i32", "start": "i32", "rows": "i32", "h": "i32"},
        ),
    }
    moving = [
        Variant(
            op="image_scatter",
            name=name,
            kernel=kernel,
            arguments={**tensors, **sizes},
            constants={"BLOCK": BLOCK},
            unaligned=("start", "rows"),
            expects=expected,
        )
        for name, (kernel, tensors, sizes) in kernels.items()
    ]
    index = Variant(
        op="image_scatter",
        name="index",
        kernel=index_rows,
        arguments={"p_slots": "*i64", "p_index": "*i32", "start": "i32", "rows": "i32", "n": "i32"},
        constants={"BLOCK": INDEX_BLOCK},
        unaligned=("start", "rows", "n"),
    )
    return [index, *moving]
