"""SAM attention against its reference and the model's own path: forward, gradients, odd grids, windows, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.kernels.sam_attention import backward, bench
from megavl.kernels.sam_attention.op import sam_attention
from megavl.kernels.sam_attention.reference import sam_attention_reference
from megavl.model.vision.sam import SamAttention, join_windows, partition_windows
from tests.kernels.compare import DTYPES, hold_to_reference, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_inputs(
    images: int, g: int, f: int, heads: int, d: int, window: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """qkv, position tables large enough to shape the softmax, bias."""
    y, x = window or g, window or f
    shapes = [(images, g, f, 3 * heads * d), (2 * y - 1, d), (2 * x - 1, d), (3 * heads * d,)]
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def compare(inputs: list[torch.Tensor], window: int) -> None:
    hold_to_reference(
        lambda *args: sam_attention(*args, window=window),
        lambda *args: sam_attention_reference(*args, window=window),
        inputs if window else inputs[:3],  # the whole grid has no padding, and the bias no gradient
    )


SHAPES = {  # images, grid rows, grid columns, heads, head size, window
    "one patch": (1, 1, 1, 1, 16, 0),
    "one row": (2, 1, 5, 1, 16, 0),
    "not square": (1, 5, 7, 2, 16, 0),
    "wider than a block": (1, 3, 17, 1, 16, 0),
    "several query tiles": (1, 13, 11, 1, 8, 0),
    "head size 80": (1, 4, 4, 1, 80, 0),
    "windows fit": (1, 6, 4, 1, 16, 2),
    "windows stick out": (2, 5, 7, 2, 16, 3),
    "windows of 14": (1, 15, 16, 1, 64, 14),  # one row, two columns in the last windows
    "window larger than grid": (1, 3, 2, 1, 16, 5),
    "windows of one patch": (1, 2, 2, 1, 16, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_reference(shape, dtype):
    compare(make_inputs(*shape, dtype=dtype), window=shape[-1])


@settings(max_examples=8, deadline=None)
@given(g=st.integers(1, 6), f=st.integers(1, 6), d=st.integers(2, 20), window=st.integers(0, 4))
def test_any_shape(g, f, d, window):
    compare(make_inputs(1, g, f, 1, d, window), window)


@pytest.mark.parametrize("window", [0, 3])
def test_equals_the_model(window):
    """The op on the projection of the unpadded grid = the model's attention on its own padded windows."""
    heads, width, grid = 2, 32, 5
    layer = SamAttention(width, heads, area=window or grid).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, grid, grid, width, device=DEVICE)
    with torch.no_grad():
        expected = join_windows(layer(partition_windows(hidden, window)), grid) if window else layer(hidden)
        tables = layer.rel_pos_h, layer.rel_pos_w, layer.qkv.bias
        ours = layer.proj(sam_attention(layer.qkv(hidden), *tables, window=window))
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("window", [0, 2])
def test_strided_inputs(window):
    qkv, h, w, bias = make_inputs(2, 3, 4, 1, 16, window)
    compare([qkv.transpose(1, 2).contiguous().transpose(1, 2), h, w, bias], window)  # columns first
    compare(
        [qkv.repeat(1, 1, 1, 2)[..., 5:53], h.repeat(1, 2)[:, :16], w.repeat(2, 1)[::2][: w.shape[0]], bias], window
    )
    compare([qkv.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), h, w, bias], window)  # channels not adjacent


def test_position_terms_use_the_unscaled_query():
    """With equal keys only the position terms decide: the weights are softmax(q . (H + W)), whatever sqrt(d) is."""
    qkv, h, w, _ = make_inputs(1, 2, 2, 1, 16, 0)
    qkv[..., 16:32] = 1.0
    query, value = qkv[0].reshape(4, 48)[:, :16], qkv[0].reshape(4, 48)[:, 32:]
    place = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=DEVICE)
    distance = place[:, None] - place[None, :] + 1  # [query, key, (row, column)]
    weights = torch.einsum("qd,qkd->qk", query, h[distance[..., 0]] + w[distance[..., 1]]).softmax(-1)
    assert relative_error(sam_attention(qkv, h, w).reshape(4, 16), weights @ value) < 1e-5


@pytest.mark.parametrize("window", [0, 3])
def test_large_scores_stay_finite(window):
    torch.manual_seed(7)  # the two largest scores of a query must not happen to be within their rounding
    inputs = make_inputs(1, 4, 4, 1, 16, window)
    y = sam_attention(*(30 * part for part in inputs), window=window)
    truth = sam_attention_reference(*(30 * part.double() for part in inputs), window=window)
    assert relative_error(y, truth) < 1e-3  # scores reach 1e5: their own rounding decides


def test_empty():
    inputs = [part.requires_grad_() for part in make_inputs(0, 4, 4, 2, 16, 3)]
    sam_attention(*inputs, window=3).sum().backward()
    assert inputs[0].grad.shape == (0, 4, 4, 96)
    assert all(not part.grad.any() for part in inputs[1:])


def test_bias_may_be_absent_where_windows_fit():
    qkv, h, w, bias = make_inputs(1, 4, 2, 1, 16, 2)
    assert torch.equal(sam_attention(qkv, h, w, None, 2), sam_attention(qkv, h, w, bias, 2))
    qkv.requires_grad_()
    sam_attention(qkv, h, w, None, 2).sum().backward()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("window", [0, 3])
def test_gradient_in_small_blocks(window, monkeypatch):
    """Large grids are differentiated some areas and some query rows at a time."""
    monkeypatch.setattr(backward, "BLOCK_BYTES", 1)
    compare(make_inputs(2, 4, 5, 2, 16, window), window)


@pytest.mark.parametrize("window", [0, 3])
def test_two_runs_give_equal_bits(window):
    runs = []
    inputs = make_inputs(1, 5, 5, 1, 16, window)
    for _ in range(2):
        leaves = [part.clone().requires_grad_() for part in inputs]
        y = sam_attention(*leaves, window=window)
        y.square().sum().backward()
        runs.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("window", [0, 3])
def test_opcheck(window):
    qkv, *others = make_inputs(1, 4, 3, 1, 16, window)
    leaves = [qkv.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), *(p.requires_grad_() for p in others)]
    torch.library.opcheck(torch.ops.megavl.sam_attention.default, (*leaves, window))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("peer", [bench.eager, bench.sdpa_bias, bench.sdpa_folded, bench.flex])
def test_peers_of_the_benchmark_compute_the_same(peer, window):
    inputs = bench.make_inputs(2, 4, 5, 2, 16, window, DEVICE, torch.float32)
    assert relative_error(peer(*inputs, window), sam_attention_reference(*inputs, window)) < 1e-5


def test_benchmark_states_the_work():
    work = {case.name: (case.flops / 1e9, case.bytes / 1e6) for case in bench.cases()}
    assert work["mb1 global 64x64"] == pytest.approx((52.3, 25.2), rel=0.01)  # counted by hand
    assert work["mb8 window 14 64x64"] == pytest.approx((8 * 3.16, 8 * 25.2), rel=0.01)


BASE = {"qkv": (1, 4, 4, 48), "rel_pos_h": (7, 16), "rel_pos_w": (7, 16), "qkv_bias": (48,)}


@pytest.mark.parametrize(
    ("changes", "window", "message"),
    [
        ({"qkv": (4, 4, 48)}, 0, r"qkv has 3 dimensions; supported is \[images, rows, columns, 3 \* channels\]"),
        ({"qkv": (1, 4, 200, 48)}, 0, "qkv has a grid of 4 x 200 patches; supported are up to 128 a side"),
        ({"qkv": (1, 4, 4, 50)}, 0, r"qkv has 50 channels, not a multiple of 3 \* 16, the head size of rel_pos_h"),
        ({"rel_pos_h": (7, 200)}, 0, r"rel_pos_h has shape \(7, 200\); .*head size 1 to 128"),
        ({"rel_pos_w": (9, 16)}, 0, r"rel_pos_w has shape \(9, 16\); an area of 4 patches needs \(7, 16\)"),
        ({"rel_pos_w": (7, 8)}, 0, r"rel_pos_w has shape \(7, 8\); an area of 4 patches needs \(7, 16\)"),
        ({}, 3, r"rel_pos_h has shape \(7, 16\); an area of 3 patches needs \(5, 16\)"),
        ({}, 33, "window is 33; supported are 1 to 32, and 0 for the whole grid"),
        ({"qkv_bias": (16,)}, 0, r"qkv_bias has shape \(16,\), qkv has 48 channels"),
        ({"qkv_bias": None, "qkv": (1, 4, 5, 48)}, 4, "qkv_bias is missing; windows of 4 stick out of a grid of 4 x 5"),
    ],
)
def test_refuses_shapes(changes, window, message):
    shapes = {**BASE, **changes}
    inputs = {name: None if shape is None else torch.ones(shape, device=DEVICE) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        sam_attention(**inputs, window=window)


def test_refuses_types():
    inputs = {name: torch.ones(shape, device=DEVICE) for name, shape in BASE.items()}
    with pytest.raises(ValueError, match="qkv is float64; supported are float32, float16, bfloat16"):
        sam_attention(**{**inputs, "qkv": inputs["qkv"].double()})
    with pytest.raises(ValueError, match="rel_pos_h is float16; supported are float32"):
        sam_attention(**{**inputs, "rel_pos_h": inputs["rel_pos_h"].half()})
