"""Bias and exact GELU between the two matrix products of the adaptor, forward and backward.

With z = x + b, Phi(z) = (1 + erf(z / sqrt 2)) / 2 and phi(z) = exp(-z^2 / 2) / sqrt(2 pi):

forward    a = z Phi(z)
backward   dx = da (Phi(z) + z phi(z)), written over da;  a again, which the gradient of the next weight needs

cuBLASLt's GELU epilogue is the tanh form, and its bias epilogue wants a matrix of its own, not half of one: so the
product is written bare and one pass does the rest. x is all that is kept for the backward pass.
"""

import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant

BLOCK = 1024
"""Columns of a program: with 4 warps each thread moves 16 bytes of bf16 at a time."""


@triton.jit
def normal_distribution(z):
    """Phi(z), fp32."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def bias_gelu_forward(
    p_x,  # [rows, h] product without bias
    p_b,  # [h] bias
    p_a,  # [rows, h] output
    h,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < h
    b_z = tl.load(p_x + i_row * h + o_h, mask=m_h, other=0.0).to(tl.float32)  # [BLOCK]
    b_z += tl.load(p_b + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(p_a + i_row * h + o_h, (b_z * normal_distribution(b_z)).to(p_a.dtype.element_ty), mask=m_h)


@triton.jit
def bias_gelu_backward(
    p_da,  # [rows, h] gradient of the output; becomes that of x
    p_x,  # [rows, h] product without bias
    p_b,  # [h] bias
    p_a,  # [rows, h] output of the forward pass, again
    h,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < h
    b_z = tl.load(p_x + i_row * h + o_h, mask=m_h, other=0.0).to(tl.float32)  # [BLOCK]
    b_z += tl.load(p_b + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_da = tl.load(p_da + i_row * h + o_h, mask=m_h, other=0.0).to(tl.float32)  # [BLOCK]
    b_cdf = normal_distribution(b_z)
    b_pdf = 0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)
    tl.store(p_da + i_row * h + o_h, (b_da * (b_cdf + b_z * b_pdf)).to(p_da.dtype.element_ty), mask=m_h)
    tl.store(p_a + i_row * h + o_h, (b_z * b_cdf).to(p_a.dtype.element_ty), mask=m_h)


def variants() -> list[Variant]:
    """bf16; the hidden sizes of both releases are multiples of 16, as Triton is told."""
    kernels = {
        "bias gelu forward": (bias_gelu_forward, ("p_x", "p_b", "p_a")),
        "bias gelu backward": (bias_gelu_backward, ("p_da", "p_x", "p_b", "p_a")),
    }
    return [
        Variant(
            op="adaptor",
            name=name,
            kernel=kernel,
            arguments={**dict.fromkeys(tensors, "*bf16"), "h": "i32"},
            constants={"BLOCK": BLOCK},
            expects={80: ("LDG.E.128", "STG.E.128"), 90: ("LDG.E.128", "STG.E.128")},
        )
        for name, (kernel, tensors) in kernels.items()
    ]
