"""Gradient of SAM attention in plain PyTorch: correct and bounded in memory, not fast.

No training stage of DeepSeek-VL trains the SAM blocks, so their attention has no fused backward pass. Should someone
train them, this recomputes the attention weights for a block of query rows at a time and forms every gradient in fp32
(P attention weights; R(dS) sums dS over the keys of a row, C(dS) over those of a column):

    dV = P^T dY,  dP = dY V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = dS K / sqrt(d) + R(dS) H + C(dS) W,
    dK = dS^T Q / sqrt(d),  dH[r - u] += R(dS)[r, u] Q[r],  dW[s - v] += C(dS)[s, v] Q[s]

No atomics: two runs give equal bits. Shapes: as in reference.py; r query rows of a block, a areas of a block.
"""

import torch
from torch import Tensor

from megavl.kernels.sam_attention.reference import distances, join, partition

BLOCK_BYTES = 128 * 2**20
"""About the size of the attention weights of one block; a few temporaries of that size exist at a time."""


def sam_attention_gradients(
    dy: Tensor, qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs.

    Args:
        dy: gradient of the output, [i, g, f, c].
        qkv: as in the forward pass, likewise the others.

    Returns:
        Gradients of qkv, rel_pos_h, rel_pos_w and qkv_bias ([0] where that is None; else the padding's part).
    """
    d = rel_pos_h.shape[1]
    areas = partition(qkv, qkv_bias, window)
    b, y, x, _ = areas.shape
    query, key, value = areas.reshape(b, y, x, 3, -1, d).permute(3, 0, 4, 1, 2, 5)  # 3 times [b, n, y, x, d]
    dout = partition(dy, None, window).reshape(b, y, x, -1, d).permute(0, 3, 1, 2, 4)  # [b, n, y, x, d]
    h = rel_pos_h.float()[distances(y, qkv.device)]  # [y, y, d]
    w = rel_pos_w.float()[distances(x, qkv.device)]  # [x, x, d]

    dsplit = torch.empty(3, *query.shape, dtype=torch.float32, device=qkv.device)
    dh, dw = torch.zeros_like(h), torch.zeros_like(w)
    step = max(1, BLOCK_BYTES // _row_bytes(query) // y)  # areas at a time
    for first in range(0, b, step):
        part = slice(first, first + step)
        some = dout[part].float(), query[part].float(), key[part].float(), value[part].float()
        dsplit[:, part], h_part, w_part = _some_areas(*some, h, w)
        dh += h_part
        dw += w_part

    dareas = dsplit.permute(1, 3, 4, 0, 2, 5).reshape(areas.shape)  # [b, y, x, 3c]
    dbias = qkv.new_empty(0)
    if qkv_bias is not None:
        padding = 1 - partition(torch.ones_like(qkv[..., :1], dtype=torch.float32), None, window)
        dbias = (dareas * padding).sum((0, 1, 2)).to(qkv_bias.dtype)
    dqkv = join(dareas, qkv.shape[1], qkv.shape[2]).to(qkv.dtype).contiguous()
    return dqkv, _by_distance(dh, rel_pos_h), _by_distance(dw, rel_pos_w), dbias


def _row_bytes(query: Tensor) -> int:
    """Bytes of one query row's attention weights in one area, all heads: query [b, n, y, x, d]."""
    _, n, y, x, _ = query.shape
    return 4 * n * x * y * x


def _some_areas(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, h: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value together, [3, a, n, y, x, d], and these areas' part of those of h and w."""
    dquery, dkey, dvalue = torch.zeros(3, *query.shape, device=query.device)
    dh, dw = torch.zeros_like(h), torch.zeros_like(w)
    y = query.shape[2]
    rows = min(y, max(1, BLOCK_BYTES // (_row_bytes(query) * query.shape[0])))
    for first in range(0, y, rows):
        block = slice(first, first + rows)
        parts = _query_rows(dy[:, :, block], query[:, :, block], key, value, h[block], w)
        dquery[:, :, block] = parts[0]
        dkey += parts[1]
        dvalue += parts[2]
        dh[block] = parts[3]
        dw += parts[4]
    return torch.stack((dquery, dkey, dvalue)), dh, dw


def _query_rows(dy: Tensor, query: Tensor, key: Tensor, value: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a block of query rows.

    Args:
        dy: gradient of their output, [a, n, r, x, d].
        query: [a, n, r, x, d].
        key: [a, n, y, x, d].
        value: [a, n, y, x, d].
        h: position vector for each query and key row, [r, y, d].
        w: the same for columns, [x, x, d].

    Returns:
        Gradients of query, and this block's part of the gradients of key, value, h and w; shaped as those.
    """
    scale = query.shape[-1] ** -0.5
    flat_query, flat_key, flat_value, flat_dy = (part.flatten(2, 3) for part in (query, key, value, dy))
    shape = (*query.shape[:-1], *key.shape[2:4])  # [a, n, r, x, y, x]
    scores = (flat_query @ flat_key.transpose(-1, -2) * scale).view(shape)
    scores = scores + torch.einsum("anrsd,rud->anrsu", query, h)[..., :, None]
    scores = scores + torch.einsum("anrsd,svd->anrsv", query, w)[..., None, :]
    weights = scores.flatten(4).flatten(2, 3).softmax(-1)  # [a, n, r*x, t]
    dweights = flat_dy @ flat_value.transpose(-1, -2)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    by_row, by_column = dscores.view(shape).sum(-1), dscores.view(shape).sum(-2)  # [a, n, r, x, y], [a, n, r, x, x]
    dquery = (dscores @ flat_key * scale).view_as(query)
    dquery = dquery + torch.einsum("anrsu,rud->anrsd", by_row, h) + torch.einsum("anrsv,svd->anrsd", by_column, w)
    dkey = (dscores.transpose(-1, -2) @ flat_query * scale).view_as(key)
    dvalue = (weights.transpose(-1, -2) @ flat_dy).view_as(value)
    dh = torch.einsum("anrsu,anrsd->rud", by_row, query)
    dw = torch.einsum("anrsv,anrsd->svd", by_column, query)
    return dquery, dkey, dvalue, dh, dw


def _by_distance(gradient: Tensor, table: Tensor) -> Tensor:
    """Sum [side, side, d] over pairs of equal distance into the shape and type of `table`, as a matrix product.

    index_add_ would use atomics on CUDA.
    """
    rows = torch.arange(table.shape[0], device=table.device)
    chosen = (rows[:, None] == distances(gradient.shape[0], table.device).flatten()).float()  # [2*side - 1, side*side]
    return (chosen @ gradient.flatten(0, 1)).to(table.dtype)
