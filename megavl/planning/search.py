"""Find the layout with the shortest expected step for a number of ranks and a memory size.

In: a `Case` whose layout is to be chosen, the kinds of step with their shares, ranks, rows of a step. Out: `Plan`s,
best first. A static layout serves text steps and image steps alike, so what counts is the mean over the shares.

Tried: tensor sizes that divide the model and stay within a node, pipeline sizes, chunks per rank, micro-batches, vision
placements and, for each of these, the least recomputation that fits. The split comes from `best_split` under what
memory allows. All candidates are ranked by the closed form; the best are then run on paper, which includes transfers as
the schedule meets them.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megavl.config import ParallelConfig
from megavl.planning.candidates import (
    PLACEMENTS,
    RECOMPUTE,
    Recomputation,
    layouts,
    placements,
    recomputations,
    with_parallel,
)
from megavl.planning.costs import Case
from megavl.planning.estimate import Batch, StepEstimate, Workload, estimate_step, stage_loads
from megavl.planning.hardware import GIB
from megavl.planning.memory import RankMemory, rank_memory
from megavl.planning.split import best_split

USABLE = 0.92
"""Share of a device's memory that a plan may fill; the rest is for the runtime, buffers of collectives, fragments."""
SIMULATED = 8
"""Best plans that are certainly run on paper."""
MARGIN = 0.05
"""How much faster than by the closed form a plan may be and still be found. Of 876 plans the simulation was more than
4.5% faster only where micro-batches were hardly more than ranks, which is slow anyway. It may be slower by far, 21%
with chunks of unequal length, so that many more than the best are simulated there."""


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
    squeezed: bool = False
    """Whether ranks gave layers away to fit, so that recomputing more may be faster."""

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
    return dataclasses.replace(other, squeezed=True) if other.fits() else plan


def plan_sizes(case: Case, mix: Sequence[Workload], batch: Batch, fixed: Collection[str] = ()) -> Plan | None:
    """The best plan for the sizes of `case` and a cut of the batch; one that does not fit if none does.

    Args:
        case: the setting; its `layout` is chosen.
        mix: kinds of step.
        batch: how the global batch is cut.
        fixed: fields of `case.parallel` to keep: `vision`, `recompute`, `recompute_vision`.

    Returns:
        None if there are more stages than layers.
    """
    plans = _plans(case, mix, batch, fixed)
    fitting = [plan for plan in plans if plan.fits()]
    if fitting:
        return _simulate_best(fitting, mix)[0]
    return min(plans, key=lambda plan: plan.peak_bytes, default=None)


def search(
    case: Case,
    mix: Sequence[Workload],
    *,
    gpus: int,
    global_batch: int,
    fixed: Collection[str] = (),
    micro_batch: int | None = None,
) -> list[Plan]:
    """Plans that fit the memory, best first.

    Args:
        case: sizes, training stage, machine; its layout gives what is not searched.
        mix: kinds of step.
        gpus: ranks.
        global_batch: rows of a step over all ranks.
        fixed: fields of `case.parallel` to keep: `tensor`, `pipeline`, `virtual_pipeline`, `vision`, `recompute`,
            `recompute_vision`.
        micro_batch: rows per forward pass, None: to be chosen.

    Raises:
        ValueError: nothing divides, or nothing fits; says what came closest.
    """
    plans: list[Plan] = []
    for candidate, batch in layouts(case, gpus, global_batch, fixed, micro_batch):
        plans += _plans(candidate, mix, batch, fixed)
    if not plans:
        raise ValueError(
            f"no layout divides {gpus} ranks and {global_batch} rows a step: stage.global_batch must be a multiple of "
            "ranks / (tensor * pipeline), and tensor must divide heads, feed-forward size and vocabulary"
        )
    fitting = [plan for plan in plans if plan.fits()]
    if not fitting:
        least = min(plans, key=lambda plan: plan.peak_bytes)
        used = least.case.parallel
        kept = f"; kept as given: {', '.join(sorted(fixed))}" if fixed else ""
        raise ValueError(
            f"no layout of {len(plans)} fits {case.hardware.memory_gib:g} GiB, of which {100 * USABLE:.0f}% are "
            f"planned with; the smallest needs {least.peak_bytes / GIB:.1f} GiB (tensor {used.tensor}, pipeline "
            f"{used.pipeline}, split {used.layout or case.model.decoder.layers}, recompute {used.recompute}, vision "
            f"{used.vision}){kept}; take more ranks or shorter rows"
        )
    return _simulate_best(fitting, mix)


def _plans(case: Case, mix: Sequence[Workload], batch: Batch, fixed: Collection[str]) -> list[Plan]:
    """For every vision placement the plans with as little recomputation as fits, or the one that is nearest to it."""
    images = max(workload.row.images for workload in mix) * batch.micro_batch * batch.micro_batches
    found: list[Plan] = []
    for placed in placements(case, images, fixed):
        found += _least_recomputed(placed, mix, batch, recomputations(placed, images, fixed))
    return found


def _least_recomputed(
    case: Case, mix: Sequence[Workload], batch: Batch, choices: Sequence[Recomputation]
) -> list[Plan]:
    """Plans that fit and that none with less recomputation beats; where none fits, the one with the most."""

    def planned(choice: Recomputation) -> Plan | None:
        return plan_split(with_parallel(case, recompute=RECOMPUTE[choice[0]], recompute_vision=choice[1]), mix, batch)

    least, most = planned(choices[0]), None
    if least is None or len(choices) == 1 or (least.fits() and not least.squeezed):
        return [least] if least is not None else []
    most = planned(choices[-1])
    assert most is not None, "recomputation does not change which splits exist"
    if not most.fits():  # memory falls with recomputation, so none between fits
        return [most]
    fitting: list[Plan] = []
    enough: list[Recomputation] = []
    for choice in choices:
        if any(choice[0] >= done[0] and choice[1] >= done[1] for done in enough):
            continue
        plan = least if choice == choices[0] else most if choice == choices[-1] else planned(choice)
        if plan is not None and plan.fits():
            fitting.append(plan)
            if not plan.squeezed:
                enough.append(choice)
    return fitting


def _simulate_best(plans: Sequence[Plan], mix: Sequence[Workload]) -> list[Plan]:
    """All plans, best first, of which at least the first `SIMULATED` have run on paper."""
    waiting, done = sorted(plans, key=_order, reverse=True), list[Plan]()
    while waiting:
        enough = len(done) >= SIMULATED
        if enough and (1 - MARGIN) * waiting[-1].expected_s > done[SIMULATED - 1].expected_s:
            break
        plan = waiting.pop()
        done.append(dataclasses.replace(plan_layout(plan.case, mix, plan.batch), squeezed=plan.squeezed))
        done.sort(key=_order)
    return sorted([*done, *waiting], key=_order)


def _order(plan: Plan) -> tuple[float, int, int, int, int]:
    """Faster first; of equals the simpler layout."""
    parallel = plan.case.parallel
    ranks, vision = parallel.tensor * parallel.pipeline, PLACEMENTS.index(parallel.vision)
    return plan.expected_s, ranks, parallel.virtual_pipeline, plan.batch.micro_batch, vision


def _with_split(case: Case, split: Sequence[int]) -> Case:
    return with_parallel(case, layout=",".join(map(str, split)) if len(split) > 1 else "")


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
    """The fields of a recipe that make this plan, as options of a command line; also those at their defaults."""
    names = ["tensor", "pipeline", "virtual_pipeline", "layout", "sequence", "vision", "recompute"]
    names += ["recompute_vision", "distributed_optimizer", "overlap_grad_reduce"]
    values = {name: getattr(parallel, name) for name in names}
    fields = [f"--parallel.{name} {value if value != '' else repr('')}" for name, value in values.items()]
    return [*fields, f"--stage.micro_batch {batch.micro_batch}", f"--stage.global_batch {batch.rows}"]
