"""SwiGLU against its reference: forward, gradient, odd shapes, strides, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.kernels.swiglu.op import swiglu
from megavl.kernels.swiglu.reference import swiglu_reference
from tests.kernels.compare import DTYPES, hold_to_reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2 * 97), (2, 3, 2 * 1500), (5, 2048)], ids=str)
def test_equals_reference(shape, dtype, device):
    hold_to_reference(swiglu, swiglu_reference, [3 * torch.randn(shape, device=device).to(dtype)])


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 7), f=st.integers(1, 200))
def test_any_shape(rows, f):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hold_to_reference(swiglu, swiglu_reference, [torch.randn(rows, 2 * f, device=device)])


def test_large_values_stay_finite(device):
    x = torch.tensor([[-200.0, 200.0, 1.0, 2.0]], device=device)
    hold_to_reference(swiglu, swiglu_reference, [x])


def test_strided_inputs(device):
    hold_to_reference(swiglu, swiglu_reference, [torch.randn(6, 90, device=device)[:, 10:52]])
    hold_to_reference(swiglu, swiglu_reference, [torch.randn(30, 6, device=device).t()])


def test_empty(device):
    x = torch.empty(0, 64, device=device, requires_grad=True)
    swiglu(x).sum().backward()
    assert x.grad.shape == x.shape


def test_two_runs_give_equal_bits(device):
    x = torch.randn(9, 2 * 70, device=device, requires_grad=True)
    runs = [(y := swiglu(x), *torch.autograd.grad(y.square().sum(), x)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(device):
    x = torch.randn(4, 3, 32, device=device).transpose(0, 1).requires_grad_()
    torch.library.opcheck(torch.ops.megavl.swiglu.default, (x,))


def test_refusals(device):
    with pytest.raises(ValueError, match="gate_up has a last dimension of 7; gate and up need an even one"):
        swiglu(torch.ones(2, 7, device=device))
    with pytest.raises(ValueError, match="gate_up has 0 dimensions; supported is"):
        swiglu(torch.ones((), device=device))
    with pytest.raises(ValueError, match="gate_up is int64; supported are float32, float16, bfloat16"):
        swiglu(torch.ones(2, 8, device=device, dtype=torch.int64))
