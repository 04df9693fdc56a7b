"""RMSNorm in plain PyTorch: y = x / sqrt(mean(x^2) + eps) * w. Shapes: h hidden size."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last dimension, at least in fp32 inside.

    Args:
        x: [..., h].
        weight: [h].
        eps: added to the mean square.

    Returns:
        [..., h] in the type of `x`. The normalised value is rounded to that type before the product with `weight`,
        the order of LLaMA.
    """
    inner = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(inner)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight
