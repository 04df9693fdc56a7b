"""Find the layout with the shortest expected step for a number of ranks and a memory size.

In: a `Case` whose layout is to be chosen, the kinds of step with their shares, ranks, rows of a step. Out: `Plan`s,
best first. A static layout serves text steps and image steps alike, so what counts is the mean over the shares.

Tried: tensor sizes that divide the model and stay within a node, pipeline sizes, chunks per rank, micro-batches. For
each the split comes from `best_split` under what memory allows. All candidates are ranked by the closed form; the best
few are then run on paper, which includes transfers as the schedule meets them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megavl.config import ParallelConfig
from megavl.planning.costs import Case
from megavl.planning.estimate import Batch, StepEstimate, Workload, estimate_step, stage_loads
from megavl.planning.hardware import GIB
from megavl.planning.memory import RankMemory, rank_memory
from megavl.planning.split import best_split

USABLE = 0.92
"""Share of a device's memory that a plan may fill; the rest is for the runtime, buffers of collectives, fragments."""
SIMULATED = 6
"""Candidates that are run on paper."""
CHUNKS = (1, 2, 3, 4, 5)
"""Chunks per rank that are tried."""
MICRO_BATCHES = (1, 2, 4, 8)
"""Rows per forward pass that are tried."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout with what it is expected to cost."""

    case: Case
    """The setting with the chosen layout."""
    batch: Batch
    """How the global batch is cut."""
    steps: tuple[StepEstimate, ...]
    """One per kind of step."""
    memory: tuple[RankMemory, ...]
    """By pipeline rank, for the kind of step that takes most."""

    @property
    def expected_s(self) -> float:
        """Seconds of a step, mean over the kinds."""
        total = sum(step.workload.share for step in self.steps)
        return sum(step.workload.share * step.step_s for step in self.steps) / total

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return max(rank.total for rank in self.memory)

    def fits(self) -> bool:
        """Whether every rank has the memory."""
        return self.peak_bytes <= USABLE * self.case.hardware.memory_gib * GIB


def plan_layout(case: Case, mix: Sequence[Workload], batch: Batch, *, simulated: bool = True) -> Plan:
    """What a given layout costs."""
    memory = _memory(case, mix, batch)
    steps = (estimate_step(case, w, batch, memory, simulated=simulated) for w in mix)
    return Plan(case=case, batch=batch, steps=tuple(steps), memory=tuple(memory))


def plan_split(case: Case, mix: Sequence[Workload], batch: Batch) -> Plan | None:
    """The best split for the tensor, pipeline and virtual sizes of `case`, by the closed form; None if none exists.

    Ranks that would exceed their memory give layers away; where no split fits, the one without that limit is returned,
    and `Plan.fits` is false.
    """
    loads = stage_loads(case, mix, batch.micro_batch)
    layers, parallel = case.model.decoder.layers, case.parallel
    free = best_split(loads, layers, parallel.pipeline, virtual=parallel.virtual_pipeline)
    if free is None:
        return None
    plan = plan_layout(_with_split(case, free), mix, batch, simulated=False)
    if plan.fits() or parallel.pipeline == 1:
        return plan
    caps = _caps(plan, mix)
    limited = best_split(loads, layers, parallel.pipeline, virtual=parallel.virtual_pipeline, caps=caps)
    if limited is None:
        return plan
    other = plan_layout(_with_split(case, limited), mix, batch, simulated=False)
    return other if other.fits() else plan


def search(
    case: Case,
    mix: Sequence[Workload],
    *,
    gpus: int,
    global_batch: int,
    fixed: Sequence[str] = (),
    micro_batch: int | None = None,
) -> list[Plan]:
    """Plans that fit the memory, best first.

    Args:
        case: sizes, training stage, machine; its layout gives what is not searched.
        mix: kinds of step.
        gpus: ranks.
        global_batch: rows of a step over all ranks.
        fixed: sizes of `case.parallel` to keep: `tensor`, `pipeline`, `virtual_pipeline`.
        micro_batch: rows per forward pass, None: to be chosen.

    Raises:
        ValueError: nothing divides, or nothing fits; says what came closest.
    """
    plans = []
    for candidate, batch in _candidates(case, gpus, global_batch, fixed, micro_batch):
        plan = plan_split(candidate, mix, batch)
        if plan is not None:
            plans.append(plan)
    if not plans:
        raise ValueError(
            f"no layout divides {gpus} ranks and {global_batch} rows a step: stage.global_batch must be a multiple of "
            "ranks / (tensor * pipeline), and tensor must divide heads, feed-forward size and vocabulary"
        )
    fitting = [plan for plan in plans if plan.fits()]
    if not fitting:
        least = min(plans, key=lambda plan: plan.peak_bytes)
        raise ValueError(
            f"no layout of {len(plans)} fits {case.hardware.memory_gib:g} GiB; the smallest needs "
            f"{least.peak_bytes / USABLE / GIB:.1f} GiB (tensor {least.case.parallel.tensor}, pipeline "
            f"{least.case.parallel.pipeline}, split {least.case.parallel.layout}); recompute more or take more ranks"
        )
    return _simulate_best(fitting, mix)


def _simulate_best(plans: Sequence[Plan], mix: Sequence[Workload]) -> list[Plan]:
    """All plans, best first, of which the first `SIMULATED` have run on paper."""
    ordered, done = sorted(plans, key=_order), 0
    run: set[int] = set()
    while done < min(SIMULATED, len(ordered)):
        if id(ordered[done]) in run:
            done += 1
            continue
        ordered[done] = plan_layout(ordered[done].case, mix, ordered[done].batch)
        run.add(id(ordered[done]))
        ordered.sort(key=_order)
        done = 0
    return ordered


def _order(plan: Plan) -> tuple[float, int, int, int]:
    """Faster first; of equals the simpler layout."""
    parallel = plan.case.parallel
    return plan.expected_s, parallel.tensor * parallel.pipeline, parallel.virtual_pipeline, plan.batch.micro_batch


def _candidates(
    case: Case, gpus: int, global_batch: int, fixed: Sequence[str], micro_batch: int | None
) -> Iterator[tuple[Case, Batch]]:
    """Every layout and cut of the batch that divides."""
    decoder, given = case.model.decoder, case.parallel
    shared = (decoder.heads, decoder.kv_heads, decoder.ffn, decoder.vocab)
    tensors = [given.tensor] if "tensor" in fixed else range(1, case.hardware.node + 1)
    for tensor in (t for t in tensors if not any(size % t for size in shared)):
        pipelines = [given.pipeline] if "pipeline" in fixed else range(1, decoder.layers + 1)
        for pipeline in (p for p in pipelines if gpus % (tensor * p) == 0):
            data = gpus // (tensor * pipeline)
            chunks = [given.virtual_pipeline] if "virtual_pipeline" in fixed else CHUNKS if pipeline > 1 else (1,)
            for virtual in (v for v in chunks if v * pipeline <= decoder.layers):
                for rows in [micro_batch] if micro_batch else MICRO_BATCHES:
                    count, rest = divmod(global_batch, rows * data)
                    if rest or not count or (virtual > 1 and count % pipeline):
                        continue
                    parallel = dataclasses.replace(
                        given,
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        layout="",
                        sequence=given.sequence and tensor > 1,
                    )
                    batch = Batch(micro_batch=rows, micro_batches=count, data=data)
                    yield dataclasses.replace(case, parallel=parallel), batch


def _with_split(case: Case, split: Sequence[int]) -> Case:
    layout = ",".join(map(str, split)) if len(split) > 1 else ""
    return dataclasses.replace(case, parallel=dataclasses.replace(case.parallel, layout=layout))


def _memory(case: Case, mix: Sequence[Workload], batch: Batch) -> list[RankMemory]:
    """By pipeline rank, the larger of the kinds of step."""
    kinds = [
        rank_memory(case, w.counts(batch.micro_batch), micro_batches=batch.micro_batches, data=batch.data) for w in mix
    ]
    return [max(ranks, key=lambda rank: rank.total) for ranks in zip(*kinds, strict=True)]


def _caps(plan: Plan, mix: Sequence[Workload]) -> list[int]:
    """Most layers of each rank: what a layer takes there, seen by moving one away, and how much room is left."""
    parallel, allowed = plan.case.parallel, USABLE * plan.case.hardware.memory_gib * GIB
    split = [int(count) for count in parallel.layout.split(",")]
    caps = []
    for rank, memory in enumerate(plan.memory):
        mine = range(rank, len(split), parallel.pipeline)
        source = max(mine, key=lambda stage: split[stage])
        moved = [n - (at == source) + (at == (source + 1) % len(split)) for at, n in enumerate(split)]
        held, per_layer = sum(split[stage] for stage in mine), 0.0
        if split[source] > 1:
            fewer = _memory(_with_split(plan.case, moved), mix, plan.batch)[rank]
            per_layer = memory.total - fewer.total
        room = (allowed - memory.total) // per_layer if per_layer > 0 else 0
        caps.append(max(parallel.virtual_pipeline, held + int(room)))
    return caps


def parallel_fields(parallel: ParallelConfig, batch: Batch) -> list[str]:
    """The fields of a recipe that make this plan, as options of a command line."""
    default = ParallelConfig()
    names = ["tensor", "pipeline", "virtual_pipeline", "layout", "sequence", "vision", "recompute"]
    names += ["recompute_vision", "distributed_optimizer", "overlap_grad_reduce"]
    fields = [
        f"--parallel.{name} {getattr(parallel, name)}"
        for name in names
        if getattr(parallel, name) != getattr(default, name)
    ]
    return [*fields, f"--stage.micro_batch {batch.micro_batch}", f"--stage.global_batch {batch.rows}"]
