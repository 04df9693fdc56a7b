"""SwiGLU as a differentiable operator. Shapes: f hidden dimension, rows all leading dimensions together."""

import torch
import triton
from torch import Tensor

from megavl.kernels.configurations import configuration
from megavl.kernels.launch import as_rows, check_tensor
from megavl.kernels.swiglu.kernel import DEFAULT, swiglu_backward, swiglu_forward


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, differentiable; the gradient recomputes silu instead of keeping it.

    Args:
        gate_up: gate projection, then up projection, [..., 2f], fp32, fp16 or bf16; any strides.

    Returns:
        [..., f], contiguous.

    Raises:
        ValueError: unsupported type or device, or an odd last dimension.
    """
    check_tensor("gate_up", gate_up)
    if not gate_up.dim():
        raise ValueError("gate_up has 0 dimensions; supported is [..., 2f]")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has a last dimension of {gate_up.shape[-1]}; gate and up need an even one")
    return _swiglu(gate_up)


@torch.library.custom_op("megavl::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    rows, f = as_rows(gate_up), gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], f, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        options = configuration("swiglu", "forward", "any f", DEFAULT, rows)
        swiglu_forward[(rows.shape[0], triton.cdiv(f, options["BLOCK"]))](rows, y, rows.stride(0), f, **options)
    return y


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("megavl::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    rows, dy_rows, f = as_rows(gate_up), as_rows(dy), gate_up.shape[-1] // 2
    dx = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if dx.numel():
        options = configuration("swiglu", "backward", "any f", DEFAULT, rows)
        grid = (rows.shape[0], triton.cdiv(f, options["BLOCK"]))
        swiglu_backward[grid](dy_rows, rows, dx, dy_rows.stride(0), rows.stride(0), f, **options)
    return dx


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> Tensor:
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup_context)
