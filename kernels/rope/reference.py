"""Rotary position embedding in plain PyTorch, half-rotation layout. Shapes: t tokens, n heads, d head size."""

import torch
from torch import Tensor


def rotate_reference(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + d/2) of each head by the angles of its token.

    Args:
        heads: [t, n, d].
        cos: cosine of the angles, [t, 1, d/2].
        sin: sine of the angles, [t, 1, d/2].

    Returns:
        [t, n, d] in the type of `heads`, computed at least in fp32.
    """
    inner = torch.promote_types(heads.dtype, torch.float32)
    first, second = heads.to(inner).chunk(2, dim=-1)  # [t, n, d/2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
