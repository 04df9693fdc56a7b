"""RMSNorm as a differentiable operator. Shapes: h hidden size, rows all leading dimensions together."""

import torch
from torch import Tensor

from megavl.kernels.configurations import configuration
from megavl.kernels.launch import as_rows, check_tensor, num_programs
from megavl.kernels.rmsnorm.kernel import block_and_warps, rms_norm_backward, rms_norm_forward

MAX_HIDDEN = 16384
"""A row lives in one program's registers."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last dimension; differentiable in `x` and `weight`.

    Under sequence parallelism each rank has its own rows, and the gradient of `weight` is this rank's part: whoever
    owns the parameter sums it over the tensor group, as for any norm.

    Args:
        x: [..., h], fp32, fp16 or bf16; any strides.
        weight: [h].
        eps: added to the mean square.

    Returns:
        [..., h] in the type of `x`, contiguous.

    Raises:
        ValueError: unsupported type, device or size.
    """
    check_tensor("x", x)
    check_tensor("weight", weight, like=x)
    if not x.dim():
        raise ValueError("x has 0 dimensions; supported is [..., h]")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the last dimension of x is {x.shape[-1]}")
    if not 0 < x.shape[-1] <= MAX_HIDDEN:
        raise ValueError(f"x has a last dimension of {x.shape[-1]}; supported are 1 to {MAX_HIDDEN}")
    return _rms_norm(x, weight, eps)[0]


@torch.library.custom_op("megavl::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y [..., h], r [rows] fp32)."""
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    if rows.shape[0]:
        h = x.shape[-1]
        options = configuration("rmsnorm", "forward", f"h{h}", block_and_warps(h), x)
        rms_norm_forward[(rows.shape[0],)](rows, weight.contiguous(), y, r, rows.stride(0), eps, H=h, **options)
    return y, r


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("megavl::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [..., h], dw [h])."""
    rows, dy_rows = as_rows(x), as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows.shape[0]:
        return dx, torch.zeros_like(weight)
    programs = min(num_programs(x.device), rows.shape[0])
    parts = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    h = x.shape[-1]
    options = configuration("rmsnorm", "backward", f"h{h}", block_and_warps(h), x)
    rms_norm_backward[(programs,)](
        *(dy_rows, rows, weight.contiguous(), r, dx, parts, dy_rows.stride(0), rows.stride(0), rows.shape[0]),
        H=h,
        **options,
    )
    return dx, parts.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, dy: Tensor, _dr: Tensor):
    dx, dw = _rms_norm_backward(dy, *ctx.saved_tensors)
    return dx, dw, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
