"""Bilinear interpolation in plain PyTorch. Shapes: i images, c channels, y and x rows and columns."""

import torch
from torch import Tensor
from torch.nn import functional


def interpolate_reference(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with align_corners=False, at least in fp32 inside: [i, c, y, x] -> [i, c, *size]."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return functional.interpolate(wide, size=size, mode="bilinear", align_corners=False).to(features.dtype)
