"""SwiGLU forward and backward, one pass over memory each.

forward    s = sigmoid(gate),  a = gate * s,  y = a * up
backward   dup = dy * a,  dgate = dy * up * s * (1 + gate * (1 - s));  s and a are computed again, not stored

A program takes BLOCK columns of one row; gate and up are halves of one row of 2*f values.
"""

import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant

BLOCK = 1024
"""Columns of a program: with 4 warps each thread moves 16 bytes of bf16 at a time."""
DEFAULT = {"BLOCK": BLOCK, "num_warps": 4}


@triton.jit
def swiglu_forward(
    p_x,  # [rows, 2f] gate and up, rows x_stride apart
    p_y,  # [rows, f] output
    x_stride,
    f,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < f
    b_gate = tl.load(p_x + i_row * x_stride + o_f, mask=m_f, other=0.0).to(tl.float32)  # [BLOCK]
    b_up = tl.load(p_x + i_row * x_stride + f + o_f, mask=m_f, other=0.0).to(tl.float32)  # [BLOCK]
    b_act = (b_gate * tl.sigmoid(b_gate)).to(p_y.dtype.element_ty).to(tl.float32)  # rounded as PyTorch does
    tl.store(p_y + i_row * f + o_f, (b_act * b_up).to(p_y.dtype.element_ty), mask=m_f)


@triton.jit
def swiglu_backward(
    p_dy,  # [rows, f] gradient of the output, rows dy_stride apart
    p_x,  # [rows, 2f] gate and up, rows x_stride apart
    p_dx,  # [rows, 2f] gradients of gate and up
    dy_stride,
    x_stride,
    f,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < f
    b_gate = tl.load(p_x + i_row * x_stride + o_f, mask=m_f, other=0.0).to(tl.float32)  # [BLOCK]
    b_up = tl.load(p_x + i_row * x_stride + f + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + i_row * dy_stride + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_gate)
    b_dgate = b_dy * b_up * b_s * (1.0 + b_gate * (1.0 - b_s))
    b_dup = b_dy * b_gate * b_s
    tl.store(p_dx + i_row * 2 * f + o_f, b_dgate.to(p_dx.dtype.element_ty), mask=m_f)
    tl.store(p_dx + i_row * 2 * f + f + o_f, b_dup.to(p_dx.dtype.element_ty), mask=m_f)


_TRIES = ({"BLOCK": 2048, "num_warps": 8}, {"BLOCK": 2048}, {"BLOCK": 4096, "num_warps": 8}, {"BLOCK": 512})


def variants() -> list[Variant]:
    """bf16; f of both released sizes is a multiple of 16, as Triton is told."""
    wide = {80: ("LDG.E.128", "STG.E.128"), 90: ("LDG.E.128", "STG.E.128")}
    constants = {"BLOCK": BLOCK}
    return [
        Variant(
            op="swiglu",
            name="forward any f",
            kernel=swiglu_forward,
            arguments={"p_x": "*bf16", "p_y": "*bf16", "x_stride": "i32", "f": "i32"},
            constants=constants,
            expects=wide,
            tries=_TRIES,
            measured_by=("7b mb8", "forward"),
        ),
        Variant(
            op="swiglu",
            name="backward any f",
            kernel=swiglu_backward,
            arguments={
                **{"p_dy": "*bf16", "p_x": "*bf16", "p_dx": "*bf16"},
                **{"dy_stride": "i32", "x_stride": "i32", "f": "i32"},
            },
            constants=constants,
            expects=wide,
            tries=_TRIES,
            measured_by=("7b mb8", "backward"),
        ),
    ]
