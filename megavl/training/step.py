"""One optimizer step: the micro-batches of a global batch through the pipeline, gradients, update.

In: this data-parallel rank's `StepBatch`, the learning rate of the step. Out: a `StepResult`, the same on every rank.

The loss is the mean over the supervised tokens of the global batch. Each micro-batch hands megatron-core's schedule
the *sum* of its token losses and their number; `finalize_model_grads` divides once, by the number over all
micro-batches and data-parallel ranks. So it does not matter how the batch is cut, and a micro-batch without labels
counts for nothing.

What a step without images does to the weights of a trained tower: see `training/optimizer.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megavl.data.microbatch import IGNORE, MicroBatch, StepBatch
from megavl.parallel.gradients import (
    before_reduction,
    finish_parameter_gather,
    start_parameter_gather,
    zero_gradients,
)
from megavl.parallel.groups import Groups
from megavl.parallel.vision_ahead import AheadEncoder
from megavl.training.optimizer import set_learning_rate, update
from megavl.training.step_clock import timed

_MODALITIES = ("language", "multimodal")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, summed over all data-parallel ranks."""

    loss: float
    """Mean over the supervised tokens of the global batch; NaN where there is none."""
    loss_sums: dict[str, float]
    """Modality -> sum of token losses; micro-batches that mix modalities are in the total only."""
    loss_tokens: dict[str, int]
    """Modality -> supervised tokens; `loss_sums[m] / loss_tokens[m]` is the loss of that modality."""
    supervised_tokens: int
    """Tokens with a label."""
    tokens: int
    """Positions computed, image positions and padding included."""
    images: int
    """Images encoded (once per data-parallel rank, whatever the tensor size)."""
    grad_norm: float
    """Norm of the global gradient before clipping."""
    grad_norms: dict[str, float]
    """The same by trained component of the model; the root of the sum of their squares is `grad_norm`."""
    skipped: str
    """Why the parameters were not updated, or empty."""


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    batch: StepBatch,
    groups: Groups,
    *,
    lr: float,
    vision_lr: float | None = None,
    encoder: AheadEncoder | None = None,
    upcoming: StepBatch | None = None,
    force_all_reduce: bool = False,
) -> StepResult:
    """Run one step; all ranks must call it.

    A loss or gradient that is not finite, or a global batch without any label, skips the update on all ranks alike.

    Args:
        chunks: wrapped stages of this rank.
        optimizer: from `make_optimizer`.
        batch: this data-parallel rank's micro-batches.
        groups: this rank's groups.
        lr: learning rate of this update.
        vision_lr: learning rate of SigLIP; None: `lr`.
        encoder: what runs frozen towers before the schedule, from `make_ahead_encoder`.
        upcoming: the batch of the next step, where it is known: `encoder` begins with its images at the end of this
            step. Another batch may follow all the same.
        force_all_reduce: leave the whole gradient on every data-parallel rank, also with the distributed optimizer
            (for tests that read gradients).

    Raises:
        ValueError: micro-batches that the pipeline cannot run.
    """
    zero_gradients(chunks)
    start_parameter_gather(chunks)
    for chunk in chunks:
        chunk.force_all_reduce = force_all_reduce
    micro_batches: Sequence[MicroBatch] = batch.micro_batches
    if encoder is not None:
        with timed(chunks, "vision"):
            micro_batches = encoder(micro_batches)
    with before_reduction(chunks, partial(_begin_next, chunks, encoder, upcoming)):
        reports = _run(chunks, micro_batches, groups, _training_loss, force_all_reduce=force_all_reduce)
    finish_parameter_gather(chunks)
    totals = _sum_over_ranks(reports, batch.micro_batches, groups)
    loss = totals["loss"] / totals["labels"] if totals["labels"] else math.nan
    set_learning_rate(optimizer, lr, vision_lr)
    with timed(chunks, "optimizer"):
        grad_norm, grad_norms, updated = update(optimizer, groups.device, allowed=math.isfinite(loss))
    return StepResult(
        loss=loss,
        loss_sums={m: totals[f"{m} loss"] for m in _MODALITIES},
        loss_tokens={m: int(totals[f"{m} labels"]) for m in _MODALITIES},
        supervised_tokens=int(totals["labels"]),
        tokens=int(totals["tokens"]),
        images=int(totals["images"]),
        grad_norm=grad_norm,
        grad_norms=grad_norms,
        skipped="" if updated else skip_reason(totals["labels"], loss, grad_norm, grad_norms),
    )


def _begin_next(
    chunks: Sequence[DistributedDataParallel], encoder: AheadEncoder | None, upcoming: StepBatch | None
) -> None:
    """Encode this rank's images of the next step."""
    if encoder is not None and upcoming is not None:
        encoder.begin(upcoming.micro_batches, timed(chunks, "vision", beside=True))


@torch.no_grad()
def forward_only(
    chunks: Sequence[DistributedDataParallel], micro_batches: Sequence[MicroBatch], groups: Groups
) -> list[Tensor]:
    """Token losses without gradients, for evaluation.

    All ranks of a pipeline must call it with the same micro-batches. Images are encoded in the schedule, by the first
    stage, also under `parallel.vision = split_model`. Under `overlap_param_gather` all data-parallel
    ranks must call it, or none; `synchronise_parameters` before lifts that.

    Args:
        chunks: wrapped stages of this rank.
        micro_batches: any number, not 0.
        groups: this rank's groups.

    Returns:
        On the last pipeline rank: the loss of each token, fp32 [t], per micro-batch (0 where the label is `IGNORE`).
        Elsewhere: nothing.
    """
    return _without_gradients(chunks, micro_batches, groups, _call)


@torch.no_grad()
def logits_only(
    chunks: Sequence[DistributedDataParallel], micro_batches: Sequence[MicroBatch], groups: Groups
) -> list[Tensor]:
    """As `forward_only`, but the logits of this rank's part of the vocabulary, [t, v/tp], instead of losses."""
    return _without_gradients(chunks, micro_batches, groups, lambda chunk, batch: chunk.module.logits(batch))


Compute = Callable[[DistributedDataParallel, MicroBatch], Tensor]
"""What a chunk does with a micro-batch: hidden states for the next stage or, on the last one, the result."""


def _call(chunk: DistributedDataParallel, batch: MicroBatch) -> Tensor:
    """The loss of each token."""
    return chunk(batch)


def _without_gradients(
    chunks: Sequence[DistributedDataParallel], micro_batches: Sequence[MicroBatch], groups: Groups, compute: Compute
) -> list[Tensor]:
    """What `compute` gives on the last stage for each micro-batch."""
    start_parameter_gather(chunks)
    wanted = len(micro_batches)
    spare = -wanted % groups.pipeline_size if groups.virtual_size > 1 else 0  # interleaving takes whole rounds only
    padded = [*micro_batches, *[micro_batches[-1]] * spare]
    results = _run(chunks, padded, groups, _as_it_is, compute, forward_only=True, collect_non_loss_data=True)
    finish_parameter_gather(chunks)
    return results[:wanted]


def _run(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    groups: Groups,
    loss_func: Any,
    compute: Compute = _call,
    **options: bool,
) -> list[Any]:
    """Send micro-batches through megatron-core's schedule; returns what `loss_func` reported, on the last stage."""
    tokens = _equal_length(micro_batches, groups)
    virtual = groups.virtual_size if groups.virtual_size > 1 else None
    schedule = get_forward_backward_func(pp_size=groups.pipeline_size, vp_size=virtual)

    def forward_step(batches: Iterator[MicroBatch], chunk: DistributedDataParallel) -> tuple[Tensor, Any]:
        batch = next(batches)
        return compute(chunk, batch), partial(loss_func, batch)

    config = chunks[0].module.config
    return schedule(
        forward_step_func=forward_step,
        data_iterator=[_feed(micro_batches, chunk, groups.device) for chunk in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=tokens,
        micro_batch_size=1,  # rows are joined into one stream
        p2p_communicator=P2PCommunicator(pp_group=groups.pg.pp, config=config),
        pg_collection=groups.pg,
        **options,
    )


def _equal_length(micro_batches: Sequence[MicroBatch], groups: Groups) -> int:
    """Tokens per micro-batch, which the pipeline's receive buffers are made for."""
    lengths = {batch.tokens.numel() for batch in micro_batches}
    if groups.pipeline_size > 1 and len(lengths) > 1:
        raise ValueError(
            f"micro-batches of one step have {min(lengths)} to {max(lengths)} tokens; with pipeline = "
            f"{groups.pipeline_size} they must be equal"
        )
    return max(lengths)


def _feed(
    micro_batches: Sequence[MicroBatch], chunk: DistributedDataParallel, device: torch.device
) -> Iterator[MicroBatch]:
    """Micro-batches on the device, one at a time; pixels for the chunk with the towers only."""
    for batch in micro_batches:
        yield (batch if chunk.module.pre_process else replace(batch, pixels=None)).to(device)


def _training_loss(batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of token losses, number of labels, both as a report) of one micro-batch; `losses` is [t]."""
    total = losses.sum()
    count = (batch.labels != IGNORE).sum(dtype=torch.int)
    return total, count, torch.stack([total.detach().double(), count.double()])


def _as_it_is(batch: MicroBatch, result: Tensor, non_loss_data: bool = True) -> Tensor:
    """What the last stage computed."""
    return result


def _sum_over_ranks(reports: Sequence[Tensor], micro_batches: Sequence[MicroBatch], groups: Groups) -> dict[str, float]:
    """Totals of the global batch on every rank; each data-parallel copy is counted by one rank of its last stage."""
    totals = dict.fromkeys(["loss", "labels", "tokens", "images"], 0.0)
    totals |= {f"{m} {what}": 0.0 for m in _MODALITIES for what in ("loss", "labels")}
    if groups.is_last_stage and groups.tensor_rank == 0:
        for batch, (loss, labels) in zip(micro_batches, torch.stack(list(reports)).tolist(), strict=True):
            totals["loss"] += loss
            totals["labels"] += labels
            totals["tokens"] += batch.tokens.numel()
            totals["images"] += batch.num_images
            if batch.modality is not None:
                totals[f"{batch.modality} loss"] += loss
                totals[f"{batch.modality} labels"] += labels
    summed = torch.tensor(list(totals.values()), dtype=torch.float64)
    dist.all_reduce(summed, group=groups.gloo_world)
    return dict(zip(totals, summed.tolist(), strict=True))


def skip_reason(labels: float, loss: float, grad_norm: float, grad_norms: dict[str, float]) -> str:
    """Why a step did not update the parameters: `the gradient norm is nan (not finite: the gradient of siglip)`."""
    if not labels:
        return "no token of the global batch has a label"
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
    broken = [name for name, norm in grad_norms.items() if not math.isfinite(norm)]
    return f"{what} (not finite: the gradient of {', '.join(broken)})" if broken else what
