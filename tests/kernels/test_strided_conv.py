"""The stride-2 convolution against torch's own: output, both gradients, odd sides, strides, bits, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.kernels.strided_conv.op import strided_conv
from megavl.kernels.strided_conv.reference import strided_conv_reference
from tests.kernels.compare import DTYPES, hold_to_reference


def compare(features: torch.Tensor, k: int) -> None:
    weight = torch.randn(k, features.shape[1], 3, 3, device=features.device) / (3 * features.shape[1] ** 0.5)
    hold_to_reference(strided_conv, strided_conv_reference, [features, weight.to(features.dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "k"),
    [((1, 1, 1, 1), 1), ((2, 5, 5, 7), 6), ((1, 70, 6, 4), 17), ((1, 3, 1, 8), 130), ((3, 4, 14, 14), 8)],
    ids=["one", "primes", "many in", "many out", "many pixels"],
)
def test_equals_reference(shape, k, dtype, device):
    compare(torch.randn(shape, device=device).to(dtype), k)


@settings(max_examples=6, deadline=None)
@given(i=st.integers(1, 2), c=st.integers(1, 18), y=st.integers(1, 7), x=st.integers(1, 7), k=st.integers(1, 18))
def test_any_shape(i, c, y, x, k):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare(torch.randn(i, c, y, x, device=device), k)


def test_strided_inputs(device):
    compare(torch.randn(2, 6, 5, 4, device=device).permute(0, 3, 1, 2), 3)
    compare(torch.randn(1, 4, 5, 20, device=device).permute(0, 3, 1, 2)[:, 3:11, ::2], 3)


def test_frozen_input_and_frozen_weight(device):
    x, w = torch.randn(1, 3, 4, 4, device=device), torch.randn(2, 3, 3, 3, device=device)
    strided_conv(x, w.requires_grad_()).sum().backward()
    assert w.grad.shape == w.shape
    strided_conv(x.requires_grad_(), w.detach()).sum().backward()
    assert x.grad.shape == x.shape


def test_empty(device):
    x = torch.empty(0, 4, 3, 3, device=device, requires_grad=True)
    w = torch.ones(2, 4, 3, 3, device=device, requires_grad=True)
    strided_conv(x, w).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_two_runs_give_equal_bits(device):
    x = torch.randn(2, 8, 9, 9, device=device, requires_grad=True)
    w = torch.randn(8, 8, 3, 3, device=device, requires_grad=True)
    runs = [(y := strided_conv(x, w), *torch.autograd.grad(y.square().sum(), (x, w))) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(device):
    x = torch.randn(1, 4, 5, 3, device=device).permute(0, 3, 1, 2).requires_grad_()
    w = torch.randn(2, 3, 3, 3, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.megavl.strided_conv.default, (x, w))


@pytest.mark.parametrize(
    ("features", "weight", "message"),
    [
        (torch.ones(1, 2, 3, 3).double(), torch.ones(4, 2, 3, 3), "features is float64; supported are"),
        (torch.ones(2, 3, 3), torch.ones(4, 2, 3, 3), r"features has shape \(2, 3, 3\); supported is"),
        (torch.ones(1, 2, 3, 3), torch.ones(4, 2, 5, 5), r"weight has shape \(4, 2, 5, 5\); supported is \[k, 2, 3"),
        (torch.ones(1, 2, 3, 3), torch.ones(4, 2, 3, 3).half(), "weight is float16; supported are float32"),
    ],
    ids=["type", "dimensions", "kernel size", "mixed types"],
)
def test_refusals(features, weight, message, device):
    with pytest.raises(ValueError, match=message):
        strided_conv(features.to(device), weight.to(device))
