"""The low-resolution tower: SigLIP's vision transformer.

In: normalised images. Out: one feature per patch after the final norm. The attention-pooling head of the published
weights is not used by DeepSeek-VL and not modelled.

Shapes: i images, S side in pixels, p patches (= slots of the sequence), c channels, n heads, d head size.
Parameter names are those of the original DeepSeek-VL checkpoints below `vision_tower_low.vision_tower`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megavl.config import SiglipConfig

_EPS = 1e-6


class SiglipTower(nn.Module):
    """Vision transformer without class token; returns the features of its last layer."""

    def __init__(self, config: SiglipConfig, *, recompute: bool = False) -> None:
        """Build the tower.

        Args:
            config: sizes.
            recompute: keep only each block's input for the backward pass and run the block again there.
        """
        super().__init__()
        self.recompute = recompute
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, config.width))
        self.blocks = nn.ModuleList(SiglipBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: normalised pixels in the compute type, [i, 3, S, S].

        Returns:
            Features, [i, p, c], rows of the patch grid first.
        """
        hidden = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # No dropout, so there is no random state to restore.
                hidden = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = block(hidden)
        return self.norm(hidden)


class PatchEmbed(nn.Module):
    """Project non-overlapping patches: [i, 3, S, S] -> [i, p, c]."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[i, 3, S, S] -> [i, p, c]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class SiglipBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=_EPS)
        self.attn = SiglipAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=_EPS)
        self.mlp = SiglipMlp(config.width, config.mlp)

    def forward(self, hidden: Tensor) -> Tensor:
        """[i, p, c] -> [i, p, c]."""
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class SiglipAttention(nn.Module):
    """Full self-attention over the patches of one image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[i, p, c] -> [i, p, c]."""
        i, p, c = hidden.shape
        query, key, value = self.qkv(hidden).view(i, p, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)  # [i, n, p, d]
        return self.proj(attended.transpose(1, 2).reshape(i, p, c))


class SiglipMlp(nn.Module):
    """Feed-forward network with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[i, p, c] -> [i, p, c]."""
        return self.fc2(functional.gelu(self.fc1(hidden)))
