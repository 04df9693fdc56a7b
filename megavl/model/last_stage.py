"""The output head and the loss, cut over the vocabulary.

In: normalised hidden states of the last layer, [t, 1, h] ([t/tp, 1, h] under sequence parallelism). Out: logits of this
rank's part of the vocabulary [t, v/tp], or the loss of each token, fp32 [t].
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavl.data.microbatch import IGNORE
from megavl.ops import PLAIN, Operator, Ops


class LastStage(MegatronModule):
    """Head (not tied to the embedding) and cross-entropy."""

    def __init__(self, config: TransformerConfig, vocab: int, pg: ProcessGroupCollection, ops: Ops = PLAIN) -> None:
        """Uninitialised head.

        Args:
            config: the decoder's.
            vocab: v, a multiple of the tensor size.
            pg: process groups; those of `tp` share the vocabulary.
            ops: fused operators.
        """
        super().__init__(config)
        self.tp_group, self.fused = pg.tp, ops.linear_cross_entropy
        self.head = (ColumnParallelLinear if self.fused is None else LossHead)(
            config.hidden_size,
            vocab,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=pg.tp,
        )

    def forward(self, hidden: Tensor, labels: Tensor, learnt: Tensor | None = None) -> Tensor:
        """Cross-entropy of each token, fp32 [t]; 0 where `labels` [t] is `IGNORE`.

        With the fused operator the rows of `learnt` alone (int64 [k], those with a label; None: all) pass the head:
        image and prompt positions cost nothing.
        """
        if self.fused is not None:
            return self.head(hidden, labels, self.fused, learnt)
        learnt = labels != IGNORE  # [t]
        targets = labels.masked_fill(~learnt, 0).unsqueeze(1)  # [t, 1]
        logits, _ = self.head(hidden)  # [t, 1, v/tp]
        loss = vocab_parallel_cross_entropy(logits, targets)  # [t, 1]; overwrites fp32 logits
        return torch.where(learnt, loss.squeeze(1), 0.0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary, [t, v/tp]."""
        return self.head(hidden)[0].squeeze(1)


class LossHead(ColumnParallelLinear):
    """megatron-core's layer that, given labels, answers with losses instead of logits.

    Inside megatron-core's data-parallel wrapper the weight's gradient is added to the wrapper's buffer where it is
    formed: no second [v/tp, h], which is the largest tensor of a pass.

    The weight is read inside a call of the module that owns it: under overlapped parameter gathering a hook on that
    call waits until the weight has arrived.
    """

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        fused: Operator | None = None,
        learnt: Tensor | None = None,
    ) -> Any:
        """Logits and bias as ever, or the loss of each token, fp32 [t].

        Args:
            hidden: [t, 1, h], [t/tp, 1, h] under sequence parallelism.
            labels: [t]; None: logits are wanted.
            fused: `Ops.linear_cross_entropy`.
            learnt: positions with a label, int64 [k]; None: not known.
        """
        if labels is None or fused is None:
            return super().forward(hidden)
        if self.sequence_parallel:  # backward: the ranks' parts of the gradient are summed and cut
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)  # [t, 1, h]
        buffer = getattr(self.weight, "main_grad", None)  # fp32; the wrapper gives it to trained parameters
        total, losses = fused(
            hidden.squeeze(1),
            self.weight,
            labels,
            rows=learnt,
            group=self.tp_group,
            vocab_start=self.tp_group.rank() * self.weight.shape[0],
            reduce_hidden_gradient=not self.sequence_parallel,
            weight_gradient=buffer,
            ignore_index=IGNORE,
        )
        return _TokenLosses.apply(total, losses, None if buffer is None else self.weight)


class _TokenLosses(torch.autograd.Function):
    """Token losses with the gradient of their sum, which is all that a fused loss keeps.

    A gradient that is not the same for every token cannot be given; it becomes NaN, as seeing it here would mean
    waiting for the device.

    Where the gradient of `weight` is in the wrapper's buffer already, the wrapper's hook is told so. It still needs to
    be called, and with overlapped reduction to find a gradient, which it drops unread: the weight itself plays that
    part, as it takes neither memory nor time.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, losses: Tensor, weight: Tensor | None) -> Tensor:
        ctx.weight = weight
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        first = gradient[0]
        total = torch.where((gradient == first).all(), first, torch.nan)
        if ctx.weight is None:
            return total, None, None
        ctx.weight.grad_added_to_main_grad = True
        return total, None, ctx.weight.detach()
