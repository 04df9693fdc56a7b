"""Interpolation against torch's own: output, gradient, ratios, strides, bits, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.kernels.interpolate.op import interpolate
from megavl.kernels.interpolate.reference import interpolate_reference
from tests.kernels.compare import DTYPES, hold_to_reference


def compare(features: torch.Tensor, size: tuple[int, int]) -> None:
    hold_to_reference(lambda x: interpolate(x, size), lambda x: interpolate_reference(x, size), [features])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 256, 6, 6), (9, 9)),
        ((2, 7, 4, 6), (6, 9)),
        ((1, 1, 1, 1), (1, 1)),
        ((2, 3, 5, 7), (11, 13)),
        ((1, 300, 7, 5), (3, 2)),
        ((1, 5, 1, 4), (7, 1)),
        ((1, 2, 3, 3), (20, 3)),
    ],
    ids=["real ratio", "two ratios", "one", "primes", "smaller", "to and from one", "far larger"],
)
def test_equals_reference(shape, size, dtype, device):
    compare(torch.randn(shape, device=device).to(dtype), size)


sides = st.integers(1, 12)


@settings(max_examples=15, deadline=None)
@given(i=st.integers(1, 2), c=st.integers(1, 20), y=sides, x=sides, rows=sides, columns=sides)
def test_any_ratio(i, c, y, x, rows, columns):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare(torch.randn(i, c, y, x, device=device), (rows, columns))


def test_real_sides_have_the_known_weights(device):
    """64 -> 96 along one axis: 1/6, 1/2 and 5/6, and the clamped ends."""
    y = interpolate(torch.eye(64, device=device).view(1, 64, 1, 64), (1, 96))[0, :, 0].T  # [96 outputs, 64 inputs]
    expected = torch.zeros(96, 64, device=device)
    for k in range(32):
        expected[3 * k, max(2 * k - 1, 0)] += 1 / 6
        expected[3 * k, 2 * k] += 5 / 6
        expected[3 * k + 1, 2 * k : 2 * k + 2] = 1 / 2
        expected[3 * k + 2, 2 * k + 1] += 5 / 6
        expected[3 * k + 2, min(2 * k + 2, 63)] += 1 / 6
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-7)


def test_gradient_is_the_transpose(device):
    """<up(x), g> = <x, down(g)> in float64, at a size with several programs."""
    x = torch.randn(1, 64, 16, 16, device=device, requires_grad=True)
    y = interpolate(x, (24, 24))
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    left, right = ((a.double() * b.double()).sum().item() for a, b in ((y, g), (x, dx)))
    assert abs(left - right) < 1e-6 * (y.norm() * g.norm()).item()  # the products themselves may happen to be near 0


def test_strided_inputs(device):
    compare(torch.randn(2, 6, 6, 5, device=device).permute(0, 3, 1, 2), (9, 9))
    compare(torch.randn(2, 4, 6, 20, device=device).permute(0, 3, 1, 2)[:, 3:11, ::2], (3, 9))
    compare(torch.randn(2, 8, 6, 9, device=device)[:, :, :, ::2], (9, 8))


def test_result_is_channels_last(device):
    assert interpolate(torch.randn(2, 5, 4, 4, device=device), (6, 6)).is_contiguous(memory_format=torch.channels_last)


def test_empty(device):
    for shape in ((0, 4, 3, 3), (2, 0, 3, 3)):
        x = torch.empty(shape, device=device, requires_grad=True)
        interpolate(x, (5, 4)).sum().backward()
        assert x.grad.shape == x.shape


def test_two_runs_give_equal_bits(device):
    x = torch.randn(2, 40, 8, 8, device=device, requires_grad=True)
    g = torch.randn(2, 40, 12, 12, device=device)
    runs = [(y := interpolate(x, (12, 12)), torch.autograd.grad(y, x, g)[0]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(device):
    for features in (
        torch.randn(2, 3, 4, 5, device=device),
        torch.randn(2, 4, 5, 3, device=device).permute(0, 3, 1, 2),
    ):
        torch.library.opcheck(torch.ops.megavl.interpolate.default, (features.requires_grad_(), 6, 7))


@pytest.mark.parametrize(
    ("features", "size", "message"),
    [
        (torch.ones(1, 2, 3, 3).double(), (4, 4), "features is float64; supported are"),
        (torch.ones(2, 3, 3), (4, 4), "features has 3 dimensions; supported is"),
        (torch.ones(1, 2, 0, 3), (4, 4), r"features has sides \(0, 3\); supported are two of 1 to"),
        (torch.ones(1, 2, 3, 3), (4, 9000), r"size has sides \(4, 9000\); supported are two of 1 to 8192"),
    ],
    ids=["type", "dimensions", "no rows", "size"],
)
def test_refusals(features, size, message, device):
    with pytest.raises(ValueError, match=message):
        interpolate(features.to(device), size)
