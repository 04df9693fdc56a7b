"""Cross-entropy over rows of logits that are cut over the vocabulary, in two kernels: an exchange lies between them.

statistics   per row and rank: m = max x,  l = sum exp(x - m),  c = x[target] where this rank owns it, else -inf
(exchange)   every rank gets the (m, l, c) of all ranks
gradient     M = max m,  L = sum l * exp(m - M),  C = max c
             loss = log L + (M - C),  x <- w * (exp(x - M) / L - [column is the target])

x - M instead of x - (M + log L): with logits around 1e4 the latter loses three digits in fp32. The exponentials are
computed twice rather than stored. A target that no rank owns has C = -inf and so an infinite loss, not a wrong one.
"""

import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant

BLOCK = 4096
"""Columns of a program's step: 16 values a thread. Not tuned on a GPU yet."""
WARPS = 8
DEFAULT = {"BLOCK": BLOCK, "num_warps": WARPS}


@triton.jit
def row_statistics(
    p_x,  # [rows, v] logits of this rank's columns, rows x_stride apart
    p_target,  # [rows] int64, in the whole vocabulary
    p_stats,  # [3, rows] fp32: maximum, sum of exponentials, target logit
    x_stride,
    rows,
    v,
    vocab_start,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_row * x_stride
    b_m = float("-inf")
    b_l = 0.0
    for i_v in range(0, v, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        b_x = tl.load(p_row + o_v, mask=o_v < v, other=float("-inf")).to(tl.float32)  # [BLOCK]
        b_new = tl.maximum(b_m, tl.max(b_x, axis=0))
        b_l = b_l * tl.exp(b_m - b_new) + tl.sum(tl.exp(b_x - b_new), axis=0)
        b_m = b_new
    o_target = tl.load(p_target + i_row) - vocab_start
    m_owned = (o_target >= 0) & (o_target < v)
    b_c = tl.load(p_row + o_target, mask=m_owned, other=float("-inf")).to(tl.float32)
    tl.store(p_stats + i_row, b_m)
    tl.store(p_stats + rows + i_row, b_l)
    tl.store(p_stats + 2 * rows + i_row, b_c)


@triton.jit
def loss_and_gradient(
    p_x,  # [rows, v] logits of this rank's columns, overwritten by their gradient
    p_target,  # [rows] int64, in the whole vocabulary
    p_w,  # [rows] fp32 weight of each row; 0: neither loss nor gradient
    p_stats,  # [ranks, 3, rows] fp32, from `row_statistics` of every rank
    p_loss,  # [rows] fp32, without the weight
    x_stride,
    rows,
    v,
    vocab_start,
    RANKS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_m = tl.load(p_stats + i_row)
    for i in range(1, RANKS):
        b_m = tl.maximum(b_m, tl.load(p_stats + 3 * i * rows + i_row))
    b_l = 0.0
    b_c = float("-inf")
    for i in range(RANKS):
        p_rank = p_stats + 3 * i * rows + i_row
        b_l += tl.load(p_rank + rows) * tl.exp(tl.load(p_rank) - b_m)
        b_c = tl.maximum(b_c, tl.load(p_rank + 2 * rows))
    b_w = tl.load(p_w + i_row)
    if i_block == 0:
        tl.store(p_loss + i_row, tl.where(b_w != 0.0, tl.log(b_l) + (b_m - b_c), 0.0))
    if GRADIENT:
        o_v = i_block * BLOCK + tl.arange(0, BLOCK)
        o_target = tl.load(p_target + i_row) - vocab_start
        p_row = p_x + i_row * x_stride
        b_x = tl.load(p_row + o_v, mask=o_v < v, other=float("-inf")).to(tl.float32)  # [BLOCK]
        b_g = tl.exp(b_x - b_m) * (1.0 / b_l) - tl.where(o_v == o_target, 1.0, 0.0)
        b_g = tl.where(b_w != 0.0, b_w * b_g, 0.0)  # also where a row that does not count is not finite
        tl.store(p_row + o_v, b_g.to(p_x.dtype.element_ty), mask=o_v < v)


_TRIES = ({"BLOCK": 8192, "num_warps": 16}, {"BLOCK": 8192}, {"BLOCK": 2048, "num_warps": 4}, {"num_warps": 16})


def variants() -> list[Variant]:
    """bf16, over 1, 2, 4 and 8 ranks; their shares of the vocabulary are multiples of 16, as Triton is told."""
    sizes = {"x_stride": "i32", "rows": "i32", "v": "i32", "vocab_start": "i32"}
    found = [
        Variant(
            op="linear_cross_entropy",
            name="statistics any v",
            kernel=row_statistics,
            arguments={"p_x": "*bf16", "p_target": "*i64", "p_stats": "*fp32", **sizes},
            constants={"BLOCK": BLOCK},
            num_warps=WARPS,
            unaligned=("rows",),
            expects={80: ("LDG.E.128",), 90: ("LDG.E.128",)},
            tries=_TRIES,
            measured_by=("7b", "forward+backward"),
        )
    ]
    for ranks in (1, 2, 4, 8):
        tensors = {"p_x": "*bf16", "p_target": "*i64", "p_w": "*fp32", "p_stats": "*fp32", "p_loss": "*fp32"}
        found.append(
            Variant(
                op="linear_cross_entropy",
                name=f"gradient ranks {ranks}",
                kernel=loss_and_gradient,
                arguments={**tensors, **sizes},
                constants={"RANKS": ranks, "GRADIENT": True, "BLOCK": BLOCK},
                num_warps=WARPS,
                unaligned=("rows",),
                expects={80: ("LDG.E.128", "STG.E.128"), 90: ("LDG.E.128", "STG.E.128")},
                tries=_TRIES if ranks == 1 else (),
                measured_by=("7b", "forward+backward"),
            )
        )
    return found
