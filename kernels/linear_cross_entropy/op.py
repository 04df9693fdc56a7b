"""Output head and cross-entropy as one differentiable operator that never holds all logits.

Shapes: t tokens, k tokens that are learnt, c tokens of a chunk, h hidden size, v this rank's share of the vocabulary.

Per chunk: logits [c, v] (cuBLAS), row statistics, one all-gather of them over the tensor group, loss and gradient over
the logits in place, then the chunk's part of both gradients (cuBLAS). So the gradients are there after the *forward*
pass, for a gradient of 1 of the weighted sum, and the backward pass only scales them: it needs no logits, and nobody
waits for the device. Memory beside the gradients: one chunk of logits, and the weight's gradient a second time, in fp32
(not with `weight_gradient`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavl.kernels.configurations import configuration
from megavl.kernels.launch import check_tensor
from megavl.kernels.linear_cross_entropy.kernel import DEFAULT, loss_and_gradient, row_statistics


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    rows: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    chunk_rows: int = 1024,
    reduce_hidden_gradient: bool = True,
    weight_gradient: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the token losses, differentiable in `hidden` and `weight`, and the losses themselves.

    All ranks of `group` call it with the same tokens. Each gets the same bits of both results.

    Not for a region whose activations are recomputed: the gradients, formed in the forward pass, would be formed
    twice. Without gradients (`torch.no_grad`) only the losses are computed.

    Args:
        hidden: [t, h], fp32, fp16 or bf16; any strides. Under sequence parallelism: gathered, all t tokens.
        weight: [v, h] in the type of `hidden`: this rank's rows of the head.
        targets: int64 [t], in the whole vocabulary. A target outside it, other than `ignore_index`, gives an infinite
            loss (seeing it here would mean waiting for the device).
        token_weights: fp32 [t]; 0: no loss and no gradient. None: ones. They enter the gradient before it is rounded
            to the type of `hidden`, so keep them around 1 and scale the sum instead.
        rows: int64 [k], distinct: tokens that may have a loss. The others are left out before the matrix product,
            which saves their whole cost; known on the host, as labels come from there. None: all t.
        group: ranks that share the vocabulary. None: this rank has all of it.
        vocab_start: first token id of this rank.
        chunk_rows: most rows of logits in memory.
        reduce_hidden_gradient: a rank's gradient of `hidden` comes from its part of the vocabulary. True: it is summed
            over `group`, during the forward pass. False: it is left as it is, for a caller whose gather of the sequence
            sums and cuts it in its backward pass.
        weight_gradient: fp32 [v, h], such as the gradient buffer of a data-parallel wrapper: the gradient of `weight`
            is added to it during the forward pass and autograd gets none for `weight`, which saves the fp32 copy and
            its cast. Only for a sum whose own gradient is 1; any other makes the gradient of `hidden` NaN.
        ignore_index: the target that is not learnt.

    Returns:
        (sum of weight * loss, fp32 scalar; losses, fp32 [t], detached, without weight, 0 where there is none).

    Raises:
        ValueError: unsupported type, device or shape.
    """
    _check(hidden, weight, targets, chunk_rows)
    _check_options(hidden, weight, token_weights, rows, weight_gradient)
    weights = torch.ones_like(targets, dtype=torch.float32) if token_weights is None else token_weights.detach()
    weights = torch.where(targets == ignore_index, 0.0, weights)  # [t]
    if rows is not None:
        targets, weights = targets[rows], weights[rows]  # [k]
    group = group if group is not None and group.size() > 1 else None
    recorded = torch.is_grad_enabled()
    plan = _Plan(
        rows=rows,
        group=group,
        vocab_start=vocab_start,
        chunk_rows=chunk_rows,
        reduce=reduce_hidden_gradient and group is not None,
        hidden_wanted=recorded and hidden.requires_grad,
        weight_wanted=recorded and weight.requires_grad,
        weight_gradient=weight_gradient,
    )
    return _LinearCrossEntropy.apply(hidden, weight, targets.contiguous(), weights, plan)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> None:
    """Refuse what the operator cannot take; shapes and types only."""
    check_tensor("hidden", hidden)
    check_tensor("weight", weight, like=hidden, dtypes=(hidden.dtype,))
    check_tensor("targets", targets, like=hidden, dtypes=(torch.int64,))
    if hidden.ndim != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; supported is [tokens, hidden size]")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the last dimension of hidden is {hidden.shape[1]}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, hidden has {hidden.shape[0]} tokens")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; supported is 1 or more")


def _check_options(
    hidden: Tensor, weight: Tensor, weights: Tensor | None, rows: Tensor | None, gradient: Tensor | None
) -> None:
    """The same for tensors that may be left out."""
    tokens = hidden.shape[0]
    if weights is not None:
        check_tensor("token_weights", weights, like=hidden, dtypes=(torch.float32,))
        if weights.shape != (tokens,):
            raise ValueError(f"token_weights has shape {tuple(weights.shape)}, hidden has {tokens} tokens")
    if rows is not None:
        check_tensor("rows", rows, like=hidden, dtypes=(torch.int64,))
        if rows.ndim != 1 or rows.shape[0] > tokens:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; supported are up to {tokens} token indices")
    if gradient is not None:
        check_tensor("weight_gradient", gradient, like=hidden, dtypes=(torch.float32,))
        if gradient.shape != weight.shape:
            raise ValueError(f"weight_gradient has shape {tuple(gradient.shape)}, weight has {tuple(weight.shape)}")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a call is, besides the tensors that it computes with."""

    rows: Tensor | None
    group: dist.ProcessGroup | None
    """None also where the group is one rank."""
    vocab_start: int
    chunk_rows: int
    reduce: bool
    hidden_wanted: bool
    weight_wanted: bool
    weight_gradient: Tensor | None

    def chunks(self, tokens: int) -> list[slice]:
        """Cuts of nearly equal length, so that no short one is left over."""
        if not tokens:
            return []
        size = triton.cdiv(tokens, triton.cdiv(tokens, self.chunk_rows))
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass, scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        losses, d_hidden, d_weight = _all_chunks(hidden, weight, targets, weights, plan)
        total = (losses * weights).sum()
        if plan.rows is not None:
            losses = losses.new_zeros(hidden.shape[0]).index_copy_(0, plan.rows, losses)  # [t]
        ctx.save_for_backward(d_hidden, d_weight if plan.weight_gradient is None else None)
        ctx.plan, ctx.hidden_shape, ctx.weight_type = plan, hidden.shape, weight.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, _d_losses: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if ctx.plan.weight_gradient is not None:  # it has the gradient for 1 already
            d_total = torch.where(d_total == 1, d_total, torch.nan)
        if d_hidden is not None:
            d_hidden = _scaled(d_hidden, d_total, d_hidden.dtype)  # [k, h]
            if ctx.plan.rows is not None:
                d_hidden = d_hidden.new_zeros(ctx.hidden_shape).index_copy_(0, ctx.plan.rows, d_hidden)  # [t, h]
        if d_weight is not None:
            d_weight = _scaled(d_weight, d_total, ctx.weight_type)
        return d_hidden, d_weight, None, None, None


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor in `dtype`, multiplied in fp32, in one pass; a `factor` of no dimensions would be rounded first."""
    return torch.mul(x, factor.reshape(1), out=torch.empty(x.shape, dtype=dtype, device=x.device))


def _all_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(losses [k], gradient of the learnt rows of `hidden` [k, h], of `weight` [v, h] fp32); None where not wanted."""
    chunks = plan.chunks(targets.shape[0])
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    d_hidden = hidden.new_empty(targets.shape[0], hidden.shape[1]) if plan.hidden_wanted else None
    d_weight = None
    if plan.weight_wanted:
        d_weight = plan.weight_gradient
        if d_weight is None:
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    buffer = hidden.new_empty(chunks[0].stop if chunks else 0, weight.shape[0])  # shared by all chunks
    reductions = []
    for chunk in chunks:
        h = hidden[chunk] if plan.rows is None else hidden[plan.rows[chunk]]  # [c, h]
        logits = torch.mm(h, weight.t(), out=buffer[: h.shape[0]])  # [c, v]
        losses[chunk] = _differentiate_(logits, targets[chunk], weights[chunk], plan)
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[chunk])
            if plan.reduce:  # beside the matrix products of the next chunk
                reductions.append(dist.all_reduce(d_hidden[chunk], group=plan.group, async_op=True))
        if d_weight is not None:
            _add_product(d_weight, logits.t(), h)
    for reduction in reductions:
        reduction.wait()
    return losses, d_hidden, d_weight


def _differentiate_(logits: Tensor, targets: Tensor, weights: Tensor, plan: _Plan) -> Tensor:
    """Losses [c] of one chunk; its logits [c, v] become their gradient where one is wanted."""
    statistics = _gather(_statistics(logits, targets, plan.vocab_start), plan.group)  # [ranks, 3, c]
    wanted = plan.hidden_wanted or plan.weight_wanted
    return _loss_and_gradient_(logits, targets, weights, statistics, plan.vocab_start, wanted)


def _gather(statistics: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Statistics of all ranks, [ranks, 3, c], 12 bytes a token and rank; the same order, so the same bits, on each."""
    if group is None:
        return statistics.unsqueeze(0)
    everyone = statistics.new_empty(group.size() * 3, statistics.shape[1])
    dist.all_gather_into_tensor(everyone, statistics, group=group)
    return everyone.view(group.size(), *statistics.shape)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (fp32) += a @ b, summed in fp32 also where `a` and `b` are narrower."""
    if a.dtype is torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


@torch.library.custom_op("megavl::cross_entropy_statistics", mutates_args=())
def _statistics(logits: Tensor, targets: Tensor, vocab_start: int) -> Tensor:
    """[3, rows] fp32: maximum, sum of exponentials, target logit (-inf where another rank owns it)."""
    rows, v = logits.shape
    statistics = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        options = configuration("linear_cross_entropy", "statistics", "any v", DEFAULT, logits)
        row_statistics[(rows,)](*(logits, targets, statistics, logits.stride(0), rows, v, vocab_start), **options)
    return statistics


@_statistics.register_fake
def _(logits: Tensor, targets: Tensor, vocab_start: int) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("megavl::cross_entropy_gradient_", mutates_args={"logits"})
def _loss_and_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor, statistics: Tensor, vocab_start: int, gradient: bool
) -> Tensor:
    """Losses [rows] fp32; `logits` [rows, v] become their weighted gradient if `gradient`."""
    rows, v = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        shape = f"ranks {statistics.shape[0]}"
        options = configuration("linear_cross_entropy", "gradient", shape, DEFAULT, logits)
        loss_and_gradient[(rows, triton.cdiv(v, options["BLOCK"]) if gradient else 1)](
            *(logits, targets, weights, statistics, losses, logits.stride(0), rows, v, vocab_start),
            RANKS=statistics.shape[0],
            GRADIENT=gradient,
            **options,
        )
    return losses


@_loss_and_gradient_.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor, statistics: Tensor, vocab_start: int, gradient: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
