"""RMSNorm forward and backward.

forward    r = rsqrt(mean(x^2) + eps),  n = x * r,  y = w * n
backward   g = dy * w,  dx = r * (g - n * mean(g * n)),  dw = sum over rows of dy * n

Forward: one row per program. Backward: a fixed number of programs walk over the rows and keep their part of dw in
registers; the parts are summed afterwards, in a fixed order, without atomics: equal bits in every run.
"""

import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant


@triton.jit
def rms_norm_forward(
    p_x,  # [rows, H] input, rows x_stride apart
    p_w,  # [H] weight
    p_y,  # [rows, H] output
    p_r,  # [rows] 1 / root mean square, fp32, for the backward pass
    x_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    b_x = tl.load(p_x + i_row * x_stride + o_h, mask=m_h, other=0.0).to(tl.float32)  # [BLOCK]
    b_w = tl.load(p_w + o_h, mask=m_h, other=0.0).to(tl.float32)  # [BLOCK]
    b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / H + eps)
    b_n = (b_x * b_r).to(p_y.dtype.element_ty).to(tl.float32)  # LLaMA rounds before the weight
    tl.store(p_r + i_row, b_r)
    tl.store(p_y + i_row * H + o_h, (b_n * b_w).to(p_y.dtype.element_ty), mask=m_h)


@triton.jit
def rms_norm_backward(
    p_dy,  # [rows, H] gradient of the output, rows dy_stride apart
    p_x,  # [rows, H] input, rows x_stride apart
    p_w,  # [H] weight
    p_r,  # [rows] from the forward pass
    p_dx,  # [rows, H] gradient of the input
    p_dw,  # [programs, H] parts of the weight's gradient, fp32
    dy_stride,
    x_stride,
    rows,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    b_w = tl.load(p_w + o_h, mask=m_h, other=0.0).to(tl.float32)  # [BLOCK]
    b_dw = tl.zeros([BLOCK], dtype=tl.float32)
    for i_row in range(i_program, rows, tl.num_programs(0)):
        b_x = tl.load(p_x + i_row * x_stride + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + i_row * dy_stride + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_r = tl.load(p_r + i_row)
        b_n = b_x * b_r
        b_g = b_dy * b_w
        b_dx = b_r * (b_g - b_n * (tl.sum(b_g * b_n, axis=0) / H))
        b_dw += b_dy * b_n
        tl.store(p_dx + i_row * H + o_h, b_dx.to(p_dx.dtype.element_ty), mask=m_h)
    tl.store(p_dw + i_program * H + o_h, b_dw, mask=m_h)


def block_and_warps(hidden: int) -> dict[str, int]:
    """Columns of a program's block, and warps that share it: 16 values a thread, 4 to 16 warps."""
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def variants() -> list[Variant]:
    """The decoder widths of the 1.3B and the 7B in bf16."""
    found = []
    for hidden in (2048, 4096):
        options = block_and_warps(hidden)
        constants, warps = {"H": hidden, "BLOCK": options["BLOCK"]}, options["num_warps"]
        wide = ("LDG.E.128", "STG.E.128")
        found.append(
            Variant(
                op="rmsnorm",
                name=f"forward h{hidden}",
                kernel=rms_norm_forward,
                arguments={
                    "p_x": "*bf16",
                    "p_w": "*bf16",
                    "p_y": "*bf16",
                    "p_r": "*fp32",
                    "x_stride": "i32",
                    "eps": "fp32",
                },
                constants=constants,
                num_warps=warps,
                expects={80: wide, 90: wide},
                tries=({"num_warps": warps // 2}, {"num_warps": 2 * warps}),
                measured_by=(f"mb8 rows32768 h{hidden}", "forward"),
            )
        )
        tensors = {"p_dy": "*bf16", "p_x": "*bf16", "p_w": "*bf16", "p_r": "*fp32", "p_dx": "*bf16", "p_dw": "*fp32"}
        found.append(
            Variant(
                op="rmsnorm",
                name=f"backward h{hidden}",
                kernel=rms_norm_backward,
                arguments={**tensors, "dy_stride": "i32", "x_stride": "i32", "rows": "i32"},
                constants=constants,
                num_warps=warps,
                unaligned=("rows",),
                expects={80: wide, 90: wide},
                tries=({"num_warps": warps // 2}, {"num_warps": 2 * warps}),
                measured_by=(f"mb8 rows32768 h{hidden}", "backward"),
            )
        )
    return found
