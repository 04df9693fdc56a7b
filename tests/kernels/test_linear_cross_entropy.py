"""Linear cross-entropy against its reference: losses, both gradients, chunks, memory, refusals.

Over several ranks: tests/parallel/test_kernels.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.kernels.linear_cross_entropy.kernel import BLOCK
from megavl.kernels.linear_cross_entropy.op import linear_cross_entropy
from megavl.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.kernels.compare import DTYPES, hold_to_reference, relative_error

IGNORE = -100


def inputs(t, h, v, dtype, device="cpu", scale=1.0):
    """Hidden states, head, targets with one in four ignored (never the first)."""
    hidden = torch.randn(t, h, device=device).to(dtype)
    weight = (scale * torch.randn(v, h, device=device) / h**0.5).to(dtype)
    targets = torch.randint(v, (t,), device=device)
    return hidden, weight, torch.where(torch.arange(t, device=device) % 4 == 3, IGNORE, targets)


def compare(hidden, weight, targets, token_weights=None, **options):
    hold_to_reference(
        lambda x, w: linear_cross_entropy(x, w, targets, token_weights=token_weights, **options)[0],
        lambda x, w: linear_cross_entropy_reference(x, w, targets, token_weights=token_weights)[0],
        [hidden, weight],
    )


def gradients(hidden, weight, targets, **options):
    """(sum, losses, gradient of hidden, gradient of weight)."""
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    total, losses = linear_cross_entropy(x, w, targets, **options)
    total.backward()
    return total.detach(), losses, x.grad, w.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("t", "h", "v"), [(1, 8, 2), (7, 16, 97), (5, 24, BLOCK), (3, 8, BLOCK + 301), (13, 64, 1000)], ids=str
)
def test_equals_reference(t, h, v, dtype, device):
    compare(*inputs(t, h, v, dtype, device))


@settings(max_examples=8, deadline=None)
@given(t=st.integers(1, 6), h=st.integers(8, 70), v=st.integers(2, 100), chunk=st.integers(1, 7))
def test_any_shape_and_chunk(t, h, v, chunk):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare(*inputs(t, h, v, torch.float32, device), chunk_rows=chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_of_the_tokens(dtype, device):
    hidden, weight, targets = inputs(90, 16, 50, dtype, device)  # enough tokens for the bound not to be luck
    _, losses = linear_cross_entropy(hidden, weight, targets, chunk_rows=40)
    truth = linear_cross_entropy_reference(hidden.double(), weight.double(), targets)[1]
    theirs = linear_cross_entropy_reference(hidden, weight, targets)[1]
    assert losses.dtype is torch.float32
    assert relative_error(losses, truth) <= max(2 * relative_error(theirs, truth), 1e-6)
    assert torch.equal(losses == 0, targets == IGNORE)


def test_strided_inputs(device):
    hidden, weight, targets = inputs(6, 20, 40, torch.float32, device)
    compare(hidden.t().contiguous().t(), weight.t().contiguous().t(), targets)
    compare(torch.randn(6, 40, device=device)[:, ::2], torch.randn(40, 60, device=device)[:, 7:27], targets)
    compare(hidden, weight, torch.stack([targets, targets], dim=1)[:, 0])


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 8, 100])
def test_chunks_change_nothing(chunk, device):
    hidden, weight, targets = inputs(7, 16, 60, torch.float32, device)
    whole = gradients(hidden, weight, targets)
    for ours, theirs in zip(gradients(hidden, weight, targets, chunk_rows=chunk), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_weights(dtype, device):
    hidden, weight, targets = inputs(9, 16, 70, dtype, device)
    token_weights = torch.rand(9, device=device)
    token_weights[2] = 0.0
    compare(hidden, weight, targets, token_weights, chunk_rows=4)
    _, losses, d_hidden, _ = gradients(hidden, weight, targets, token_weights=token_weights)
    assert losses[2] == 0
    assert not d_hidden[2].any()


def test_left_out_rows_change_nothing(device):
    hidden, weight, targets = inputs(11, 16, 70, torch.float32, device)
    token_weights = torch.rand(11, device=device)
    rows = (targets != IGNORE).nonzero().squeeze(1)
    compare(hidden, weight, targets, token_weights, rows=rows, chunk_rows=3)
    whole = gradients(hidden, weight, targets, token_weights=token_weights)
    for ours, theirs in zip(
        gradients(hidden, weight, targets, token_weights=token_weights, rows=rows), whole, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_left_out_rows_are_not_computed(device):
    hidden, weight, targets = inputs(5, 16, 70, torch.float32, device)
    hidden[3] = torch.nan  # would spread into the gradient of weight
    rows = torch.tensor([0, 1, 2, 4], device=device)
    assert all(torch.isfinite(x).all() for x in gradients(hidden, weight, targets, rows=rows))


@pytest.mark.parametrize("rows", [None, []], ids=["all ignored", "no rows"])
def test_nothing_to_learn(rows, device):
    hidden, weight, targets = inputs(5, 16, 70, torch.float32, device)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device)
    for x in gradients(hidden, weight, torch.full_like(targets, IGNORE), rows=rows):
        assert torch.equal(x, torch.zeros_like(x))


def test_empty(device):
    hidden, weight, targets = inputs(0, 16, 70, torch.float32, device)
    total, losses, d_hidden, d_weight = gradients(hidden, weight, targets)
    assert total == 0
    assert losses.shape == (0,)
    assert d_hidden.shape == hidden.shape
    assert torch.equal(d_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_very_large_logits(dtype, device):
    """Around 1e4 and exact, so nothing is lost before the loss; x - (M + log L) would lose three digits in fp32."""
    unit = max(0.25, 2**13 * torch.finfo(dtype).eps)
    hidden, weight = (torch.randint(-1, 2, (n, 16), device=device).to(dtype) for n in (8, 90))
    weight *= unit
    hidden[:, 0], weight[:, 0] = 96.0, 100.0  # all logits move by 9600
    targets = torch.randint(90, (8,), device=device)
    _, losses, d_hidden, d_weight = gradients(hidden, weight, targets)
    w = weight.double().requires_grad_()
    total, truth = linear_cross_entropy_reference(hidden.double(), w, targets)
    total.backward()
    assert relative_error(losses, truth) < 4 * torch.finfo(torch.float32).eps
    assert relative_error(d_weight, w.grad) < 4 * torch.finfo(dtype).eps
    assert torch.isfinite(d_hidden).all()


def test_logits_far_apart(device):
    compare(*inputs(8, 16, 90, torch.float32, device, scale=1e4))


@pytest.mark.parametrize("step", [3.0, -3.0], ids=["rising", "falling"])
def test_maximum_in_any_block(step, device):
    hidden, weight, targets = inputs(4, 16, 2 * BLOCK + 17, torch.float32, device)
    hidden[:, 0], weight[:, 0] = 1.0, step * (torch.arange(2 * BLOCK + 17, device=device) // BLOCK)
    compare(hidden, weight, targets)


def test_target_outside_the_vocabulary_is_an_infinite_loss(device):
    hidden, weight, _ = inputs(3, 16, 70, torch.float32, device)
    _, losses = linear_cross_entropy(hidden, weight, torch.tensor([70, 69, -1], device=device))
    assert losses.isinf().tolist() == [True, False, True]


def test_gradient_of_the_sum_scales_both(device):
    hidden, weight, targets = inputs(5, 16, 30, torch.float16, device)
    _, _, d_hidden, d_weight = gradients(hidden, weight, targets)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    total, _ = linear_cross_entropy(x, w, targets)
    for _ in range(2):  # the graph can be kept
        dx, dw = torch.autograd.grad(total, (x, w), torch.tensor(0.3, device=device), retain_graph=True)
        assert relative_error(dx, 0.3 * d_hidden.double()) < torch.finfo(torch.float16).eps
        assert relative_error(dw, 0.3 * d_weight.double()) < torch.finfo(torch.float16).eps


def test_only_the_gradients_that_are_wanted(device):
    hidden, weight, targets = inputs(5, 16, 30, torch.float32, device)
    _, losses, d_hidden, d_weight = gradients(hidden, weight, targets)
    total, _ = linear_cross_entropy(hidden.detach().requires_grad_(), weight, targets)
    assert torch.equal(torch.autograd.grad(total, total.grad_fn.next_functions[0][0].variable)[0], d_hidden)
    leaf = weight.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(linear_cross_entropy(hidden, leaf, targets)[0], leaf)[0], d_weight)
    with torch.no_grad():
        total, same = linear_cross_entropy(hidden, leaf, targets)
    assert not total.requires_grad
    assert torch.equal(same, losses)


def test_weight_gradient_into_a_buffer(device):
    hidden, weight, targets = inputs(6, 16, 30, torch.float16, device)
    _, _, d_hidden, d_weight = gradients(hidden, weight, targets, chunk_rows=4)
    before = torch.randn(30, 16, device=device)
    buffer = before.clone()
    _, _, dx, dw = gradients(hidden, weight, targets, chunk_rows=4, weight_gradient=buffer)
    assert torch.equal(dx, d_hidden)
    assert dw is None
    assert relative_error(buffer - before, d_weight) < torch.finfo(torch.float16).eps
    x = hidden.detach().requires_grad_()
    (2 * linear_cross_entropy(x, weight, targets, weight_gradient=buffer)[0]).backward()
    assert x.grad.isnan().all()  # the buffer has the gradient for 1


def test_two_runs_give_equal_bits(device):
    hidden, weight, targets = inputs(9, 32, 200, torch.float32, device)
    first, second = (gradients(hidden, weight, targets, chunk_rows=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class LargestTensor(TorchDispatchMode):
    """Most values in any tensor that an operator returned."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.values = max(self.values, x.numel())
        return result


@pytest.mark.parametrize("given", [False, True], ids=["all rows", "given rows"])
def test_never_holds_all_logits(given, device):
    t, h, v, chunk = 32, 4, 200, 8
    hidden, weight, targets = inputs(t, h, v, torch.float32, device)
    with LargestTensor() as largest:
        gradients(hidden, weight, targets, chunk_rows=chunk, rows=torch.arange(t, device=device) if given else None)
    assert largest.values == chunk * v


def test_opcheck(device):
    logits, targets = torch.randn(4, 60, device=device)[:, :50], torch.randint(100, (4,), device=device)
    statistics = torch.ops.megavl.cross_entropy_statistics(logits, targets, 25)
    torch.library.opcheck(torch.ops.megavl.cross_entropy_statistics.default, (logits, targets, 25))
    arguments = (logits, targets, torch.ones(4, device=device), statistics.repeat(2, 1, 1), 25)
    for gradient in (True, False):
        torch.library.opcheck(torch.ops.megavl.cross_entropy_gradient_.default, (*arguments, gradient))


H, W, T = torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": H.double()}, "hidden is float64; supported are float32, float16, bfloat16"),
        ({"hidden": H.unsqueeze(0)}, r"hidden has shape \(1, 3, 8\); supported is \[tokens, hidden size\]"),
        ({"weight": W.half()}, "weight is float16; supported are float32"),
        ({"weight": W[:, :7]}, r"weight has shape \(5, 7\), the last dimension of hidden is 8"),
        ({"targets": T.int()}, "targets is int32; supported are int64"),
        ({"targets": T[:2]}, r"targets has shape \(2,\), hidden has 3 tokens"),
        ({"token_weights": T}, "token_weights is int64; supported are float32"),
        ({"token_weights": torch.ones(4)}, r"token_weights has shape \(4,\), hidden has 3 tokens"),
        ({"rows": torch.ones(2)}, "rows is float32; supported are int64"),
        ({"rows": torch.arange(4)}, r"rows has shape \(4,\); supported are up to 3 token indices"),
        ({"weight_gradient": torch.ones(5, 7)}, r"weight_gradient has shape \(5, 7\), weight has \(5, 8\)"),
        ({"chunk_rows": 0}, "chunk_rows is 0; supported is 1 or more"),
    ],
    ids=str,
)
def test_refusals(change, message, device):
    arguments = {"hidden": H, "weight": W, "targets": T, **change}
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)
