"""Seconds of a whole step, by kind of step, from the parts: towers ahead of the schedule, pipeline, reduction, update.

In: a `Case`, the kinds of step that the training stage mixes, batch and ranks. Out: a `StepEstimate`, and the loads
from which a split is chosen. These are estimates: no data wait, no host overhead, perfect overlap where overlap is on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavl.planning.costs import Case, StageTimes, ahead_s, all_reduce_s, stage_pieces, stage_times
from megavl.planning.memory import RankMemory, rank_memory
from megavl.planning.simulate import Simulation, simulate
from megavl.planning.split import StageLoad
from megavl.training.flops import StepCounts, step_flops

ROUNDS = 24
"""Rounds of the pipeline (as many micro-batches as ranks) that are run on paper."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A kind of step."""

    name: str
    """`language` or `multimodal`."""
    share: float
    """Share of the steps."""
    row: StepCounts
    """What one row of the batch holds."""

    def counts(self, rows: int) -> StepCounts:
        """What `rows` rows hold."""
        row = self.row
        return StepCounts(
            images=rows * row.images,
            tokens=rows * row.tokens,
            squared_lengths=rows * row.squared_lengths,
            logits=rows * row.logits,
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How a global batch is cut."""

    micro_batch: int
    """Rows per forward pass."""
    micro_batches: int
    """Micro-batches of a step on one data-parallel rank."""
    data: int
    """Data-parallel ranks."""

    @property
    def rows(self) -> int:
        """Rows of a step over all ranks."""
        return self.micro_batch * self.micro_batches * self.data


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Seconds of one kind of step."""

    workload: Workload
    ahead_s: float
    """Towers that run before the schedule."""
    pipeline_s: float
    """Forward and backward passes of all micro-batches."""
    reduce_s: float
    """Gradients over the data-parallel ranks, what overlap does not hide."""
    update_s: float
    """Optimizer."""
    flops: float
    """Model operations of the step, all ranks together."""

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.ahead_s + self.pipeline_s + self.reduce_s + self.update_s


def make_mix(tokens: int, language_share: float, images: int) -> list[Workload]:
    """Text steps and image steps of full rows.

    Args:
        tokens: of a row.
        language_share: share of text steps, 0 to 1.
        images: per row of an image step.
    """
    kinds = (("language", language_share, 0), ("multimodal", 1 - language_share, images))
    return [
        Workload(
            name=name,
            share=share,
            row=StepCounts(images=count, tokens=tokens, squared_lengths=tokens**2, logits=tokens),
        )
        for name, share, count in kinds
        if share > 0
    ]


def stage_loads(case: Case, mix: Sequence[Workload], micro_batch: int) -> list[StageLoad]:
    """What `best_split` chooses from; the split of `case` is not read."""
    loads = []
    for workload in mix:
        pieces = stage_pieces(case, workload.counts(micro_batch))
        layer, first, last = (sum(pieces[name]) for name in ("layer", "first", "last"))
        loads.append(StageLoad(share=workload.share, layer=layer, first=first, last=last))
    return loads


def estimate_step(
    case: Case, workload: Workload, batch: Batch, memory: Sequence[RankMemory], *, simulated: bool = False
) -> StepEstimate:
    """Seconds of one kind of step.

    Args:
        case: the setting, with its split.
        workload: the kind of step.
        batch: how it is cut.
        memory: of every pipeline rank, from `rank_memory`.
        simulated: run the schedule on paper, otherwise take the closed form.
    """
    counts = workload.counts(batch.micro_batch)
    times = stage_times(case, counts)
    seconds = (
        _simulated(case, times, batch.micro_batches) if simulated else _closed_form(case, times, batch.micro_batches)
    )
    return StepEstimate(
        workload=workload,
        ahead_s=ahead_s(case, counts.images * batch.micro_batches),
        pipeline_s=seconds,
        reduce_s=_reduce_s(case, batch.data, memory, max(times.backward)),
        update_s=_update_s(case, memory),
        flops=sum(step_flops(case.model, case.trained, workload.counts(batch.rows)).values()),
    )


def mixed_step_s(case: Case, micro_batches: Sequence[StepCounts], data: int) -> float:
    """Seconds of one step whose micro-batches differ, its schedule run on paper.

    Args:
        case: the setting, with its split.
        micro_batches: what each holds, those of one data-parallel rank.
        data: data-parallel ranks, which all have the same.
    """
    times = [stage_times(case, counts) for counts in micro_batches]
    memory = rank_memory(case, micro_batches[0], micro_batches=len(micro_batches), data=data)
    return (
        ahead_s(case, sum(counts.images for counts in micro_batches))
        + simulate_step(case, times).step_s
        + _reduce_s(case, data, memory, max(times[-1].backward))
        + _update_s(case, memory)
    )


def simulate_step(case: Case, micro_batches: Sequence[StageTimes]) -> Simulation:
    """The schedule of one step on paper; micro-batches may differ."""
    return simulate(
        [times.forward for times in micro_batches],
        [times.backward for times in micro_batches],
        pipeline=case.parallel.pipeline,
        virtual=case.parallel.virtual_pipeline,
        transfer=micro_batches[0].transfer,
    )


def _simulated(case: Case, times: StageTimes, micro_batches: int) -> float:
    """Seconds of the schedule on paper; of a long one the first `ROUNDS` rounds, the others as long as the next."""
    pipeline = case.parallel.pipeline
    more = max(0, micro_batches // pipeline - ROUNDS)
    short = simulate_step(case, [times] * (micro_batches - more * pipeline)).step_s
    if not more:
        return short
    return short + more * (simulate_step(case, [times] * (micro_batches - (more - 1) * pipeline)).step_s - short)


def _closed_form(case: Case, times: StageTimes, micro_batches: int) -> float:
    """sum(t) + (m - 1) * max(t) over ranks; with v chunks per rank the other ranks are waited for 1/v as long.

    Plain stages send while nobody computes, at least when the pipeline fills and empties.
    """
    pipeline, virtual = case.parallel.pipeline, case.parallel.virtual_pipeline
    ranks = [sum(times.both[rank::pipeline]) for rank in range(pipeline)]
    slowest, sent = max(ranks), 2 * (pipeline - 1) * times.transfer if virtual == 1 else 0.0
    return micro_batches * slowest + (sum(ranks) - slowest) / virtual + sent


def _reduce_s(case: Case, data: int, memory: Sequence[RankMemory], last_backward: float) -> float:
    """Summing gradients over the data-parallel ranks; overlap hides it behind the last backward pass."""
    span = data * case.parallel.tensor * case.parallel.pipeline
    gradients = max(rank.gradients for rank in memory)
    seconds = all_reduce_s(case.hardware, gradients, data, span)
    return max(0.0, seconds - last_backward) if case.parallel.overlap_grad_reduce else seconds


def _update_s(case: Case, memory: Sequence[RankMemory]) -> float:
    """The optimizer on the rank that has most to update."""
    return max(2 * (rank.optimizer + rank.gradients) for rank in memory) / case.hardware.bandwidth
