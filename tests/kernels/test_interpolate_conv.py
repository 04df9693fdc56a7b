"""Interpolation fused into the convolution, against torch's two operators and our two: output, gradients, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.config import SamConfig
from megavl.kernels.interpolate.op import interpolate
from megavl.kernels.interpolate_conv.op import interpolate_conv
from megavl.kernels.interpolate_conv.reference import interpolate_conv_reference
from megavl.kernels.strided_conv.op import strided_conv
from megavl.model.vision.sam import SamTower
from megavl.ops import Ops
from tests.kernels.compare import DTYPES, hold_to_reference, relative_error


def compare(features: torch.Tensor, k: int, size: tuple[int, int]) -> None:
    c = features.shape[1]
    weight = (torch.randn(k, c, 3, 3, device=features.device) / (3 * c**0.5)).to(features.dtype)
    hold_to_reference(
        lambda x, w: interpolate_conv(x, w, size),
        lambda x, w: interpolate_conv_reference(x, w, size),
        [features, weight],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "k", "size"),
    [
        ((1, 1, 1, 1), 1, (1, 1)),
        ((2, 7, 4, 6), 5, (6, 9)),
        ((1, 40, 5, 3), 70, (7, 5)),
        ((1, 3, 7, 5), 4, (3, 2)),
        ((1, 4, 8, 8), 6, (15, 12)),
    ],
    ids=["one", "two ratios of the model", "larger than a block", "smaller", "several programs"],
)
def test_equals_reference(shape, k, size, dtype, device):
    compare(torch.randn(shape, device=device).to(dtype), k, size)


sides = st.integers(1, 8)


@settings(max_examples=5, deadline=None)
@given(c=st.integers(1, 18), k=st.integers(1, 18), y=sides, x=sides, rows=sides, columns=sides)
def test_any_shape(c, k, y, x, rows, columns):
    compare(torch.randn(1, c, y, x, device="cuda" if torch.cuda.is_available() else "cpu"), k, (rows, columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_two_operators(dtype, device):
    """The larger map is rounded as if it were stored, so only the order of the sums of a product may differ."""
    x = torch.randn(2, 9, 4, 4, device=device).to(dtype).requires_grad_()
    w = (torch.randn(5, 9, 3, 3, device=device) / 9).to(dtype).requires_grad_()
    results = []
    for y in (interpolate_conv(x, w, (6, 6)), strided_conv(interpolate(x, (6, 6)), w)):
        results.append((y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_equals_the_model(device):
    """SAM's tower with and without: features, and every gradient of what is trained behind it."""
    config = SamConfig(
        **{"image_size": 24, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "mlp": 16, "window": 2},
        **{"global_layers": (1,), "neck": 6, "upsample": 8, "downsample": (5, 7)},
    )
    plain, fused = SamTower(config).to(device), SamTower(config, Ops(interpolate_conv=interpolate_conv)).to(device)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 24, 24, device=device)
    outputs = [tower(images) for tower in (plain, fused)]
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    for name, parameter in plain.named_parameters():
        assert relative_error(fused.get_parameter(name).grad, parameter.grad) < 1e-4, name


def test_strided_inputs(device):
    compare(torch.randn(1, 4, 5, 20, device=device).permute(0, 3, 1, 2)[:, 3:11, ::2], 3, (3, 7))
    compare(torch.randn(1, 5, 4, 6, device=device)[:, :, :, ::2], 3, (6, 4))


def test_frozen_input_and_frozen_weight(device):
    x, w = torch.randn(1, 3, 4, 4, device=device), torch.randn(2, 3, 3, 3, device=device)
    interpolate_conv(x, w.requires_grad_(), (6, 6)).sum().backward()
    assert w.grad.shape == w.shape
    interpolate_conv(x.requires_grad_(), w.detach(), (6, 6)).sum().backward()
    assert x.grad.shape == x.shape


def test_empty(device):
    x = torch.empty(0, 4, 3, 3, device=device, requires_grad=True)
    w = torch.ones(2, 4, 3, 3, device=device, requires_grad=True)
    interpolate_conv(x, w, (5, 5)).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_two_runs_give_equal_bits(device):
    x = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)
    w = torch.randn(8, 8, 3, 3, device=device, requires_grad=True)
    runs = [(y := interpolate_conv(x, w, (9, 9)), *torch.autograd.grad(y.square().sum(), (x, w))) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(device):
    x = torch.randn(1, 4, 5, 3, device=device).permute(0, 3, 1, 2).requires_grad_()
    w = torch.randn(2, 3, 3, 3, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.megavl.interpolate_conv.default, (x, w, 6, 7))


@pytest.mark.parametrize(
    ("features", "weight", "size", "message"),
    [
        (torch.ones(1, 2, 3, 3).double(), torch.ones(4, 2, 3, 3), (4, 4), "features is float64; supported are"),
        (torch.ones(2, 3, 3), torch.ones(4, 2, 3, 3), (4, 4), "features has 3 dimensions; supported is"),
        (torch.ones(1, 2, 3, 3), torch.ones(4, 2, 3, 3), (4, 0), r"size has sides \(4, 0\); supported are two of 1 to"),
        (
            torch.ones(1, 2, 3, 3),
            torch.ones(4, 2, 5, 5),
            (4, 4),
            r"weight has shape \(4, 2, 5, 5\); supported is \[k, 2",
        ),
        (torch.ones(1, 2, 3, 3), torch.ones(4, 2, 3, 3).half(), (4, 4), "weight is float16; supported are float32"),
        (torch.ones(1, 0, 3, 3), torch.ones(4, 0, 3, 3), (4, 4), "supported are 1 channel and more"),
    ],
    ids=["type", "dimensions", "size", "kernel size", "mixed types", "no channels"],
)
def test_refusals(features, weight, size, message, device):
    with pytest.raises(ValueError, match=message):
        interpolate_conv(features.to(device), weight.to(device), size)
