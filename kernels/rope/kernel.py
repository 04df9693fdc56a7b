"""Rotary position embedding: every pair (x, y) = (heads[j], heads[j + d/2]) turns by its token's angle.

forward    x' = x cos - y sin,  y' = y cos + x sin
backward   the same with -sin

A program turns heads of one token. Angles come per token, so positions that restart with every document need nothing
more here.
"""

import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant


@triton.jit
def rotate_pairs(
    p_x,  # [t, n, 2*HALF] input, by strides; adjacent along the last
    p_cos,  # [t, HALF] fp32
    p_sin,  # [t, HALF] fp32
    p_y,  # [t, n, 2*HALF] output, contiguous
    token_stride,
    head_stride,
    n,
    sign,  # 1.0 forward, -1.0 backward
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HALF
    m_x = (o_n < n)[:, None] & m_d[None, :]  # [BLOCK_N, BLOCK_D]
    b_cos = tl.load(p_cos + i_token * HALF + o_d, mask=m_d, other=0.0)[None, :]  # [1, BLOCK_D]
    b_sin = tl.load(p_sin + i_token * HALF + o_d, mask=m_d, other=0.0)[None, :] * sign
    o_x = i_token * token_stride + o_n.to(tl.int64)[:, None] * head_stride + o_d[None, :]
    b_first = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    b_second = tl.load(p_x + o_x + HALF, mask=m_x, other=0.0).to(tl.float32)
    o_y = (i_token * n + o_n[:, None]) * 2 * HALF + o_d[None, :]
    tl.store(p_y + o_y, (b_first * b_cos - b_second * b_sin).to(p_y.dtype.element_ty), mask=m_x)
    tl.store(p_y + o_y + HALF, (b_second * b_cos + b_first * b_sin).to(p_y.dtype.element_ty), mask=m_x)


def blocks(heads: int, half: int) -> tuple[int, int]:
    """(heads, pairs) of a program: at most 2048 pairs in registers, 16 per thread with 4 warps."""
    block_d = triton.next_power_of_2(half)
    return min(triton.next_power_of_2(heads), max(1, 2048 // block_d)), block_d


def variants() -> list[Variant]:
    """Both released sizes in bf16: 16 or 32 heads of 128."""
    found = []
    for heads in (16, 32):
        block_n, block_d = blocks(heads, 64)
        found.append(
            Variant(
                op="rope",
                name=f"heads {heads} x 128",
                kernel=rotate_pairs,
                arguments={
                    **{"p_x": "*bf16", "p_cos": "*fp32", "p_sin": "*fp32", "p_y": "*bf16"},
                    **{"token_stride": "i32", "head_stride": "i32", "n": "i32", "sign": "fp32"},
                },
                constants={"HALF": 64, "BLOCK_N": block_n, "BLOCK_D": block_d},
                expects={80: ("LDG.E.128", "STG.E.128"), 90: ("LDG.E.128", "STG.E.128")},
            )
        )
    return found
