"""Hold an operator to what PyTorch itself loses.

The truth is the reference in float64. The allowed error is twice the error that the reference makes in the operator's
own type, and never less than a few roundings of that type: so the bound follows from the type, not from the kernel.

Both errors are sums of chance roundings. In a tensor of a few entries one draw says little: 40 draws of SAM attention
on a 3 x 2 grid gave ratios up to 3.9 where the errors over all draws had a ratio of 0.8. So a tensor outside the bound
in one draw is measured again, over that draw and others near it together; there the factor of 2 is final.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def hold_to_reference(
    operator: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], roundings: float = 4.0
) -> None:
    """Compare output and every gradient.

    Args:
        operator: takes `inputs`, returns one tensor.
        reference: the same in plain PyTorch, in any type.
        inputs: floating tensors; each gets a gradient. Strides are kept.
        roundings: least allowed error, in units of the type's machine epsilon.

    Raises:
        AssertionError: the output or a gradient is too far away, or not finite.
    """
    names = ["output", *(f"gradient of input {i}" for i in range(len(inputs)))]
    least = roundings * torch.finfo(inputs[0].dtype).eps
    draws = [_squared_errors(operator, reference, inputs, names)]
    if any(error > bound for error, bound in _verdict(draws, least)):
        draws += [_squared_errors(operator, reference, _nearby(inputs), names) for _ in range(_MORE_DRAWS)]
    for name, (error, bound) in zip(names, _verdict(draws, least), strict=True):
        assert error <= bound, f"{name}: relative error {error:.2e} over {len(draws)} draws, allowed {bound:.2e}"


_MORE_DRAWS = 15
"""Draws that are added where one is not enough to tell."""


def _squared_errors(
    operator: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], names: Sequence[str]
) -> list[tuple[float, float, float]]:
    """(|operator - truth|^2, |reference - truth|^2, |truth|^2) of the output and every gradient."""
    ours = _outputs(operator, inputs, inputs[0].dtype)
    theirs = _outputs(reference, inputs, inputs[0].dtype)
    truth = _outputs(reference, inputs, torch.float64)
    for name, our, true in zip(names, ours, truth, strict=True):
        assert our.shape == true.shape, f"{name}: {tuple(our.shape)} for {tuple(true.shape)}"
        assert torch.isfinite(our).all(), f"{name}: not finite"
    return [
        (_squared(our.double() - true), _squared(their.double() - true), _squared(true))
        for our, their, true in zip(ours, theirs, truth, strict=True)
    ]


def _verdict(draws: Sequence[list[tuple[float, float, float]]], least: float) -> list[tuple[float, float]]:
    """(relative error over all draws, allowed) of the output and every gradient; absolute where the truth is zero."""
    totals = [[sum(part) for part in zip(*of_tensor, strict=True)] for of_tensor in zip(*draws, strict=True)]
    return [
        ((ours / (truth or 1.0)) ** 0.5, max(2 * (theirs / (truth or 1.0)) ** 0.5, least))
        for ours, theirs, truth in totals
    ]


def _nearby(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Inputs about 1% away, with the same strides: as hard a question, with other roundings."""
    return [_with_strides(x + 0.01 * x * torch.randn_like(x), x.dtype, like=x) for x in inputs]


def _squared(x: Tensor) -> float:
    return x.square().sum().item()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, in float64; absolute where the truth is zero."""
    if truth.numel() == 0:
        return 0.0
    norm = truth.double().norm().item()
    return (value.double() - truth.double()).norm().item() / (norm or 1.0)


@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def _outputs(function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients with inputs in `dtype`, from a random but fixed gradient of the output.

    Without TF32, which cuDNN would use for the reference in fp32: a thousand times the error to be as good as.
    """
    leaves = [_with_strides(x, dtype).requires_grad_() for x in inputs]
    output = function(*leaves)
    seed = torch.Generator().manual_seed(output.numel())
    gradient = torch.randn(output.shape, generator=seed, dtype=torch.float64).to(inputs[0].dtype).to(dtype)
    output.backward(gradient.to(output.device))
    return [output.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def _with_strides(x: Tensor, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """A copy in `dtype` with the strides of `like` (`x` itself), also where that is a slice of something larger."""
    strides = (x if like is None else like).stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) if x.numel() else 0
    storage = torch.zeros(span, dtype=dtype, device=x.device)
    copy = storage.as_strided(x.shape, strides) if span else x.to(dtype)
    return copy.copy_(x).detach()
