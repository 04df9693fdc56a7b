"""What ranks tell each other once a step, in one small exchange on the CPU.

In: this rank's wishes and counts. Out: the same `StepTotals` on every rank, so that all of them stop, save or go on
together.

Under tensor and pipeline parallelism several ranks read the same rows; one rank of each data-parallel copy counts
them. Images that could not be decoded are counted by the ranks that answer for them (`PixelRule`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from megavl.data.microbatch import IGNORE, MicroBatch, StepBatch
from megavl.parallel.groups import Groups
from megavl.training.step_clock import PARTS


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank's part. Every field travels as a double, exact up to 2^53."""

    stop: float
    """1 if this rank was asked to stop."""
    save: float
    """1 if this rank's clock says that it is time to save (rank 0 decides)."""
    data_wait_s: float
    """Seconds this rank waited for its batch, or for that of the next step where images are begun early."""
    counts: float
    """1 if the following count, 0 if another rank of the same data-parallel copy reports them."""
    failed: float
    """Images of this step that this rank answers for and that could not be decoded."""
    images: float
    """Images of this step."""
    tokens: float
    """Tokens of this step, padding excluded."""
    squared_lengths: float
    """Sum of squared document lengths, padding excluded."""
    padded_squared_lengths: float
    """The same, padding included."""
    pipeline_rank: float
    """Where in the pipeline this rank is."""
    memory: float
    """Peak bytes."""
    vision: float
    """Seconds of the parts of the step (`step_clock.py`), from here on."""
    forward: float
    backward: float
    schedule: float
    reduction: float
    optimizer: float


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Over all ranks."""

    stop: bool
    """Someone was asked to stop."""
    save: bool
    """Time to save."""
    data_wait_s: float
    """The longest wait."""
    failed: int
    """Samples that could not be decoded."""
    images_spread: int
    """Most minus fewest images of a data-parallel rank."""
    tokens: int
    """Padding excluded."""
    squared_lengths: int
    """Padding excluded."""
    padded_squared_lengths: int
    """Padding included."""
    memory: float
    """Peak bytes of the rank that needs most."""
    parts: dict[str, float]
    """Part of the step -> seconds on the rank that takes longest."""
    bubble: tuple[float, ...]
    """By pipeline rank: the share of the schedule's time in which it computes nothing, the mean over its ranks."""


def report(
    batch: StepBatch,
    groups: Groups,
    *,
    stop: bool,
    save: bool,
    data_wait_s: float,
    parts: Mapping[str, float],
    memory: float,
) -> RankReport:
    """This rank's part of a step."""
    lengths = [document_lengths(micro_batch) for micro_batch in batch.micro_batches]
    padded = [micro_batch.cu_seqlens.long().diff() for micro_batch in batch.micro_batches]
    return RankReport(
        stop=float(stop),
        save=float(save),
        data_wait_s=data_wait_s,
        counts=float(groups.tensor_rank == 0 and groups.pipeline_rank == 0),
        failed=float(len(batch.failed)),
        images=float(sum(m.num_images for m in batch.micro_batches)),
        tokens=float(sum(int(of.sum()) for of in lengths)),
        squared_lengths=float(sum(int((of * of).sum()) for of in lengths)),
        padded_squared_lengths=float(sum(int((of * of).sum()) for of in padded)),
        pipeline_rank=float(groups.pipeline_rank),
        memory=memory,
        **parts,
    )


def document_lengths(batch: MicroBatch) -> torch.Tensor:
    """Lengths of the documents, int64 [d]; a last document without any label is padding and left out."""
    starts = batch.cu_seqlens.long()
    lengths = starts.diff()  # [d]
    padded = bool((batch.labels[int(starts[-2]) :] == IGNORE).all()) if len(lengths) else False
    return lengths[:-1] if padded else lengths


def exchange(mine: RankReport, groups: Groups) -> StepTotals:
    """Give this rank's report to all and sum up; all ranks must call it."""
    sent = torch.tensor([getattr(mine, field.name) for field in fields(mine)], dtype=torch.float64)  # in field order
    received = [torch.empty_like(sent) for _ in range(groups.world_size)]
    dist.all_gather(received, sent, group=groups.gloo_world)
    names = [field.name for field in fields(mine)]
    everyone = [RankReport(**dict(zip(names, row.tolist(), strict=True))) for row in received]
    counting = [rank for rank in everyone if rank.counts]
    images = [rank.images for rank in counting]
    return StepTotals(
        stop=any(rank.stop for rank in everyone),
        save=any(rank.save for rank in everyone),
        data_wait_s=max(rank.data_wait_s for rank in everyone),
        failed=int(sum(rank.failed for rank in everyone)),
        images_spread=int(max(images) - min(images)),
        tokens=int(sum(rank.tokens for rank in counting)),
        squared_lengths=int(sum(rank.squared_lengths for rank in counting)),
        padded_squared_lengths=int(sum(rank.padded_squared_lengths for rank in counting)),
        memory=max(rank.memory for rank in everyone),
        parts={part: max(getattr(rank, part) for rank in everyone) for part in PARTS if part != "schedule"},
        bubble=_bubble(everyone),
    )


def _bubble(everyone: Sequence[RankReport]) -> tuple[float, ...]:
    """Idle share of each pipeline rank."""
    idle: dict[float, list[float]] = {}
    for rank in everyone:
        whole = rank.schedule + rank.vision + rank.forward + rank.backward
        idle.setdefault(rank.pipeline_rank, []).append(rank.schedule / whole if whole > 0 else 0.0)
    return tuple(sum(idle[place]) / len(idle[place]) for place in sorted(idle))
