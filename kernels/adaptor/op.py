"""The vision-language adaptor as one differentiable operator: `hybrid` (released 7B) and `mlp_gelu` (released 1.3B).

Both branches are multiplied straight into the halves of one buffer, so nothing is joined afterwards; one kernel adds
the bias and applies GELU; cuBLAS does the matrix products.

Shapes: c_high and c_low widths of the towers, h hidden size, rows all leading dimensions together.
"""

import torch
import triton
from torch import Tensor

from megavl.kernels.adaptor.kernel import BLOCK, bias_gelu_backward, bias_gelu_forward
from megavl.kernels.launch import as_rows, check_tensor


def hybrid_adaptor(
    high: Tensor,
    low: Tensor,
    high_weight: Tensor,
    high_bias: Tensor,
    low_weight: Tensor,
    low_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """gelu([high @ high_weight' + high_bias | low @ low_weight' + low_bias]) @ weight' + bias; differentiable in all.

    Args:
        high: features of the high-resolution tower, [..., c_high], fp32, fp16 or bf16; any strides.
        low: features of the low-resolution tower, [..., c_low].
        high_weight: [n, c_high], n values of the first layer's output (half of h in the model).
        high_bias: [n].
        low_weight: [m, c_low], the rest of them.
        low_bias: [m].
        weight: [h, n + m].
        bias: [h].

    Returns:
        [..., h], contiguous.

    Raises:
        ValueError: unsupported type, device or shape.
    """
    _check_layer("high", high, high_weight, high_bias, like=high)
    _check_layer("low", low, low_weight, low_bias, like=high)
    if high.shape[:-1] != low.shape[:-1]:
        raise ValueError(f"high has shape {tuple(high.shape)}, low has {tuple(low.shape)}; all but the last must agree")
    _check_output(high_weight.shape[0] + low_weight.shape[0], weight, bias, like=high)
    return _adaptor(high, low, high_weight, high_bias, low_weight, low_bias, weight, bias)[0]


def mlp_adaptor(low: Tensor, low_weight: Tensor, low_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(low @ low_weight' + low_bias) @ weight' + bias; differentiable in all. Arguments as of `hybrid_adaptor`.

    Raises:
        ValueError: unsupported type, device or shape.
    """
    _check_layer("low", low, low_weight, low_bias, like=low)
    _check_output(low_weight.shape[0], weight, bias, like=low)
    return _adaptor(None, low, None, None, low_weight, low_bias, weight, bias)[0]


def _check_layer(name: str, features: Tensor, weight: Tensor, bias: Tensor, like: Tensor) -> None:
    """Refuse features of a tower that do not fit their layer."""
    for argument, tensor in ((name, features), (f"{name}_weight", weight), (f"{name}_bias", bias)):
        check_tensor(argument, tensor, like=like)
        if tensor.dtype is not like.dtype:
            raise ValueError(f"{argument} is {tensor.dtype}, the other arguments are {like.dtype}")
    if features.dim() < 1 or weight.dim() != 2 or weight.shape[1] != features.shape[-1]:
        raise ValueError(f"{name}_weight has shape {tuple(weight.shape)}, {name} has {tuple(features.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias has shape {tuple(bias.shape)}, {name}_weight has {tuple(weight.shape)}")


def _check_output(width: int, weight: Tensor, bias: Tensor, like: Tensor) -> None:
    """Refuse a second layer that does not fit the first."""
    for argument, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(argument, tensor, like=like)
        if tensor.dtype is not like.dtype:
            raise ValueError(f"{argument} is {tensor.dtype}, the other arguments are {like.dtype}")
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the first layer gives {width} values")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, weight has {tuple(weight.shape)}")


@torch.library.custom_op("megavl::adaptor", mutates_args=())
def _adaptor(
    high: Tensor | None,
    low: Tensor,
    high_weight: Tensor | None,
    high_bias: Tensor | None,
    low_weight: Tensor,
    low_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """(y [..., h], product [rows, n + m]: the first layer without bias)."""
    rows = as_rows(low)
    split = 0 if high_weight is None else high_weight.shape[0]
    product = torch.empty(rows.shape[0], split + low_weight.shape[0], dtype=low.dtype, device=low.device)
    torch.mm(rows, low_weight.t(), out=product[:, split:])
    if high is not None and high_weight is not None:
        torch.mm(as_rows(high), high_weight.t(), out=product[:, :split])
    active = torch.empty_like(product)
    if active.numel():
        joined = _joined_bias(high_bias, low_bias)
        grid = (product.shape[0], triton.cdiv(product.shape[1], BLOCK))
        bias_gelu_forward[grid](product, joined, active, product.shape[1], BLOCK=BLOCK)
    return torch.addmm(bias, active, weight.t()).view(*low.shape[:-1], weight.shape[0]), product


@_adaptor.register_fake
def _(
    high: Tensor | None,
    low: Tensor,
    high_weight: Tensor | None,
    high_bias: Tensor | None,
    low_weight: Tensor,
    low_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    rows, width = low.numel() // low.shape[-1], weight.shape[1]
    return low.new_empty(*low.shape[:-1], weight.shape[0]), low.new_empty(rows, width)


def _joined_bias(high_bias: Tensor | None, low_bias: Tensor) -> Tensor:
    """[n + m]."""
    return low_bias.contiguous() if high_bias is None else torch.cat([high_bias, low_bias])


@torch.library.custom_op("megavl::adaptor_gelu_backward", mutates_args=())
def _gelu_backward(
    dy: Tensor, product: Tensor, high_bias: Tensor | None, low_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of the product, what GELU gave in the forward pass), both [rows, n + m]."""
    gradient = torch.mm(dy, weight)
    active = torch.empty_like(product)
    if active.numel():
        joined = _joined_bias(high_bias, low_bias)
        grid = (product.shape[0], triton.cdiv(product.shape[1], BLOCK))
        bias_gelu_backward[grid](gradient, product, joined, active, product.shape[1], BLOCK=BLOCK)
    return gradient, active


@_gelu_backward.register_fake
def _(dy: Tensor, product: Tensor, high_bias: Tensor | None, low_bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return product.new_empty(product.shape), product.new_empty(product.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.hybrid = inputs[0] is not None
    ctx.save_for_backward(*(tensor for tensor in inputs[:-1] if tensor is not None), output[1])


def _backward(ctx, dy: Tensor, _dproduct: Tensor):
    """Only the products that somebody needs: the towers are frozen in most stages."""
    if ctx.hybrid:
        high, low, high_weight, high_bias, low_weight, low_bias, weight, product = ctx.saved_tensors
    else:
        high, high_weight, high_bias = None, None, None
        low, low_weight, low_bias, weight, product = ctx.saved_tensors
    needs, rows = ctx.needs_input_grad, dy.reshape(-1, weight.shape[0])
    dweight = dbias = None
    dhigh = dhigh_weight = dhigh_bias = dlow = dlow_weight = dlow_bias = None
    if needs[7]:
        dbias = rows.sum(0)
    if any(needs[:7]):
        gradient, active = _gelu_backward(rows, product, high_bias, low_bias, weight)
        split = gradient.shape[1] - low_weight.shape[0]
        dweight = rows.t() @ active if needs[6] else None
        dlow, dlow_weight, dlow_bias = _layer_gradients(
            gradient[:, split:], low, low_weight, (needs[1], needs[4], needs[5])
        )
        if ctx.hybrid:
            dhigh, dhigh_weight, dhigh_bias = _layer_gradients(
                gradient[:, :split], high, high_weight, (needs[0], needs[2], needs[3])
            )
    return dhigh, dlow, dhigh_weight, dhigh_bias, dlow_weight, dlow_bias, dweight, dbias


def _layer_gradients(
    gradient: Tensor, features: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a tower's features, weight and bias, from that of its part of the product [rows, n]."""
    rows = features.reshape(-1, features.shape[-1])
    return (
        (gradient @ weight).view(features.shape) if needs[0] else None,
        gradient.t() @ rows if needs[1] else None,
        gradient.sum(0) if needs[2] else None,
    )


_adaptor.register_autograd(_backward, setup_context=_setup_context)
