"""RMSNorm against its reference: forward, both gradients, odd shapes, strides, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.kernels.rmsnorm.op import rms_norm
from megavl.kernels.rmsnorm.reference import rms_norm_reference
from tests.kernels.compare import DTYPES, hold_to_reference

EPS = 1e-6


def compare(x: torch.Tensor) -> None:
    weight = 1 + 0.3 * torch.randn(x.shape[-1], device=x.device).to(x.dtype)
    hold_to_reference(lambda a, w: rms_norm(a, w, EPS), lambda a, w: rms_norm_reference(a, w, EPS), [x, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (1, 128), (7, 97), (5, 1, 2048), (3, 2, 63)], ids=str)
def test_equals_reference(shape, dtype, device):
    compare(torch.randn(shape, device=device).to(dtype))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 9), hidden=st.integers(8, 300))
def test_any_shape(rows, hidden):
    """From 8 on: the gradient of one or two values is what two nearly equal numbers leave, in any implementation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare(torch.randn(rows, hidden, device=device))


def test_strided_inputs(device):
    compare(torch.randn(6, 2 * 40, device=device)[:, ::2])
    compare(torch.randn(6, 100, device=device)[:, 30:71])
    compare(torch.randn(40, 6, device=device).t())


def test_one_value_a_row(device):
    x = torch.tensor([[3.0], [-0.5]], device=device)
    torch.testing.assert_close(rms_norm(x, torch.full((1,), 2.0, device=device), 0.0), 2 * x.sign())


def test_empty(device):
    x = torch.empty(0, 64, device=device, requires_grad=True)
    weight = torch.ones(64, device=device, requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_two_runs_give_equal_bits(device):
    x, weight = torch.randn(50, 96, device=device), torch.randn(96, device=device)
    gradients = []
    for _ in range(2):
        leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        rms_norm(leaf, w, EPS).square().sum().backward()
        gradients.append((leaf.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_opcheck(device):
    x = torch.randn(3, 4, 32, device=device).transpose(0, 1).requires_grad_()
    torch.library.opcheck(
        torch.ops.megavl.rms_norm.default, (x, torch.ones(32, device=device, requires_grad=True), EPS)
    )


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(()), torch.ones(9), "x has 0 dimensions; supported is"),
        (torch.ones(2, 8), torch.ones(9), r"weight has shape \(9,\), the last dimension of x is 8"),
        (torch.ones(2, 8, dtype=torch.float64), torch.ones(8), "x is float64; supported are"),
        (torch.ones(2, 8), torch.ones(8, dtype=torch.int32), "weight is int32; supported are"),
        (torch.ones(2, 20000), torch.ones(20000), "x has a last dimension of 20000; supported are 1 to 16384"),
    ],
    ids=["no dimension", "size", "x type", "weight type", "too wide"],
)
def test_refusals(x, weight, message, device):
    with pytest.raises(ValueError, match=message):
        rms_norm(x.to(device), weight.to(device), EPS)
