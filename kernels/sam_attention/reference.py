"""SAM attention in plain PyTorch: softmax(q . k / sqrt(d) + q . H[r - u] + q . W[s - v]) v, the whole bias in memory.

(r, s) is the query's row and column in its attention area, (u, v) the key's; the position terms use the unscaled query.

Shapes: i images, g grid rows, f grid columns, c channels, n heads, d head size, b attention areas (the grid or its
windows), y and x rows and columns of an area, t = y*x.
"""

import torch
from torch import Tensor
from torch.nn import functional


def sam_attention_reference(
    qkv: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, qkv_bias: Tensor | None = None, window: int = 0
) -> Tensor:
    """Attend over the grid or within windows of it, at least in fp32 inside.

    Args:
        qkv: output of the qkv projection on the unpadded grid, [i, g, f, 3c].
        rel_pos_h: one row per distance between rows, from 1 - y to y - 1, [2y - 1, d].
        rel_pos_w: the same between columns, [2x - 1, d].
        qkv_bias: bias of the projection, [3c]: what the projection makes of a zero, hence q, k and v of the padding.
        window: side of the windows, 0 for the whole grid. Windows stick out at the bottom and right; patches there
            take part like any other, as in SAM.

    Returns:
        [i, g, f, c] in the type of `qkv`, before the output projection.
    """
    inner = torch.promote_types(qkv.dtype, torch.float32)
    areas = partition(qkv, qkv_bias, window).to(inner)  # [b, y, x, 3c]
    b, y, x, _ = areas.shape
    d = rel_pos_h.shape[1]
    query, key, value = areas.reshape(b, y * x, 3, -1, d).permute(2, 0, 3, 1, 4)  # 3 times [b, n, t, d]
    scores = (query @ key.transpose(-1, -2)) * d**-0.5  # [b, n, t, t]
    scores = scores + position_bias(query, rel_pos_h.to(inner), rel_pos_w.to(inner), (y, x))
    attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(b, y, x, -1)
    return join(attended, qkv.shape[1], qkv.shape[2]).to(qkv.dtype)


def position_bias(query: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, area: tuple[int, int]) -> Tensor:
    """The term of the relative positions for all pairs: query [b, n, t, d], area (y, x) -> [b, n, t, t]."""
    rows, columns = position_terms(query, rel_pos_h, rel_pos_w, area)
    return (rows[..., :, None] + columns[..., None, :]).flatten(3)


def position_terms(query: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, area: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One number per query and key row, one per query and key column: [b, n, t, d] -> [b, n, t, y], [b, n, t, x]."""
    b, n, t, d = query.shape
    by_place = query.reshape(b, n, *area, d)
    rows = torch.einsum("bnrsd,rud->bnrsu", by_place, rel_pos_h[distances(area[0], query.device)])
    columns = torch.einsum("bnrsd,svd->bnrsv", by_place, rel_pos_w[distances(area[1], query.device)])
    return rows.reshape(b, n, t, area[0]), columns.reshape(b, n, t, area[1])


def distances(side: int, device: torch.device) -> Tensor:
    """Row of the position table for query line r and key line u: r - u + side - 1, int64 [side, side]."""
    line = torch.arange(side, device=device)
    return line[:, None] - line[None, :] + side - 1


def partition(grid: Tensor, padding: Tensor | None, window: int) -> Tensor:
    """Cut a grid into windows, padded at the bottom and right with `padding` ([c], None: zeros).

    [i, g, f, c] -> [b, window, window, c], image by image in reading order; unchanged where `window` is 0.
    """
    if not window:
        return grid
    i, g, f, c = grid.shape
    down, right = -(-g // window), -(-f // window)
    padded = functional.pad(grid, (0, 0, 0, right * window - f, 0, down * window - g))
    if padding is not None:
        inside = functional.pad(grid.new_ones(g, f, 1), (0, 0, 0, right * window - f, 0, down * window - g)).bool()
        padded = torch.where(inside, padded, padding)
    windows = padded.view(i, down, window, right, window, c).transpose(2, 3)
    return windows.reshape(-1, window, window, c)


def join(areas: Tensor, g: int, f: int) -> Tensor:
    """Put areas back into their grids and drop the padding: [b, y, x, c] -> [i, g, f, c]."""
    _, y, x, c = areas.shape
    down, right = -(-g // y), -(-f // x)
    grid = areas.view(-1, down, right, y, x, c).transpose(2, 3)  # [i, down, y, right, x, c]
    return grid.reshape(-1, down * y, right * x, c)[:, :g, :f]
