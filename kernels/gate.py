"""Hold an operator to what PyTorch itself loses.

The truth is the reference in float64. The allowed error is twice the error that the reference makes in the operator's
own type, and never less than a few roundings of that type: so the bound follows from the type, not from the kernel.
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
    ours = _outputs(operator, inputs, inputs[0].dtype)
    theirs = _outputs(reference, inputs, inputs[0].dtype)
    truth = _outputs(reference, inputs, torch.float64)
    names = ["output", *(f"gradient of input {i}" for i in range(len(inputs)))]
    least = roundings * torch.finfo(inputs[0].dtype).eps
    for name, our, their, true in zip(names, ours, theirs, truth, strict=True):
        assert our.shape == true.shape, f"{name}: {tuple(our.shape)} for {tuple(true.shape)}"
        assert torch.isfinite(our).all(), f"{name}: not finite"
        bound = max(2 * relative_error(their, true), least)
        error = relative_error(our, true)
        assert error <= bound, f"{name}: relative error {error:.2e}, PyTorch's own {bound / 2:.2e}"


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, in float64; absolute where the truth is zero."""
    if truth.numel() == 0:
        return 0.0
    norm = truth.double().norm().item()
    return (value.double() - truth.double()).norm().item() / (norm or 1.0)


def _outputs(function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients with inputs in `dtype`, from a random but fixed gradient of the output."""
    leaves = [_with_strides(x, dtype).requires_grad_() for x in inputs]
    output = function(*leaves)
    seed = torch.Generator().manual_seed(output.numel())
    gradient = torch.randn(output.shape, generator=seed, dtype=torch.float64).to(inputs[0].dtype).to(dtype)
    output.backward(gradient.to(output.device))
    return [output.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def _with_strides(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype` with the strides of `x`, also where `x` is a slice of something larger."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    storage = torch.zeros(span, dtype=dtype, device=x.device)
    copy = storage.as_strided(x.shape, x.stride()) if span else x.to(dtype)
    return copy.copy_(x).detach()
