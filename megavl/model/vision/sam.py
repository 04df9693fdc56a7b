"""The high-resolution tower: SAM-B ViTDet, its neck, and the stride-2 convolutions behind it.

In: normalised images. Out: one feature per slot of the sequence, as many as the low-resolution tower gives.
Most blocks attend within windows of the patch grid; a few attend over the whole grid. Two paths leave the blocks: the
last output through `neck`, and the first global block's output through `neck_hd`, weighted by `hd_alpha_downsamples`.
Their sum is interpolated and passes `downsamples`.

Shapes: i images, S side in pixels, g patches along one side, p slots per image, c channels, n heads, d head size,
y and x rows and columns of an attention area (the grid or one window), t = y*x its patches, b attention areas.
Parameter names are those of the original DeepSeek-VL checkpoints below `vision_tower_high.vision_tower`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from megavl.config import SamConfig
from megavl.ops import PLAIN, Operator, Ops

_EPS = 1e-6


class SamTower(nn.Module):
    """Image encoder of Segment Anything with the adaptor convolutions of DeepSeek-VL."""

    def __init__(self, config: SamConfig, ops: Ops = PLAIN) -> None:
        super().__init__()
        self.branch_layer = config.global_layers[0]
        self.upsample, self.fused_resize = config.upsample, ops.interpolate
        self.resizing_conv = ops.interpolate_conv is not None
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.width))
        self.blocks = nn.ModuleList(
            SamBlock(config, 0 if layer in config.global_layers else config.window, ops.sam_attention)
            for layer in range(config.layers)
        )
        self.neck = make_neck(config)
        self.neck_hd = make_neck(config)
        middle, last = config.downsample
        self.downsamples = nn.Sequential(
            Downsample(config.neck, middle, ops.strided_conv, resizing=ops.interpolate_conv),
            Downsample(middle, last, ops.strided_conv),
        )
        # Zero at the start: the tower begins as SAM's main path, and the branch grows as far as it helps.
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor | None, trunk: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Encode images.

        Args:
            images: normalised pixels in the compute type, [i, 3, S, S]; not read if there is a `trunk`.
            trunk: what `trunk` made of the images.

        Returns:
            Features, [i, p, c], rows of the final grid first.
        """
        if trunk is None:
            assert images is not None, "neither images nor what the trunk made of them"
            trunk = self.trunk(images)
        main, branch = trunk
        side = self.neck_hd(branch.permute(0, 3, 1, 2))
        return self._join_paths(main, side).flatten(2).transpose(1, 2)  # [i, p, c]

    def trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What SAM itself makes of images, before any parameter of the adaptor (`SAM_ADAPTOR_PREFIXES`) has a part.

        Args:
            images: normalised pixels in the compute type, [i, 3, S, S].

        Returns:
            The neck's map [i, k, g, g], and the output of the first global block [i, g, g, c].
        """
        hidden = self.patch_embed(images) + self.pos_embed  # [i, g, g, c]
        branch = hidden
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden)
            if layer == self.branch_layer:
                branch = hidden
        return self.neck(hidden.permute(0, 3, 1, 2)), branch

    def _join_paths(self, main: Tensor, side: Tensor) -> Tensor:
        """Both paths after their necks, [i, c, g, g] -> [i, c, sqrt(p), sqrt(p)].

        Resizing and convolutions are linear and have no bias, so the weighted sum passes them once instead of each path
        by itself: half of that work, forward and backward.
        """
        return self._to_slots(main + side * self.hd_alpha_downsamples)

    def _to_slots(self, features: Tensor) -> Tensor:
        """[i, c, g, g] after the necks -> [i, c, sqrt(p), sqrt(p)]."""
        if self.resizing_conv:
            first, second = self.downsamples
            return second(first(features, self.upsample))
        if self.fused_resize is not None:
            return self.downsamples(self.fused_resize(features, (self.upsample, self.upsample)))
        return self.downsamples(resize_bilinear(features, self.upsample))


class Downsample(nn.Conv2d):
    """Convolution with stride 2: [i, c, y, x] -> [i, k, y/2, x/2]."""

    def __init__(self, c: int, k: int, fused: Operator | None = None, resizing: Operator | None = None) -> None:
        """Build the weight.

        Args:
            c: channels before.
            k: channels after.
            fused: `Ops.strided_conv`.
            resizing: `Ops.interpolate_conv`.
        """
        super().__init__(c, k, kernel_size=3, stride=2, padding=1, bias=False)
        self.fused, self.resizing = fused, resizing

    def forward(self, features: Tensor, side: int | None = None) -> Tensor:
        """[i, c, y, x] -> [i, k, y/2, x/2]; given `side`, of the map interpolated to that side by `resizing`."""
        if side is not None:
            assert self.resizing is not None, "only the fused operator interpolates"
            return self.resizing(features, self.weight, (side, side))
        return super().forward(features) if self.fused is None else self.fused(features, self.weight)


class PatchEmbed(nn.Module):
    """Project non-overlapping patches: [i, 3, S, S] -> [i, g, g, c]."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[i, 3, S, S] -> [i, g, g, c]."""
        return self.proj(images).permute(0, 2, 3, 1)


class SamBlock(nn.Module):
    """Pre-norm transformer block on the patch grid; `window` 0 attends over the whole grid."""

    def __init__(self, config: SamConfig, window: int, fused: Operator | None = None) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(config.width, eps=_EPS)
        self.attn = SamAttention(config.width, config.heads, area=window or config.grid, window=window, fused=fused)
        self.norm2 = nn.LayerNorm(config.width, eps=_EPS)
        self.mlp = SamMlp(config.width, config.mlp)

    def forward(self, hidden: Tensor) -> Tensor:
        """[i, g, g, c] -> [i, g, g, c]."""
        normed = self.norm1(hidden)
        if self.window and self.attn.fused is None:
            # Padding comes after the norm, so padded patches are zeros (not the norm's bias), as in SAM.
            windows = partition_windows(normed, self.window)  # [b, y, x, c]
            attended = join_windows(self.attn(windows), side=hidden.shape[1])
        else:
            attended = self.attn(normed)
        hidden = hidden + attended
        return hidden + self.mlp(self.norm2(hidden))


class SamAttention(nn.Module):
    """Self-attention over square areas of patches, with relative positions along rows and columns."""

    def __init__(self, width: int, heads: int, area: int, window: int = 0, fused: Operator | None = None) -> None:
        """Build the parameters.

        Args:
            width: c.
            heads: n.
            area: side of an area in patches.
            window: the same where areas are windows, else 0. For `fused` alone, which cuts the grid itself.
            fused: `Ops.sam_attention`; it takes whole grids.
        """
        super().__init__()
        self.heads, self.window, self.fused = heads, window, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * area - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * area - 1, width // heads))

    def forward(self, areas: Tensor) -> Tensor:
        """[b, y, x, c] -> [b, y, x, c]."""
        if self.fused is not None:  # of padding it makes what the projection makes of zeros: the bias
            return self.proj(self.fused(self.qkv(areas), self.rel_pos_h, self.rel_pos_w, self.qkv.bias, self.window))
        b, y, x, c = areas.shape
        qkv = self.qkv(areas).view(b, y * x, 3, self.heads, c // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # 3 times [b, n, t, d]
        query, key = fold_relative_positions(query, key, self.rel_pos_h, self.rel_pos_w, side=y)
        d = value.shape[-1]
        # Flash kernels want one size for all three. Global attention of a 1024-pixel image, fp32, one CPU core: 1.7 s
        # and no score matrix with the padded value; 3.7 s and 1.6 GB in torch's plain path without.
        value = functional.pad(value, (0, query.shape[-1] - d))
        attended = functional.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :d]  # [b, n, t, d]
        return self.proj(attended.transpose(1, 2).reshape(b, y, x, c))


class SamMlp(nn.Module):
    """Feed-forward network with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., c] -> [..., c]."""
        return self.lin2(functional.gelu(self.lin1(hidden)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [i, c, y, x]."""

    def forward(self, features: Tensor) -> Tensor:
        """[i, c, y, x] -> [i, c, y, x]."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_neck(config: SamConfig) -> nn.Sequential:
    """The convolutions from the backbone's width to `config.neck` channels: [i, width, g, g] -> [i, neck, g, g]."""
    return nn.Sequential(
        nn.Conv2d(config.width, config.neck, kernel_size=1, bias=False),
        ChannelNorm(config.neck, eps=_EPS),
        nn.Conv2d(config.neck, config.neck, kernel_size=3, padding=1, bias=False),
        ChannelNorm(config.neck, eps=_EPS),
    )


def partition_windows(grid: Tensor, window: int) -> Tensor:
    """Cut a grid into square windows, padded at the bottom and right with zeros.

    Args:
        grid: [i, g, g, c].
        window: side of a window in patches.

    Returns:
        Windows image by image, in reading order: [i*k*k, window, window, c], k = ceil(g / window).
    """
    i, side, _, c = grid.shape
    k = -(-side // window)
    pad = k * window - side
    padded = functional.pad(grid, (0, 0, 0, pad, 0, pad))
    windows = padded.view(i, k, window, k, window, c).transpose(2, 3)  # [i, k, k, window, window, c]
    return windows.reshape(-1, window, window, c)


def join_windows(windows: Tensor, side: int) -> Tensor:
    """Put windows back into their grid and drop the padding: [i*k*k, window, window, c] -> [i, side, side, c]."""
    window, c = windows.shape[1], windows.shape[3]
    k = -(-side // window)
    grid = windows.view(-1, k, k, window, window, c).transpose(2, 3)  # [i, k, window, k, window, c]
    return grid.reshape(-1, k * window, k * window, c)[:, :side, :side]


def fold_relative_positions(
    query: Tensor, key: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Extend queries and keys so that their product is the scaled score plus SAM's relative-position term.

    The term for query patch (r, s) and key patch (u, v) is `q . H[r - u] + q . W[s - v]` with the *unscaled* query: a
    sum of one number per key row and one per key column. Appending these 2*side numbers to the scaled query, and to
    each key the indicators of its row and column, yields the same scores inside one matrix product. The [n, t, t]
    bias (12 x 4096 x 4096 for a 1024-pixel image) is never stored, and attention kernels without a bias can be used.

    Args:
        query: [b, n, t, d], t = side*side.
        key: [b, n, t, d].
        rel_pos_h: one row per distance from 1 - side to side - 1, [2*side - 1, d].
        rel_pos_w: the same along columns.
        side: side of the attention area in patches.

    Returns:
        Query and key, [b, n, t, e], for attention with scale 1; e = d + 2*side rounded up to a multiple of 8
        with zeros, which the fused kernels want.
    """
    b, n, t, d = query.shape
    distance = torch.arange(side, device=query.device)
    distance = distance[:, None] - distance[None, :] + side - 1  # [query row, key row], from 0
    by_place = query.view(b, n, side, side, d)
    row_term = torch.einsum("bnrsd,rud->bnrsu", by_place, rel_pos_h[distance]).reshape(b, n, t, side)
    column_term = torch.einsum("bnrsd,svd->bnrsv", by_place, rel_pos_w[distance]).reshape(b, n, t, side)
    indicator = torch.eye(side, dtype=key.dtype, device=key.device)
    row = indicator.repeat_interleave(side, dim=0, output_size=t).expand(b, n, t, side)
    column = indicator.repeat(side, 1).expand(b, n, t, side)
    padding = query.new_zeros(()).expand(b, n, t, -(d + 2 * side) % 8)
    query = torch.cat([query * d**-0.5, row_term, column_term, padding], dim=-1)
    return query, torch.cat([key, row, column, padding], dim=-1)


def resize_bilinear(features: Tensor, side: int) -> Tensor:
    """Bilinear interpolation in fp32 (as `interpolate(align_corners=False)`): [i, c, g, g] -> [i, c, side, side].

    Written as two small matrix products: torch's own backward adds with atomics on CUDA, so that two runs differ.
    Matrix products leave the channels-last layout of the necks, which the convolutions behind want: it is put back.
    """
    weights = interpolation_matrix(features.shape[-1], side, features.device)  # [side, g]
    return (weights @ features.float() @ weights.T).to(features.dtype, memory_format=torch.channels_last)


def interpolation_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """Weights of `source` samples in each of `target` samples, fp32 [target, source]; rows sum to 1.

    Made anew in each forward pass: a buffer would be rounded to bf16 with the module, and 1/6 is not a bf16 number.
    """
    # In units of 1 / (2 * target) of a source sample everything is an integer: one rounding, in the division.
    unit = 2 * target
    centre = (2 * torch.arange(target, device=device) + 1) * source - target
    centre = centre.clamp(0, unit * (source - 1))  # the border repeats
    distance = (centre[:, None] - unit * torch.arange(source, device=device)).abs()
    return (1 - distance / unit).clamp(min=0)
