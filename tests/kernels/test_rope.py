"""Rotary embedding against its reference: forward, gradient, odd shapes, restarting positions, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.kernels.rope.op import rotate
from megavl.kernels.rope.reference import rotate_reference
from tests.kernels.compare import DTYPES, hold_to_reference


def compare(heads: torch.Tensor, positions: torch.Tensor | None = None) -> None:
    t, _, d = heads.shape
    positions = torch.arange(t) % 5 if positions is None else positions  # documents of five tokens
    angles = positions[:, None] / 10000.0 ** (torch.arange(0, d, 2) / d)
    cos, sin = (f(angles).unsqueeze(1).to(heads.device) for f in (torch.cos, torch.sin))
    hold_to_reference(lambda x: rotate(x, cos, sin), lambda x: rotate_reference(x, cos, sin), [heads])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 34), (11, 40, 128), (3, 5, 256)], ids=str)
def test_equals_reference(shape, dtype, device):
    compare(torch.randn(shape, device=device).to(dtype))


@settings(max_examples=10, deadline=None)
@given(t=st.integers(1, 8), n=st.integers(1, 6), half=st.integers(1, 70))
def test_any_shape(t, n, half):
    compare(torch.randn(t, n, 2 * half, device="cuda" if torch.cuda.is_available() else "cpu"))


def test_reads_a_slice_of_the_fused_buffer(device):
    qkv = torch.randn(9, 3, 4, 32, device=device)
    compare(qkv[:, 1])
    compare(qkv.transpose(-1, -2)[:, 0])


def test_far_positions(device):
    compare(torch.randn(3, 2, 64, device=device), positions=torch.tensor([0, 4095, 16383]))


def test_empty(device):
    table = torch.empty(0, 1, 16, device=device)
    assert rotate(torch.empty(0, 4, 32, device=device), table, table).shape == (0, 4, 32)


def test_two_runs_give_equal_bits(device):
    x, table = torch.randn(9, 3, 32, device=device, requires_grad=True), torch.randn(9, 1, 16, device=device)
    runs = [(y := rotate(x, table, table), *torch.autograd.grad(y.square().sum(), x)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(device):
    table = torch.randn(6, 1, 8, device=device)
    heads = torch.randn(2, 6, 16, device=device).transpose(0, 1).requires_grad_()
    torch.library.opcheck(torch.ops.megavl.rotate.default, (heads, table, table, 1.0))


@pytest.mark.parametrize(
    ("shape", "table", "message"),
    [
        ((4, 8), (4, 1, 4), "heads has 2 dimensions; supported is"),
        ((4, 2, 7), (4, 1, 3), "heads has a head size of 7; supported are even sizes up to 512"),
        ((4, 2, 8), (3, 1, 4), r"cos has shape \(3, 1, 4\); heads need \(4, 1, 4\)"),
    ],
)
def test_refusals(shape, table, message, device):
    with pytest.raises(ValueError, match=message):
        rotate(torch.ones(shape, device=device), torch.ones(table, device=device), torch.ones(table, device=device))


def test_refuses_a_half_precision_table(device):
    half = torch.ones(4, 1, 4, device=device, dtype=torch.float16)
    with pytest.raises(ValueError, match="cos is float16; supported are float32"):
        rotate(torch.ones(4, 2, 8, device=device), half, half)
