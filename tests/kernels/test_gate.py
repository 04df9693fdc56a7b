"""The gate itself: chance passes, a fault of a few roundings does not."""

import pytest
import torch

from megavl.kernels.gate import hold_to_reference


def test_roundings_of_another_order_pass():
    """Sums in two orders lose alike on average, but in one entry one of them is often several times luckier."""
    torch.manual_seed(7)  # 16 draws of two entries may differ by the factor of 2 once in some thousands
    for _ in range(50):
        x = torch.randn(2, 64)
        hold_to_reference(lambda a: a.flip(1).cumsum(1)[:, -1:], lambda a: a.cumsum(1)[:, -1:], [x], roundings=0.0)


def test_a_value_a_few_roundings_off_fails():
    x = torch.randn(5)
    with pytest.raises(AssertionError, match=r"output: relative error 9.* over 16 draws, allowed 4.77e-07"):
        hold_to_reference(lambda a: torch.exp(a) * (1 + 8 * 2**-23), torch.exp, [x])


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, *gradients):
        return 3.00001 * gradients[0]


def test_a_wrong_gradient_fails_by_name():
    with pytest.raises(AssertionError, match="gradient of input 0"):
        hold_to_reference(_WrongGradient.apply, lambda a: 3 * a, [torch.randn(5, 7).t()])


def test_what_is_not_finite_fails():
    with pytest.raises(AssertionError, match="output: not finite"):
        hold_to_reference(lambda a: a / 0, lambda a: a, [torch.ones(3)])
