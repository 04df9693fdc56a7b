"""Image scatter against its reference: output, both gradients, slices of the stream, strides, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.kernels.image_scatter.op import image_scatter
from megavl.kernels.image_scatter.reference import image_scatter_reference
from tests.kernels.compare import DTYPES, hold_to_reference


def compare(embedded: torch.Tensor, features: torch.Tensor, slots: torch.Tensor, start: int = 0) -> None:
    slots = slots.to(embedded.device)
    hold_to_reference(
        lambda a, b: image_scatter(a, b, slots, start),
        lambda a, b: image_scatter_reference(a, b, slots, start),
        [embedded, features],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "hidden", "images"), [(1, 1, 1), (13, 97, 2), (9, 2050, 1)], ids=str)
def test_equals_reference(rows, hidden, images, dtype, device):
    features = torch.randn(images, max(rows // 4, 1), hidden, device=device).to(dtype)
    slots = torch.randperm(rows)[: features.shape[0] * features.shape[1]]
    compare(torch.randn(rows, hidden, device=device).to(dtype), features, slots)


@settings(max_examples=15, deadline=None)
@given(stream=st.integers(1, 20), hidden=st.integers(1, 70), data=st.data())
def test_any_slice(stream, hidden, data):
    """A rank's rows of the stream, features before, in and behind them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = data.draw(st.integers(0, stream - 1))
    stop = data.draw(st.integers(start + 1, stream))
    slots = torch.tensor(data.draw(st.lists(st.integers(0, stream - 1), unique=True, min_size=1)))
    compare(
        torch.randn(stop - start, hidden, device=device), torch.randn(len(slots), hidden, device=device), slots, start
    )


def test_slices_join_to_the_whole(device):
    """Outputs of the ranks joined, feature gradients of the ranks added: those of one rank alone."""
    embedded, features = torch.randn(12, 40, device=device), torch.randn(2, 3, 40, device=device, requires_grad=True)
    slots = torch.tensor([0, 1, 2, 5, 6, 7], device=device)
    whole = image_scatter(embedded, features, slots)
    parts = torch.cat([image_scatter(embedded[s : s + 6], features, slots, s) for s in (0, 6)])
    assert torch.equal(parts, whole)
    weights = torch.randn_like(whole)
    one, several = (torch.autograd.grad((weights * y).sum(), features)[0] for y in (whole, parts))
    assert torch.equal(one, several)


def test_strided_inputs(device):
    slots = torch.tensor([4, 0, 2])
    compare(torch.randn(6, 80, device=device)[:, ::2], torch.randn(40, 3, device=device).t(), slots)
    compare(torch.randn(6, 100, device=device)[:, 30:71], torch.randn(3, 50, device=device)[:, 9:], slots)
    compare(torch.randn(6, 8, device=device), torch.randn(3, 8, device=device), torch.arange(6)[::2])


def test_features_of_another_type(device):
    embedded = torch.randn(6, 32, device=device, dtype=torch.float16)
    features = torch.randn(2, 32, device=device, requires_grad=True)
    y = image_scatter(embedded, features, torch.tensor([1, 4], device=device))
    assert torch.equal(y[[1, 4]], features.half())
    y.sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))


def test_frozen_embedding_gets_no_gradient(device):
    features = torch.randn(2, 8, device=device, requires_grad=True)
    image_scatter(torch.randn(5, 8, device=device), features, torch.tensor([1, 4], device=device)).sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))


def test_empty(device):
    text = torch.randn(5, 8, device=device, requires_grad=True)
    y = image_scatter(text, torch.empty(0, 4, 8, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert torch.equal(y, text)
    y.sum().backward()
    assert torch.equal(text.grad, torch.ones_like(text))
    features = torch.randn(2, 8, device=device, requires_grad=True)
    nothing = image_scatter(torch.empty(0, 8, device=device), features, torch.tensor([1, 4], device=device))
    nothing.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_two_runs_give_equal_bits(device):
    inputs = [torch.randn(n, 40, device=device, requires_grad=True) for n in (9, 3)]
    slots = torch.tensor([1, 4, 7], device=device)
    runs = [(y := image_scatter(*inputs, slots), *torch.autograd.grad(y.square().sum(), inputs)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(device):
    embedded = torch.randn(8, 6, device=device).t().requires_grad_()
    features = torch.randn(2, 2, 8, device=device, requires_grad=True)
    slots = torch.tensor([7, 3, 9, 4], device=device)
    torch.library.opcheck(torch.ops.megavl.image_scatter.default, (embedded, features, slots, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a device can be waited for")
def test_host_does_not_wait(device):
    inputs = [torch.randn(n, 64, device=device, requires_grad=True) for n in (9, 2)]
    slots = torch.tensor([1, 4], device=device)
    image_scatter(*inputs, slots).sum().backward()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        image_scatter(*inputs, slots).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("embedded", "features", "slots", "start", "message"),
    [
        (torch.ones(4, 8), torch.ones(2, 9), torch.arange(2), 0, r"features has shape \(2, 9\), the hidden size of"),
        (torch.ones(4, 8), torch.ones(1, 2, 8), torch.arange(3), 0, r"slots has shape \(3,\), there are 2 features"),
        (torch.ones(4, 8), torch.ones(2, 8), torch.arange(2).int(), 0, "slots is int32; supported are int64"),
        (torch.ones(4, 8).double(), torch.ones(2, 8), torch.arange(2), 0, "embedded is float64; supported are"),
        (torch.ones(4, 1, 8), torch.ones(2, 8), torch.arange(2), 0, "embedded has 3 dimensions; supported is"),
        (torch.ones(4, 8), torch.ones(2, 8), torch.arange(2), -1, "start is -1; supported are 0 and more"),
    ],
    ids=["hidden", "count", "slots type", "type", "dimensions", "start"],
)
def test_refusals(embedded, features, slots, start, message, device):
    with pytest.raises(ValueError, match=message):
        image_scatter(embedded.to(device), features.to(device), slots.to(device), start)
