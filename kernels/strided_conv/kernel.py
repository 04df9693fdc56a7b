"""3x3 convolution with stride 2 and padding 1 on channels-last maps, as implicit matrix products.

With y[o, k] = sum over taps (h, w) and channels c of x[2o - 1 + tap, c] W[k, tap, c], o an output pixel:

forward    rows are output pixels, the inner dimension is (tap, c)
dx         an input row 2a has only tap h = 1 (o = a); 2a + 1 has h = 0 (o = a + 1) and h = 2 (o = a); columns alike.
           Pixels of equal parity share their 1, 2, 2 or 4 taps: four dense products and none with zeros
dW         rows are k, columns c, per tap; the inner dimension, all pixels, is split over programs, whose fp32 parts
           are added afterwards in a fixed order: no atomics, equal bits in every run

Weights are read as [k, 3, 3, c]. Taps outside the map read zero.
"""

import torch
import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant


@triton.jit
def dot(b_a, b_b, b_sum, UPCAST: tl.constexpr):
    """b_sum + b_a @ b_b in fp32. UPCAST: Triton's interpreter is only right in fp32."""
    if UPCAST:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision="ieee")


@triton.jit
def conv_forward(
    p_x,  # [i, Y, X, C] input, channels adjacent
    p_w,  # [K, 3, 3, C] weight
    p_y,  # [i, O_Y, O_X, K] output
    by_image,
    by_row,
    by_column,
    pixels,  # i * O_Y * O_X
    Y: tl.constexpr,
    X: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    O_Y: tl.constexpr = (Y + 1) // 2
    O_X: tl.constexpr = (X + 1) // 2
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_K)
    m_m = o_m < pixels
    i_image = (o_m // (O_Y * O_X)).to(tl.int64)
    o_y = o_m // O_X % O_Y * 2 - 1
    o_x = o_m % O_X * 2 - 1
    b_y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_step in range(9 * STEPS):
        i_tap = i_step // STEPS
        o_inner = i_step % STEPS * BLOCK_K + o_c
        o_row = o_y + i_tap // 3
        o_column = o_x + i_tap % 3
        m_pixel = m_m & (o_row >= 0) & (o_row < Y) & (o_column >= 0) & (o_column < X)
        o_pixel = i_image * by_image + o_row * by_row + o_column * by_column
        m_c = o_inner < C
        b_x = tl.load(p_x + o_pixel[:, None] + o_inner[None, :], mask=m_pixel[:, None] & m_c[None, :], other=0.0)
        o_w = o_k[None, :] * (9 * C) + i_tap * C + o_inner[:, None]
        b_w = tl.load(p_w + o_w, mask=m_c[:, None] & (o_k < K)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_y = dot(b_x, b_w, b_y, UPCAST)
    o_out = o_m.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m_m[:, None] & (o_k < K)[None, :])


@triton.jit
def conv_backward_input(
    p_dy,  # [i, O_Y, O_X, K] gradient of the output, channels adjacent
    p_w,  # [K, 3, 3, C] weight
    p_dx,  # [i, Y, X, C] gradient of the input
    by_image,
    by_row,
    by_column,
    pixels,  # of this parity, i * M_Y * M_X
    Y: tl.constexpr,
    X: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ODD_Y: tl.constexpr,
    ODD_X: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    O_Y: tl.constexpr = (Y + 1) // 2
    O_X: tl.constexpr = (X + 1) // 2
    M_Y: tl.constexpr = (Y + 1 - ODD_Y) // 2
    M_X: tl.constexpr = (X + 1 - ODD_X) // 2
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < pixels
    i_image = (o_m // (M_Y * M_X)).to(tl.int64)
    a_y = o_m // M_X % M_Y
    a_x = o_m % M_X
    b_dx = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_step in range((1 + ODD_Y) * (1 + ODD_X) * STEPS):
        i_tap = i_step // STEPS
        i_y = i_tap // (1 + ODD_X)  # odd rows: 0 is the output above (tap 2), 1 the one below (tap 0)
        i_x = i_tap % (1 + ODD_X)
        i_weight = (1 + ODD_Y - 2 * i_y) * 3 + 1 + ODD_X - 2 * i_x
        o_inner = i_step % STEPS * BLOCK_K + o_k
        o_row = a_y + i_y
        o_column = a_x + i_x
        m_pixel = m_m & (o_row < O_Y) & (o_column < O_X)
        o_pixel = i_image * by_image + o_row * by_row + o_column * by_column
        m_k = o_inner < K
        b_dy = tl.load(p_dy + o_pixel[:, None] + o_inner[None, :], mask=m_pixel[:, None] & m_k[None, :], other=0.0)
        o_w = o_inner[:, None] * (9 * C) + i_weight * C + o_c[None, :]
        b_w = tl.load(p_w + o_w, mask=m_k[:, None] & (o_c < C)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_dx = dot(b_dy, b_w, b_dx, UPCAST)
    o_out = ((i_image * Y + 2 * a_y + ODD_Y) * X + 2 * a_x + ODD_X)[:, None] * C + o_c[None, :]
    tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=m_m[:, None] & (o_c < C)[None, :])


@triton.jit
def conv_backward_weight(
    p_dy,  # [i * O_Y * O_X, K] gradient of the output, contiguous
    p_x,  # [i, Y, X, C] input, channels adjacent
    p_dw,  # [splits, K, 9, C] parts of the weight's gradient, fp32
    by_image,
    by_row,
    by_column,
    pixels,  # i * O_Y * O_X
    per_split,  # pixels of a split, a multiple of BLOCK_K
    Y: tl.constexpr,
    X: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    O_Y: tl.constexpr = (Y + 1) // 2
    O_X: tl.constexpr = (X + 1) // 2
    TILES_K: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M
    i_split = tl.program_id(2).to(tl.int64)
    i_tap = tl.program_id(1)
    o_k = tl.program_id(0) % TILES_K * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(0) // TILES_K * BLOCK_N + tl.arange(0, BLOCK_N)
    b_dw = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_step in range(0, per_split, BLOCK_K):
        o_m = i_split * per_split + i_step + tl.arange(0, BLOCK_K)
        m_m = o_m < pixels
        b_dy = tl.load(p_dy + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
        o_row = o_m // O_X % O_Y * 2 - 1 + i_tap // 3
        o_column = o_m % O_X * 2 - 1 + i_tap % 3
        m_pixel = m_m & (o_row >= 0) & (o_row < Y) & (o_column >= 0) & (o_column < X)
        o_pixel = o_m // (O_Y * O_X) * by_image + o_row * by_row + o_column * by_column
        m_x = m_pixel[:, None] & (o_c < C)[None, :]
        b_x = tl.load(p_x + o_pixel[:, None] + o_c[None, :], mask=m_x, other=0.0)  # [BLOCK_K, BLOCK_N]
        b_dw = dot(tl.trans(b_dy), b_x, b_dw, UPCAST)
    o_out = ((i_split * K + o_k) * 9 + i_tap)[:, None] * C + o_c[None, :]
    tl.store(p_dw + o_out, b_dw, mask=(o_k < K)[:, None] & (o_c < C)[None, :])


def blocks(dtype: torch.dtype, columns: int, inner: int, stages: int = 4) -> dict[str, int]:
    """Tile of a program, warps and stages. fp32 products run on the plain cores: smaller tiles, fewer registers."""
    if dtype is torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    block_n = min(128, max(16, triton.next_power_of_2(columns)))
    block_k = min(64, max(16, triton.next_power_of_2(inner)))
    return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8, "num_stages": stages}


_TRIES = (
    {"BLOCK_M": 64, "num_warps": 4},
    {"BLOCK_M": 64, "BLOCK_N": 256},
    {"BLOCK_N": 256, "num_stages": 3},
    {"num_stages": 3},
)
"""Fewer rows where the grid does not fill the card, wider columns where it does."""


def variants() -> list[Variant]:
    """Both convolutions of the released 7B in bf16: 96 x 96 x 256 to 512, then 48 x 48 to 1024.

    Of the four parities the one without and the one with all taps; the others differ in the number of steps alone.
    """
    tensors = {
        conv_forward: ("p_x", "p_w", "p_y"),
        conv_backward_input: ("p_dy", "p_w", "p_dx"),
        conv_backward_weight: ("p_dy", "p_x", "p_dw"),
    }
    products = {80: ("HMMA", "LDGSTS"), 90: ("HGMMA", "LDGSTS")}
    found = []
    for side, c, k in ((96, 256, 512), (48, 512, 1024)):
        classes = [(f"dx parity {y}{x}", conv_backward_input, {"ODD_Y": y, "ODD_X": x}) for y, x in ((0, 0), (1, 1))]
        for what, kernel, more in [("forward", conv_forward, {}), *classes, ("dw", conv_backward_weight, {})]:
            tile = blocks(torch.bfloat16, 128, 64)
            options = {option: tile.pop(option) for option in ("num_warps", "num_stages")}
            sizes = ("by_image", "by_row", "by_column", "pixels", *(("per_split",) if what == "dw" else ()))
            types = {**dict.fromkeys(tensors[kernel], "*bf16"), **dict.fromkeys(sizes, "i32")}
            found.append(
                Variant(
                    op="strided_conv",
                    name=f"{what} {side}x{side} c{c} k{k}",
                    kernel=kernel,
                    arguments={**types, **({"p_dw": "*fp32"} if what == "dw" else {})},
                    constants={"Y": side, "X": side, "C": c, "K": k, **more, "UPCAST": False, **tile},
                    unaligned=("pixels",),
                    expects=products,
                    tries=_TRIES,
                    measured_by=(f"images8 side{side}", "forward" if what == "forward" else "backward"),
                    **options,
                )
            )
    return found
