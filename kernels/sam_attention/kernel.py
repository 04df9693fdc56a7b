"""SAM attention, forward: softmax(q . k / sqrt(d) + q . H[r - u] + q . W[s - v]) v over the patch grid or its windows.

(r, s) is the query's row and column in its attention area, (u, v) the key's; the position terms use the unscaled q.

A key tile is whole rows of the area, so the column term q . W[s - v] is one tile for all iterations, kept in registers,
with -inf in columns that do not exist: masking keys costs nothing. Softmax is online and in base 2.

Whole grid: one grid row is one key tile, so the row term is one number per query and iteration, added to the maximum
instead of to each score. `position_terms` writes both terms of all queries beforehand (2*64 numbers per query and head
instead of 4096); a program computing them itself would have to pick a column of a register tile in each iteration.

Windows: a tile is four window rows of 14, padded to 16. Both terms stay in the program: q . [H | W]^T is one small
product, `gather` picks the distance to each row and column, and the terms join the scores as a second product with the
indicators of each key's row and column. Patches that stick out of the grid are read from the qkv bias.
"""

import torch
import triton
import triton.language as tl

from megavl.kernels.ahead_of_time import Variant

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def position_terms(
    p_qkv,  # [i, lines, tokens, 3, HEADS, D] by strides; or [i, tokens, lines, ...] with the strides exchanged
    p_rel,  # [2*LINES - 1, D] position table for distances between lines
    p_terms,  # [i*HEADS, ...] output, log2(e) * q . rel[line - u], by the strides below
    image_stride,
    line_stride,
    token_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    LINES: tl.constexpr,
    TOKENS: tl.constexpr,
    LINE_OUT: tl.constexpr,  # strides of the output for line, token, and u
    TOKEN_OUT: tl.constexpr,
    TERM_OUT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """All position terms of one line of patches: a line is a row of the grid, or a column of it."""
    i_area = (tl.program_id(0) // LINES).to(tl.int64)  # image * HEADS + head
    i_line = tl.program_id(0) % LINES
    o_t = tl.arange(0, BLOCK_T)
    o_u = tl.arange(0, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < TOKENS
    m_u = o_u < LINES
    m_d = o_d < D
    p_q = p_qkv + (i_area // HEADS) * image_stride + (i_area % HEADS) * D + i_line * line_stride
    b_q = tl.load(p_q + o_t[:, None] * token_stride + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
    o_rel = (i_line - o_u + LINES - 1)[:, None] * D + o_d[None, :]
    b_rel = tl.load(p_rel + o_rel, mask=m_u[:, None] & m_d[None, :], other=0.0)  # [BLOCK_L, BLOCK_D]
    b_terms = _dot(b_q, tl.trans(b_rel), tl.zeros([BLOCK_T, BLOCK_L], dtype=tl.float32), UPCAST) * LOG2E
    o_out = i_area * (LINES * TOKENS * LINES) + i_line * LINE_OUT + o_t[:, None] * TOKEN_OUT + o_u[None, :] * TERM_OUT
    tl.store(p_terms + o_out, b_terms.to(p_terms.dtype.element_ty), mask=m_t[:, None] & m_u[None, :])


@triton.jit
def global_attention(
    p_qkv,  # [i, GRID_H, GRID_W, 3, HEADS, D] by strides; adjacent from HEADS on
    p_rows,  # [i*HEADS, GRID_H, GRID_H*GRID_W] row terms: key row, query; times log2(e)
    p_columns,  # [i*HEADS, GRID_H*GRID_W, GRID_W] column terms: query, key column; times log2(e)
    p_y,  # [i, GRID_H*GRID_W, HEADS, D] output
    image_stride,
    row_stride,
    column_stride,
    scale,  # log2(e) / sqrt(D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys: one row of the grid
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_M queries of one head against all keys."""
    T: tl.constexpr = GRID_H * GRID_W
    TILES: tl.constexpr = (T + BLOCK_M - 1) // BLOCK_M
    i_area = (tl.program_id(0) // TILES).to(tl.int64)  # image * HEADS + head; tiles that share keys run together
    o_t = (tl.program_id(0) % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_x = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < T
    m_x = o_x < GRID_W
    m_d = o_d < D
    p_head = p_qkv + (i_area // HEADS) * image_stride + (i_area % HEADS) * D
    o_q = (o_t // GRID_W) * row_stride + (o_t % GRID_W) * column_stride
    b_q = tl.load(p_head + o_q[:, None] + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
    o_columns = (i_area * T + o_t)[:, None] * GRID_W + o_x[None, :]
    b_columns = tl.load(p_columns + o_columns, mask=m_t[:, None] & m_x[None, :], other=0.0).to(tl.float32)
    b_columns = tl.where(m_x[None, :], b_columns, float("-inf"))  # [BLOCK_M, BLOCK_N]
    p_k = p_head + HEADS * D + o_x[:, None] * column_stride + o_d[None, :]
    p_rows += i_area * (GRID_H * T)
    m_k = m_x[:, None] & m_d[None, :]
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_y = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_next = tl.load(p_rows + o_t, mask=m_t, other=0.0)  # [BLOCK_M] each is read once, from far: one iteration ahead
    for i_row in range(GRID_H):
        b_k = tl.load(p_k + i_row * row_stride, mask=m_k, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(p_k + i_row * row_stride + HEADS * D, mask=m_k, other=0.0)
        b_row = b_next.to(tl.float32)
        b_next = tl.load(p_rows + (i_row + 1) * T + o_t, mask=m_t & (i_row + 1 < GRID_H), other=0.0)
        b_s = _dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), UPCAST) * scale + b_columns
        b_max, b_sum, b_y = _attend(b_s, b_row, b_v, b_max, b_sum, b_y, UPCAST)
    b_y = b_y / b_sum[:, None]
    o_y = ((i_area // HEADS) * T + o_t)[:, None] * (HEADS * D) + (i_area % HEADS) * D + o_d[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit
def window_attention(
    p_qkv,  # [i, grid_h, grid_w, 3, HEADS, D] by strides; adjacent from HEADS on
    p_bias,  # [3, HEADS, D] q, k and v of a patch outside the grid
    p_rel_h,  # [2*SIDE - 1, D]
    p_rel_w,  # [2*SIDE - 1, D]
    p_y,  # [i, grid_h, grid_w, HEADS, D] output
    image_stride,
    row_stride,
    column_stride,
    grid_h,
    grid_w,
    scale,  # log2(e) / sqrt(D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SIDE: tl.constexpr,  # of a window
    ROWS: tl.constexpr,  # window rows in a tile
    BLOCK_X: tl.constexpr,  # columns in a tile
    BLOCK_A: tl.constexpr,  # SIDE, rounded up
    BLOCK_R: tl.constexpr,  # rows of a position table, rounded up
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """ROWS rows of one window and head against the whole window."""
    BLOCK: tl.constexpr = ROWS * BLOCK_X
    TILES: tl.constexpr = (SIDE + ROWS - 1) // ROWS
    i_tile = tl.program_id(0) % TILES
    i_head = tl.program_id(0) // TILES % HEADS
    i_window = tl.program_id(0) // (TILES * HEADS)
    windows_x = (grid_w + SIDE - 1) // SIDE
    windows = windows_x * ((grid_h + SIDE - 1) // SIDE)
    i_image = (i_window // windows).to(tl.int64)
    first_row = i_window % windows // windows_x * SIDE
    first_column = i_window % windows % windows_x * SIDE
    if first_row + i_tile * ROWS >= grid_h:  # all queries of the tile lie below the grid
        return

    o_block = tl.arange(0, BLOCK)
    o_x = o_block % BLOCK_X
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_head = p_qkv + i_image * image_stride + i_head * D
    b_x = first_column + o_x  # column in the grid
    m_x = o_x < SIDE

    o_r = i_tile * ROWS + o_block // BLOCK_X  # query's row in the window
    b_r = first_row + o_r
    m_q = (o_r < SIDE) & m_x & (b_r < grid_h) & (b_x < grid_w)  # queries outside the grid are not computed
    p_q = p_head + b_r[:, None] * row_stride + b_x[:, None] * column_stride + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q[:, None] & m_d[None, :], other=0.0)  # [BLOCK, BLOCK_D]
    b_terms = _window_terms(b_q, p_rel_h, p_rel_w, o_r, o_x, scale, D, SIDE, BLOCK_A, BLOCK_R, BLOCK_D, UPCAST)
    o_a = tl.arange(0, 2 * BLOCK_A)[:, None]

    b_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    b_y = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    for i_keys in range(TILES):
        o_u = i_keys * ROWS + o_block // BLOCK_X
        b_u = first_row + o_u
        m_inside = (b_u < grid_h) & (b_x < grid_w)
        m_k = ((o_u < SIDE) & m_x)[:, None] & m_d[None, :]
        p_inside = p_head + HEADS * D + b_u[:, None] * row_stride + b_x[:, None] * column_stride + o_d[None, :]
        p_k = tl.where(m_inside[:, None], p_inside, p_bias + (HEADS + i_head) * D + o_d[None, :])
        b_k = tl.load(p_k, mask=m_k, other=0.0)  # [BLOCK, BLOCK_D]
        b_v = tl.load(p_k + HEADS * D, mask=m_k, other=0.0)
        b_of_key = ((o_a == o_u[None, :]) | (o_a == BLOCK_A + o_x[None, :])).to(b_q.dtype)  # [2*BLOCK_A, BLOCK]
        b_s = _dot(b_q, tl.trans(b_k), tl.zeros([BLOCK, BLOCK], dtype=tl.float32), UPCAST)
        b_s = _dot(b_terms, b_of_key, b_s, UPCAST)
        b_s = tl.where(((o_u < SIDE) & m_x)[None, :], b_s * scale, float("-inf"))
        b_max, b_sum, b_y = _attend(b_s, tl.zeros([BLOCK], dtype=tl.float32), b_v, b_max, b_sum, b_y, UPCAST)
    b_y = b_y / b_sum[:, None]
    o_y = ((i_image * grid_h + b_r) * grid_w + b_x)[:, None] * (HEADS * D) + i_head * D + o_d[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])


@triton.jit
def _window_terms(
    b_q,  # [queries, BLOCK_D]
    p_rel_h,
    p_rel_w,
    o_r,  # [queries] their rows in the window
    o_s,  # [queries] their columns
    scale,
    D: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Row terms, then column terms of each query: [queries, 2*BLOCK_A], divided by `scale` and times log2(e)."""
    o_rel = tl.arange(0, 2 * BLOCK_R)  # both tables, one below the other
    o_d = tl.arange(0, BLOCK_D)
    m_rel = (o_rel % BLOCK_R < 2 * SIDE - 1)[:, None] & (o_d < D)[None, :]
    p_rel = tl.where((o_rel < BLOCK_R)[:, None], p_rel_h + o_d[None, :], p_rel_w + o_d[None, :])
    b_rel = tl.load(p_rel + (o_rel % BLOCK_R)[:, None] * D, mask=m_rel, other=0.0)  # [2*BLOCK_R, BLOCK_D]
    b_zero = tl.zeros([b_q.shape[0], 2 * BLOCK_R], dtype=tl.float32)
    b_by_distance = _dot(b_q, tl.trans(b_rel), b_zero, UPCAST) * (LOG2E / scale)
    o_a = tl.arange(0, 2 * BLOCK_A)[None, :]
    o_distance = tl.where(o_a < BLOCK_A, o_r[:, None], o_s[:, None]) - o_a % BLOCK_A + SIDE - 1
    o_distance = tl.minimum(tl.maximum(o_distance, 0), 2 * SIDE - 2)  # places that do not exist are never chosen
    return tl.gather(b_by_distance, tl.where(o_a < BLOCK_A, 0, BLOCK_R) + o_distance, 1).to(b_q.dtype)


@triton.jit
def _attend(b_s, b_row, b_v, b_max, b_sum, b_y, UPCAST: tl.constexpr):
    """Take one key tile into the online softmax: scores b_s + b_row (one number per query) in base 2."""
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) + b_row)
    b_p = tl.exp2(b_s - (b_new - b_row)[:, None])
    b_keep = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_keep + tl.sum(b_p, axis=1)
    b_y = _dot(b_p.to(b_v.dtype), b_v, b_y * b_keep[:, None], UPCAST)
    return b_new, b_sum, b_y


@triton.jit
def _dot(b_a, b_b, b_c, UPCAST: tl.constexpr):
    """a @ b + c in fp32; UPCAST where the interpreter would multiply half-precision bit patterns."""
    if UPCAST:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_c, input_precision="ieee")


def term_blocks(lines: int, tokens: int, head_size: int) -> dict[str, int]:
    """Launch constants of `position_terms`."""
    sizes = {"BLOCK_L": lines, "BLOCK_T": tokens, "BLOCK_D": head_size}
    return {name: _block(size) for name, size in sizes.items()}


def global_blocks(tokens: int, width: int, head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch constants of `global_attention`: 128 queries for SAM's shape, fewer where registers would not do.

    From compiled code, not timed yet. With 128 queries per 64 keys, 400 TFLOP/s need 3.2 TB/s of keys and values from
    the L2 cache, with 64 queries twice that. On sm_90 one block of 137 registers runs per multiprocessor; held to 128,
    where two would, it spills 16 bytes. fp32 is there for comparison: its products use no tensor cores.
    """
    block_n, block_d = _block(width), _block(head_size)
    queries = 32 if dtype is torch.float32 else 64 if max(block_n, block_d) > 64 else 128
    queries = min(queries, _block(tokens))
    stage_bytes = 2 * block_n * block_d * dtype.itemsize
    return {
        **{"BLOCK_M": queries, "BLOCK_N": block_n, "BLOCK_D": block_d},
        "num_warps": 8 if queries == 128 else 4,
        "num_stages": min(3, max(1, 2**17 // stage_bytes)),
    }


def window_blocks(window: int, head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch constants of `window_attention`: tiles of 64 patches, 32 in fp32. From compiled code, not timed yet.

    Adding both terms to the scores by `gather` instead of a product took 237 registers on sm_90 and spilled on sm_80.
    """
    columns = triton.next_power_of_2(window)
    patches = 32 if dtype is torch.float32 else 64
    return {
        **{"ROWS": max(1, patches // columns), "BLOCK_X": columns, "BLOCK_A": max(8, columns)},
        **{"BLOCK_R": _block(2 * window - 1), "BLOCK_D": _block(head_size)},
        "num_warps": 4,
        "num_stages": 2,
    }


def _block(size: int) -> int:
    """A power of two that holds `size` and that tl.dot takes."""
    return max(16, triton.next_power_of_2(size))


def variants() -> list[Variant]:
    """SAM-B in bf16 on the 64x64 grid: 12 heads of 64, windows of 14."""
    tensor_cores = {80: ("HMMA", "LDGSTS"), 90: ("HGMMA", "LDGSTS")}
    strides = {"image_stride": "i32", "row_stride": "i32", "column_stride": "i32"}
    shape = {"HEADS": 12, "D": 64, "UPCAST": False}
    whole, windows = global_blocks(4096, 64, 64, torch.bfloat16), window_blocks(14, 64, torch.bfloat16)
    return [
        Variant(
            op="sam_attention",
            name="position terms 64x64",
            kernel=position_terms,
            arguments={
                **dict.fromkeys(("p_qkv", "p_rel", "p_terms"), "*bf16"),
                **dict.fromkeys(("image_stride", "line_stride", "token_stride"), "i32"),
            },
            constants={
                **shape,
                **{"LINES": 64, "TOKENS": 64, "LINE_OUT": 64, "TOKEN_OUT": 1, "TERM_OUT": 4096},
                **term_blocks(64, 64, 64),
            },
            expects={80: ("HMMA",), 90: ("HGMMA",)},
        ),
        Variant(
            op="sam_attention",
            name="global 64x64 d64",
            kernel=global_attention,
            arguments={
                **dict.fromkeys(("p_qkv", "p_rows", "p_columns", "p_y"), "*bf16"),
                **{**strides, "scale": "fp32"},
            },
            num_warps=whole.pop("num_warps"),
            num_stages=whole.pop("num_stages"),
            constants={**shape, **whole, "GRID_H": 64, "GRID_W": 64},
            expects=tensor_cores,
            tries=(
                {"num_stages": 2},
                {"num_stages": 4},
                {"BLOCK_M": 64, "num_warps": 4},
                {"BLOCK_M": 64, "num_warps": 4, "num_stages": 2},
                {"BLOCK_M": 256, "num_warps": 16},
            ),
            measured_by=("mb8 global", "forward"),
        ),
        Variant(
            op="sam_attention",
            name="window 14 of 64x64 d64",
            kernel=window_attention,
            arguments={
                **dict.fromkeys(("p_qkv", "p_bias", "p_rel_h", "p_rel_w", "p_y"), "*bf16"),
                **{**strides, "grid_h": "i32", "grid_w": "i32", "scale": "fp32"},
            },
            num_warps=windows.pop("num_warps"),
            num_stages=windows.pop("num_stages"),
            constants={**shape, **windows, "SIDE": 14},
            expects=tensor_cores,
            tries=({"num_stages": 1}, {"num_stages": 3}, {"num_warps": 8}),
            measured_by=("mb8 window", "forward"),
        ),
    ]
