"""3x3 convolution with stride 2 over a map that is interpolated while it is loaded, as an implicit matrix product.

With up[p, c] the bilinear interpolation of x (interpolate/kernel.py) at pixel p of the larger map:

    y[o, k] = sum over taps (h, w) and channels c of up[2o - 1 + tap, c] W[k, tap, c]

Rows are output pixels, the inner dimension is (tap, c). Each value of `up` is computed in fp32 from four loads and
rounded to the type, as if it had been stored: the result is that of the two operators one after the other. It never is
in memory, which saves one pass of writing and reading it. The price: a pixel of the larger map is a part of up to four
outputs, and is computed again for each, so a program loads four values a tap (from the caches, mostly) where the plain
convolution loads one.
"""

import torch
import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant
from megavl.kernels.interpolate.kernel import place_of_output
from megavl.kernels.strided_conv.kernel import dot


@triton.jit
def interpolate_conv_forward(
    p_x,  # [i, S_Y, S_X, C] input, channels adjacent
    p_w,  # [K, 3, 3, C] weight
    p_y,  # [i, O_Y, O_X, K] output
    by_image,
    by_row,
    by_column,
    pixels,  # i * O_Y * O_X
    S_Y: tl.constexpr,
    S_X: tl.constexpr,
    T_Y: tl.constexpr,  # sides of the larger map
    T_X: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    O_Y: tl.constexpr = (T_Y + 1) // 2
    O_X: tl.constexpr = (T_X + 1) // 2
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_K)
    m_m = o_m < pixels
    p_image = p_x + ((o_m // (O_Y * O_X)).to(tl.int64) * by_image)[:, None]  # [BLOCK_M, 1]
    o_y = o_m // O_X % O_Y * 2 - 1
    o_x = o_m % O_X * 2 - 1
    b_y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_step in range(9 * STEPS):
        i_tap = i_step // STEPS
        o_inner = i_step % STEPS * BLOCK_K + o_c
        o_row = o_y + i_tap // 3
        o_column = o_x + i_tap % 3
        m_pixel = m_m & (o_row >= 0) & (o_row < T_Y) & (o_column >= 0) & (o_column < T_X)
        m = m_pixel[:, None] & (o_inner < C)[None, :]  # [BLOCK_M, BLOCK_K]
        o_low, f_y = place_of_output(o_row, S_Y, T_Y)  # [BLOCK_M]
        o_left, f_x = place_of_output(o_column, S_X, T_X)
        p_low = p_image + (o_low * by_row)[:, None] + o_inner[None, :]
        p_high = p_image + (tl.minimum(o_low + 1, S_Y - 1) * by_row)[:, None] + o_inner[None, :]
        by_left = (o_left * by_column)[:, None]
        by_right = (tl.minimum(o_left + 1, S_X - 1) * by_column)[:, None]
        f_y, f_x = f_y[:, None], f_x[:, None]
        b_low = (1.0 - f_x) * tl.load(p_low + by_left, mask=m, other=0.0).to(tl.float32)
        b_low += f_x * tl.load(p_low + by_right, mask=m, other=0.0).to(tl.float32)
        b_high = (1.0 - f_x) * tl.load(p_high + by_left, mask=m, other=0.0).to(tl.float32)
        b_high += f_x * tl.load(p_high + by_right, mask=m, other=0.0).to(tl.float32)
        b_up = ((1.0 - f_y) * b_low + f_y * b_high).to(p_x.dtype.element_ty)  # rounded as the stored map would be
        o_w = o_k[None, :] * (9 * C) + i_tap * C + o_inner[:, None]
        b_w = tl.load(p_w + o_w, mask=(o_inner < C)[:, None] & (o_k < K)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_y = dot(b_up, b_w, b_y, UPCAST)
    o_out = o_m.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m_m[:, None] & (o_k < K)[None, :])


def blocks(dtype: torch.dtype, k: int, c: int) -> dict[str, int]:
    """Tile of a program, warps and stages; from compiled code, not timed yet.

    Wide in k, so that few programs interpolate the same pixels; 64 channels a step instead of 32 cost twice the shared
    memory for the four tiles that are read (192 KiB with 128 x 128 outputs), and one block a multiprocessor.
    """
    if dtype is torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    block_n = min(256, max(16, triton.next_power_of_2(k)))
    block_k = min(32, max(16, triton.next_power_of_2(c)))
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}


def variants() -> list[Variant]:
    """64 x 64 to 96 x 96 with 256 channels, then to 48 x 48 with 512, in bf16."""
    tile = blocks(torch.bfloat16, 512, 256)
    options = {option: tile.pop(option) for option in ("num_warps", "num_stages")}
    sizes = {"S_Y": 64, "S_X": 64, "T_Y": 96, "T_X": 96, "C": 256, "K": 512}
    return [
        Variant(
            op="interpolate_conv",
            name="forward 64x64 to 96x96 c256 k512",
            kernel=interpolate_conv_forward,
            arguments={
                **dict.fromkeys(("p_x", "p_w", "p_y"), "*bf16"),
                **dict.fromkeys(("by_image", "by_row", "by_column", "pixels"), "i32"),
            },
            constants={**sizes, "UPCAST": False, **tile},
            unaligned=("pixels",),
            tries=(
                {"BLOCK_M": 128, "BLOCK_N": 128},
                {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4},
                {"BLOCK_M": 128, "num_stages": 2},
                {"num_stages": 2},
            ),
            measured_by=("images8", "forward"),
            expects={80: ("HMMA", "LDGSTS"), 90: ("HGMMA", "LDGSTS")},
            **options,
        )
    ]
