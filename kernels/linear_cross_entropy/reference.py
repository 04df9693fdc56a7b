"""Output head and cross-entropy in plain PyTorch, all logits in memory.

Shapes: t tokens, h hidden size, v vocabulary.
"""

import torch
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Loss of each token, and their weighted sum; at least in fp32 behind the logits.

    Args:
        hidden: [t, h].
        weight: [v, h], the whole vocabulary.
        targets: int64 [t]; `ignore_index`: no loss.
        token_weights: [t]; 0: no loss; None: ones.
        ignore_index: the target that is not learnt.

    Returns:
        (weighted sum of the losses, losses [t] detached; 0 where there is none).
    """
    counted = targets != ignore_index  # [t]
    if token_weights is not None:
        counted = counted & (token_weights != 0)
    logits = hidden @ weight.t()  # [t, v]
    logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
    target_logits = logits.gather(1, targets.masked_fill(~counted, 0).unsqueeze(1)).squeeze(1)  # [t]
    losses = torch.where(counted, torch.logsumexp(logits, dim=1) - target_logits, 0.0)
    weighted = losses if token_weights is None else losses * token_weights.to(losses.dtype)
    return weighted.sum(), losses.detach()
