"""The adaptor against the plain module: output and every gradient, both kinds, frozen parts, strides, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.kernels.adaptor.bench import eager, example, ours
from megavl.kernels.adaptor.op import hybrid_adaptor, mlp_adaptor
from tests.kernels.compare import DTYPES, hold_to_reference


def compare(inputs: list[torch.Tensor]) -> None:
    hold_to_reference(ours, eager, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("high", [None, 24], ids=["mlp_gelu", "hybrid"])
@pytest.mark.parametrize(("rows", "low", "hidden"), [(1, 8, 16), (7, 13, 22), (3, 5, 2060)], ids=str)
def test_equals_reference(rows, low, hidden, high, dtype, device):
    compare([x.to(device, dtype) for x in example(rows, high, low, hidden)])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9),
    high=st.one_of(st.none(), st.integers(1, 40)),
    low=st.integers(1, 40),
    half=st.integers(1, 40),
)
def test_any_shape(rows, high, low, half):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare([x.to(device) for x in example(rows, high, low, 2 * half)])


def test_unequal_halves(device):
    high, low, hw, _, lw, _, w, b = example(5, 6, 7, 10)
    hw, lw = torch.randn(3, 6), torch.randn(7, 7)
    compare([x.to(device) for x in (high, low, hw, torch.randn(3), lw, torch.randn(7), w, b)])


def test_equals_the_modules(device):
    """The model's own adaptors, shapes [i, p, c], with the parameters that their state dicts hold."""
    from megavl.model.vision.adaptor import HybridAdaptor, MlpAdaptor

    high, low = torch.randn(2, 3, 10, device=device), torch.randn(2, 3, 6, device=device)
    hybrid = HybridAdaptor(10, 6, 16).to(device)
    names = ("high_up_proj.weight", "high_up_proj.bias", "low_up_proj.weight", "low_up_proj.bias")
    parameters = [hybrid.get_parameter(n) for n in (*names, "layers.1.weight", "layers.1.bias")]
    torch.testing.assert_close(hybrid_adaptor(high, low, *parameters), hybrid(high, low))
    mlp = MlpAdaptor(6, 16).to(device)
    torch.testing.assert_close(mlp_adaptor(low, *mlp.parameters()), mlp(None, low))


def test_far_from_zero(device):
    """GELU and its gradient where erf is 1 to the last bit, and where both vanish."""
    x = torch.tensor([[-30.0], [-6.0], [-3.0], [0.0], [3.0], [30.0]], device=device)
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    compare([x, one, zero, one, zero])
    y = mlp_adaptor(x, one, zero, one, zero).flatten()
    assert y[0] == 0
    assert y[-1] == 30


def test_only_what_is_trainable_gets_a_gradient(device):
    """Stages 1 and 2: the low tower is frozen, so its features need none."""
    inputs = [x.to(device) for x in example(5, 6, 7, 10)]
    leaves = [x.clone().requires_grad_(i != 1) for i, x in enumerate(inputs)]
    everything = [x.clone().requires_grad_() for x in inputs]
    ours(*leaves).square().sum().backward()
    ours(*everything).square().sum().backward()
    assert leaves[1].grad is None
    assert all(torch.equal(a.grad, b.grad) for i, (a, b) in enumerate(zip(leaves, everything, strict=True)) if i != 1)
    last = [x.clone().requires_grad_(i == 7) for i, x in enumerate(inputs)]
    ours(*last).sum().backward()
    assert torch.equal(last[7].grad, torch.full_like(last[7], 5))


def test_strided_inputs(device):
    high, low, *parameters = (x.to(device) for x in example(6, 8, 10, 12))
    wide = torch.randn(6, 40, device=device)
    compare([wide[:, ::5], low, *parameters])
    compare([wide[:, 3:11], torch.randn(10, 6, device=device).t(), *parameters])
    transposed = [p.t().contiguous().t() if p.dim() == 2 else p for p in parameters]
    compare([high, low, *transposed])


def test_empty(device):
    leaves = [x.to(device).requires_grad_() for x in example(0, 6, 7, 10)]
    y = ours(*leaves)
    assert y.shape == (0, 10)
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


def test_two_runs_give_equal_bits(device):
    inputs = [x.to(device) for x in example(40, 12, 20, 24)]
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = ours(*leaves)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(device):
    high, low, *rest = (x.to(device).requires_grad_() for x in example(6, 8, 10, 12))
    shaped = (high.detach().view(2, 3, 8).requires_grad_(), low.detach().view(2, 3, 10).requires_grad_())
    torch.library.opcheck(torch.ops.megavl.adaptor.default, (*shaped, *rest))


def test_refusals(device):
    high, low, hw, hb, lw, lb, w, b = (x.to(device) for x in example(6, 8, 10, 12))
    faults = [
        ((high, low, lw, hb, lw, lb, w, b), r"high_weight has shape \(6, 10\), high has \(6, 8\)"),
        ((high, low, hw, hb[1:], lw, lb, w, b), r"high_bias has shape \(5,\), high_weight has \(6, 8\)"),
        ((high, low[1:], hw, hb, lw, lb, w, b), r"high has shape \(6, 8\), low has \(5, 10\); all but the last"),
        ((high, low, hw, hb, lw, lb, w[:, 1:], b), r"weight has shape \(12, 11\), the first layer gives 12 values"),
        ((high, low, hw, hb, lw, lb, w, b[1:]), r"bias has shape \(11,\), weight has \(12, 12\)"),
        ((high, low, hw, hb, lw.half(), lb, w, b), "low_weight is torch.float16, the other arguments are"),
        ((high, low, hw, hb, lw, lb, w.double(), b), "weight is float64; supported are"),
    ]
    for arguments, message in faults:
        with pytest.raises(ValueError, match=message):
            hybrid_adaptor(*arguments)
    with pytest.raises(ValueError, match="low_weight has shape"):
        mlp_adaptor(low, hw, hb, w, b)
