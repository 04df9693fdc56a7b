"""Rotary position embedding as a differentiable operator. Shapes: t tokens, n heads, d head size."""

import torch
import triton
from torch import Tensor

from megavl.kernels.launch import check_tensor
from megavl.kernels.rope.kernel import blocks, rotate_pairs

MAX_HEAD_SIZE = 512
"""A head's pairs share one program."""


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + d/2) of each head by the angles of its token; differentiable in `heads`.

    Args:
        heads: [t, n, d], fp32, fp16 or bf16; any strides (a slice of a fused qkv buffer is read in place).
        cos: cosine of the angles, fp32 [t, 1, d/2]; no gradient.
        sin: sine of the angles, fp32 [t, 1, d/2]; no gradient.

    Returns:
        [t, n, d], contiguous.

    Raises:
        ValueError: unsupported type, device, head size or shape.
    """
    check_tensor("heads", heads)
    check_tensor("cos", cos, like=heads, dtypes=(torch.float32,))
    check_tensor("sin", sin, like=heads, dtypes=(torch.float32,))
    if heads.dim() != 3:
        raise ValueError(f"heads has {heads.dim()} dimensions; supported is [tokens, heads, head size]")
    t, _, d = heads.shape
    if d % 2 or not 0 < d <= MAX_HEAD_SIZE:
        raise ValueError(f"heads has a head size of {d}; supported are even sizes up to {MAX_HEAD_SIZE}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (t, 1, d // 2):
            raise ValueError(f"{name} has shape {tuple(table.shape)}; heads need {(t, 1, d // 2)}")
    return _rotate(heads, cos, sin, 1.0)


@torch.library.custom_op("megavl::rotate", mutates_args=())
def _rotate(heads: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = heads if heads.stride(-1) == 1 else heads.contiguous()
    t, n, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        block_n, block_d = blocks(n, d // 2)
        rotate_pairs[(t, triton.cdiv(n, block_n))](
            *(x, cos.contiguous(), sin.contiguous(), y, x.stride(0), x.stride(1), n, sign),
            HALF=d // 2,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
    return y


@_rotate.register_fake
def _(heads: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    return heads.new_empty(heads.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, cos, sin, sign = inputs
    ctx.save_for_backward(cos, sin)
    ctx.sign = sign


def _backward(ctx, gradient: Tensor):
    return _rotate(gradient, *ctx.saved_tensors, -ctx.sign), None, None, None


_rotate.register_autograd(_backward, setup_context=_setup_context)
