"""Bilinear interpolation (align_corners=False, no antialiasing) of channels-last maps, forward and backward.

Along each axis with S samples in and T out, output o lies at ((2o + 1) S - T) / 2T, clamped to [0, S - 1]:

    u = clamp((2o + 1) S - T, 0, 2T (S - 1)),  l = u div 2T,  f = (u mod 2T) / 2T
    out[o] = (1 - f) in[l] + f in[min(l + 1, S - 1)]

All of it but the division is integer arithmetic: weights are exact to one rounding (1/6, 1/2 and 5/6 for 64 -> 96).

Backward is a gather: input s sums the outputs that lie less than one sample away, with weight 1 - |u - 2T s| / 2T.
There are at most ceil(2T / S) of them in a row, from floor((T (2s - 1) - S) / 2S) + 1 on. No atomics, equal bits in
every run. A program takes BLOCK_P pixels with BLOCK_C adjacent channels each.
"""

import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant

TILE = 2048
"""Values of a program: with 4 warps each thread moves two times 16 bytes of bf16 per tap."""
MAX_BLOCK_C = 256
"""Channels of a program; the neck of SAM has 256."""


@triton.jit
def place_of_output(o_t, S: tl.constexpr, T: tl.constexpr):
    """Along an axis: the lower of the two samples that output o_t lies between, and the weight of the upper, fp32."""
    u = tl.minimum(tl.maximum((2 * o_t + 1) * S - T, 0), 2 * T * (S - 1))
    o_low = u // (2 * T)
    return o_low, (u - o_low * 2 * T).to(tl.float32) / (2.0 * T)


@triton.jit
def interpolate_forward(
    p_x,  # [i, S_Y, S_X, c] input, channels adjacent
    p_y,  # [i, T_Y, T_X, c] output
    by_image,
    by_row,
    by_column,
    pixels,  # i * T_Y * T_X
    c,
    S_Y: tl.constexpr,
    S_X: tl.constexpr,
    T_Y: tl.constexpr,
    T_X: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (o_p < pixels)[:, None] & (o_c < c)[None, :]  # [BLOCK_P, BLOCK_C]
    y_low, f_y = place_of_output(o_p // T_X % T_Y, S_Y, T_Y)  # [BLOCK_P]
    x_low, f_x = place_of_output(o_p % T_X, S_X, T_X)
    f_y, f_x = f_y[:, None], f_x[:, None]
    p_image = p_x + (o_p // (T_X * T_Y) * by_image)[:, None] + o_c[None, :]  # [BLOCK_P, BLOCK_C]
    p_low = p_image + (y_low * by_row)[:, None]
    p_high = p_image + (tl.minimum(y_low + 1, S_Y - 1) * by_row)[:, None]
    o_left = (x_low * by_column)[:, None]
    o_right = (tl.minimum(x_low + 1, S_X - 1) * by_column)[:, None]
    b_low_left = tl.load(p_low + o_left, mask=m, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
    b_low_right = tl.load(p_low + o_right, mask=m, other=0.0).to(tl.float32)
    b_high_left = tl.load(p_high + o_left, mask=m, other=0.0).to(tl.float32)
    b_high_right = tl.load(p_high + o_right, mask=m, other=0.0).to(tl.float32)
    b_low = (1.0 - f_x) * b_low_left + f_x * b_low_right
    b_high = (1.0 - f_x) * b_high_left + f_x * b_high_right
    b_y = (1.0 - f_y) * b_low + f_y * b_high
    tl.store(p_y + (o_p * c)[:, None] + o_c[None, :], b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def first_output(o_s, S: tl.constexpr, T: tl.constexpr):
    """First output along an axis that input o_s has a part in."""
    u = T * (2 * o_s - 1) - S
    return tl.where(u < 0, 0, tl.maximum(u, 0) // (2 * S) + 1)


@triton.jit
def weight_of_input(o_t, o_s, S: tl.constexpr, T: tl.constexpr):
    """Weight of input o_s in output o_t along an axis, fp32; 0 where there is no such output."""
    u = tl.minimum(tl.maximum((2 * o_t + 1) * S - T, 0), 2 * T * (S - 1))
    near = tl.maximum(2 * T - tl.abs(u - 2 * T * o_s), 0).to(tl.float32) / (2.0 * T)
    return tl.where(o_t < T, near, 0.0)


@triton.jit
def interpolate_backward(
    p_dy,  # [i, T_Y, T_X, c] gradient of the output, channels adjacent
    p_dx,  # [i, S_Y, S_X, c] gradient of the input
    by_image,
    by_row,
    by_column,
    pixels,  # i * S_Y * S_X
    c,
    S_Y: tl.constexpr,
    S_X: tl.constexpr,
    T_Y: tl.constexpr,
    T_X: tl.constexpr,
    TAPS_Y: tl.constexpr,  # most outputs that one input has a part in
    TAPS_X: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_p = o_p < pixels
    m_c = (o_c < c)[None, :]
    o_y = o_p // S_X % S_Y
    o_x = o_p % S_X
    first_y = first_output(o_y, S_Y, T_Y)
    first_x = first_output(o_x, S_X, T_X)
    p_image = p_dy + (o_p // (S_X * S_Y) * by_image)[:, None] + o_c[None, :]  # [BLOCK_P, BLOCK_C]
    b_dx = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for i_y in range(TAPS_Y):
        f_y = weight_of_input(first_y + i_y, o_y, S_Y, T_Y)
        for i_x in range(TAPS_X):
            f = f_y * weight_of_input(first_x + i_x, o_x, S_X, T_X)  # [BLOCK_P]
            o_dy = (first_y + i_y) * by_row + (first_x + i_x) * by_column
            # The weight also is the mask: outputs that do not exist have weight 0 and are not read.
            m = (m_p & (f > 0.0))[:, None] & m_c
            b_dx += f[:, None] * tl.load(p_image + o_dy[:, None], mask=m, other=0.0).to(tl.float32)
    tl.store(p_dx + (o_p * c)[:, None] + o_c[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_p[:, None] & m_c)


def blocks(c: int) -> dict[str, int]:
    """Pixels and channels of a program."""
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(c))
    return {"BLOCK_P": TILE // block_c, "BLOCK_C": block_c}


def taps(source: int, target: int) -> int:
    """Most outputs that one input has a part in, along an axis."""
    return -(-2 * target // source)


def variants() -> list[Variant]:
    """64 x 64 to 96 x 96 with 256 channels in bf16."""
    tensors = {"forward": ("p_x", "p_y"), "backward": ("p_dy", "p_dx")}
    kernels = {"forward": interpolate_forward, "backward": interpolate_backward}
    more = {"forward": {}, "backward": {"TAPS_Y": taps(64, 96), "TAPS_X": taps(64, 96)}}
    return [
        Variant(
            op="interpolate",
            name=f"{direction} 64 to 96 c256",
            kernel=kernel,
            arguments={
                **dict.fromkeys(tensors[direction], "*bf16"),
                **dict.fromkeys(("by_image", "by_row", "by_column", "pixels", "c"), "i32"),
            },
            constants={**{"S_Y": 64, "S_X": 64, "T_Y": 96, "T_X": 96}, **more[direction], **blocks(256)},
            unaligned=("pixels",),
            expects={80: ("LDG.E.128", "STG.E.128"), 90: ("LDG.E.128", "STG.E.128")},
        )
        for direction, kernel in kernels.items()
    ]
