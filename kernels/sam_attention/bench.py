"""SAM attention at DeepSeek-VL's shapes: SAM-B on 64x64 patches, 12 heads of 64, whole grid and windows of 14.

Every implementation starts from the qkv projection of the unpadded grid and ends before the output projection, in the
type that is timed: position terms, padding, partition, the way back are part of the time. Shapes: as in reference.py.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

from megavl.kernels.benchmark import Call, Case
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.sam_attention.op import sam_attention
from megavl.kernels.sam_attention.reference import (
    join,
    partition,
    position_bias,
    position_terms,
    sam_attention_reference,
)

GRID, HEADS, HEAD, WINDOW = 64, 12, 64, 14
LAYERS = {0: 4, WINDOW: 8}
"""Window -> layers of the tower; 0: the whole grid."""
IMAGES = 4
"""Images in a micro-batch of 4,096 tokens, for the share of a step."""


def cases() -> list[Case]:
    """One image and eight; forward alone, for no training stage differentiates the blocks."""
    return [_case(images, window) for images in (1, 8) for window in LAYERS]


def _case(images: int, window: int) -> Case:
    width, tokens = HEADS * HEAD, GRID * GRID
    side = window or GRID
    areas = images * (-(-GRID // side)) ** 2
    products = 4 * side**4 * width + 4 * side**3 * width  # queries with keys, weights with values; position terms

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        inputs = make_inputs(images, GRID, GRID, HEADS, HEAD, window, device, dtype)
        return {name: lambda f=f: f(*inputs, window) for name, f in implementations(device).items()}  # type: ignore[misc]

    return Case(
        op="sam_attention",
        name=f"mb{images} {f'window {window}' if window else 'global'} {GRID}x{GRID}",
        direction="forward",
        make=make,
        flops=float(areas * products),
        bytes=float(images * tokens * 4 * width * 2),
        check=check,
        share_ms=", ".join(f"{model} {LAYERS[window] * IMAGES / images}" for model in ("1.3b_hybrid", "7b")),
    )


def make_inputs(
    images: int, g: int, f: int, heads: int, d: int, window: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random qkv, position tables, bias."""
    y, x, width = window or g, window or f, 3 * heads * d
    shapes = ((images, g, f, width), (2 * y - 1, d), (2 * x - 1, d), (width,))
    qkv, h, w, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return qkv, 0.3 * h, 0.3 * w, bias


def implementations(device: torch.device) -> dict:
    """Kernel and peers by name. FlexAttention without compilation is no peer."""
    found = {
        "triton": sam_attention,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        "sdpa_bias": sdpa_bias,
        "sdpa_folded": sdpa_folded,
    }
    if device.type == "cuda":
        found["flex"] = torch.compile(flex, dynamic=False)
    return found


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradients: a grid that is not square and more than one query tile, windows that stick out of it."""
    for window in (0, 4):
        qkv, h, w, bias = make_inputs(1, 13, 11, 2, 16, window, device, dtype)
        hold_to_reference(
            lambda *args, window=window: sam_attention(*args, window=window),
            lambda *args, window=window: sam_attention_reference(*args, window=window),
            [qkv, h, w, bias] if window else [qkv, h, w],
        )


def eager(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, window: int) -> Tensor:
    """As released with SAM: scores, bias and weights of all pairs in memory."""
    query, key, value, area = _heads(qkv, rel_pos_h, qkv_bias, window)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    scores = scores + position_bias(query, rel_pos_h, rel_pos_w, area)
    return _grid(scores.softmax(-1) @ value, area, qkv)


def sdpa_bias(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, window: int) -> Tensor:
    """PyTorch's fused attention with the bias of all pairs in memory."""
    query, key, value, area = _heads(qkv, rel_pos_h, qkv_bias, window)
    bias = position_bias(query, rel_pos_h, rel_pos_w, area)
    return _grid(functional.scaled_dot_product_attention(query, key, value, attn_mask=bias), area, qkv)


def sdpa_folded(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, window: int) -> Tensor:
    """PyTorch's fused attention without a bias: position terms and key indicators as further channels."""
    query, key, value, area = _heads(qkv, rel_pos_h, qkv_bias, window)
    rows, columns = position_terms(query, rel_pos_h, rel_pos_w, area)
    y, x = area
    row_of_key = torch.eye(y, dtype=key.dtype, device=key.device).repeat_interleave(x, dim=0)  # [t, y]
    column_of_key = torch.eye(x, dtype=key.dtype, device=key.device).repeat(y, 1)  # [t, x]
    indicators = torch.cat([row_of_key, column_of_key], -1).expand(*key.shape[:2], -1, -1)
    d = query.shape[-1]
    query = functional.pad(torch.cat([query * d**-0.5, rows, columns], -1), (0, -(d + y + x) % 8))
    key = functional.pad(torch.cat([key, indicators], -1), (0, -(d + y + x) % 8))
    return _grid(functional.scaled_dot_product_attention(query, key, value, scale=1.0), area, qkv)


def flex(qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor, window: int) -> Tensor:
    """FlexAttention reading both position terms in its score function."""
    query, key, value, area = _heads(qkv, rel_pos_h, qkv_bias, window)
    rows, columns = position_terms(query, rel_pos_h, rel_pos_w, area)

    def add_terms(score, i_area, i_head, i_query, i_key):
        row, column = i_key // area[1], i_key % area[1]
        return score + rows[i_area, i_head, i_query, row] + columns[i_area, i_head, i_query, column]

    attended = flex_attention(query.contiguous(), key.contiguous(), value.contiguous(), score_mod=add_terms)
    return _grid(attended, area, qkv)


def _heads(
    qkv: Tensor, rel_pos_h: Tensor, qkv_bias: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Query, key and value, [b, n, t, d] each, and the sides of an area."""
    areas = partition(qkv, qkv_bias, window)
    b, y, x, _ = areas.shape
    query, key, value = areas.reshape(b, y * x, 3, -1, rel_pos_h.shape[1]).permute(2, 0, 3, 1, 4)
    return query, key, value, (y, x)


def _grid(attended: Tensor, area: tuple[int, int], qkv: Tensor) -> Tensor:
    """[b, n, t, d] -> [i, g, f, c]."""
    b, n, _, d = attended.shape
    areas = attended.transpose(1, 2).reshape(b, *area, n * d)
    return join(areas, qkv.shape[1], qkv.shape[2])
