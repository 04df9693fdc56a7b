"""The norm of the decoder, in the form in which megatron-core's specs build one.

In: hidden states [t, 1, h] (t is the rank's share of the tokens under sequence parallelism). Out: the same shape, each
position divided by its root mean square over h and scaled by a learnt weight [h].
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megavl.ops import Operator


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with a weight that megatron-core knows to be replicated over the tensor group.

    megatron-core's own torch norm refuses sequence parallelism. There each tensor rank normalises a part of the tokens,
    so its weight gradient is a part of the sum; the mark `sequence_parallel` is what makes megatron-core add the parts.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, fused: Operator | None = None
    ) -> None:
        """Weight of ones.

        Args:
            config: gives the parameter type and whether the sequence is cut over the tensor group.
            hidden_size: h.
            eps: added to the mean square.
            fused: `Ops.rmsnorm`.
        """
        super().__init__()
        self.eps, self.fused = eps, fused
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension of `hidden`; torch accumulates in fp32 also for bf16 input."""
        if self.fused is not None:
            return self.fused(hidden, self.weight, self.eps)
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
