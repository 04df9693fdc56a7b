"""A plan in words: the table that start-up, the preflight and `tools/plan_pipeline.py` print.

In: a `Plan`. Out: lines of text. Every time in them is an estimate, and the lines say from what.
"""

from collections.abc import Sequence

from megavl.config import ParallelConfig
from megavl.parallel.stage_plan import StagePlace, stage_plan
from megavl.planning.costs import Case, stage_times
from megavl.planning.hardware import GIB
from megavl.planning.search import Plan
from megavl.training.flops import peak_flops


def plan_lines(plan: Plan) -> list[str]:
    """Layout, a line per pipeline rank, a line per kind of step."""
    parallel, batch, case = plan.case.parallel, plan.batch, plan.case
    sizes = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {batch.data}"
    sizes += f", {parallel.virtual_pipeline} chunks a rank" if parallel.virtual_pipeline > 1 else ""
    split = parallel.layout or str(case.model.decoder.layers)
    lines = [
        f"layout {split}   ({sizes}; decoder layers per pipeline stage)",
        f"{batch.micro_batches} micro-batches of {batch.micro_batch} row(s) on each data-parallel rank, vision "
        f"{parallel.vision}, recompute {_recomputed(parallel)}",
        _rates_line(case),
    ]
    return [*lines, *_rank_lines(plan), *step_lines(plan)]


def _rank_lines(plan: Plan) -> list[str]:
    """Per pipeline rank: what it holds, milliseconds of a micro-batch of each kind, bytes."""
    case, places = plan.case, stage_plan(plan.case.model, plan.case.parallel)
    kinds = [step.workload for step in plan.steps]
    times = [stage_times(case, kind.counts(plan.batch.micro_batch)).both for kind in kinds]
    header = [f"{kind.name} ms" for kind in kinds]
    lines = [
        f"{'rank':>4}  {'layers':>8}  {'parameters':>12}  {'  '.join(f'{h:>14}' for h in header)}  {'memory':>9}"
        "  most of it"
    ]
    for rank, memory in enumerate(plan.memory):
        mine = [place for place in places if place.rank == rank]
        seconds = [sum(row[rank :: case.parallel.pipeline]) for row in times]
        lines.append(
            f"{rank:4}  {_layers(mine):>8}  {sum(p.parameters for p in mine) / 1e6:10.1f} M  "
            f"{'  '.join(f'{1e3 * s:14.2f}' for s in seconds)}  {memory.total / GIB:5.1f} GiB  {memory.largest()}"
        )
    if not plan.fits():
        lines.append(f"does not fit: {plan.peak_bytes / GIB:.1f} GiB on a device of {case.hardware.memory_gib:g} GiB")
    return lines


def step_lines(plan: Plan) -> list[str]:
    """Per kind of step: seconds, where they go, bubble, tokens per second."""
    gpus = plan.batch.data * plan.case.parallel.tensor * plan.case.parallel.pipeline
    peak = peak_flops(plan.case.hardware.name.upper()) if plan.case.hardware.gpu and plan.case.dtype == "bf16" else None
    lines = []
    for step in plan.steps:
        times = stage_times(plan.case, step.workload.counts(plan.batch.micro_batch)).both
        ranks = [sum(times[rank :: plan.case.parallel.pipeline]) for rank in range(plan.case.parallel.pipeline)]
        idle = [1 - plan.batch.micro_batches * seconds / step.pipeline_s for seconds in ranks]
        parts = [("ahead", step.ahead_s), ("pipeline", step.pipeline_s)]
        parts += [("reduction", step.reduce_s), ("update", step.update_s)]
        where = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in parts if seconds)
        tokens = step.workload.row.tokens * plan.batch.rows / step.step_s
        mfu = f", MFU {100 * step.flops / step.step_s / gpus / peak:.1f}%" if peak else ""
        lines.append(
            f"{step.workload.name} step ({100 * step.workload.share:.0f}%; a row is {step.workload.row.tokens} tokens, "
            f"{step.workload.row.images} images): {1e3 * step.step_s:.1f} ms ({where}); idle "
            f"{'/'.join(f'{100 * max(0.0, share):.1f}' for share in idle)}% by rank; {tokens:,.0f} tokens/s{mfu}"
        )
    return [*lines, f"expected step over the shares: {1e3 * plan.expected_s:.1f} ms"]


def ranking_lines(plans: Sequence[Plan], count: int) -> list[str]:
    """The best plans side by side."""
    lines = [
        f"{'tensor':>6} {'pipeline':>8} {'chunks':>6} {'rows':>4}  {'step ms':>9}  {'memory':>9}  {'vision':12}  "
        "recompute  layout"
    ]
    for plan in plans[:count]:
        parallel = plan.case.parallel
        lines.append(
            f"{parallel.tensor:6} {parallel.pipeline:8} {parallel.virtual_pipeline:6} {plan.batch.micro_batch:4}  "
            f"{1e3 * plan.expected_s:9.1f}  {plan.peak_bytes / GIB:5.1f} GiB  {parallel.vision:12}  "
            f"{_recomputed(parallel):9}  {parallel.layout or 'all'}"
        )
    return lines


def _rates_line(case: Case) -> str:
    """Where the times come from."""
    hardware, tera = case.hardware, case.hardware.flops("bf16" if case.dtype == "bf16" else "fp32") / 1e12
    if hardware.measured:
        return f"times are estimates, parts {hardware.origin}; links are assumed"
    return (
        f"times are estimates from assumed rates of {hardware.name}: {tera:.4g} TFLOP/s {case.dtype}, memory "
        f"{hardware.bandwidth / 1e12:.3g} TB/s, links {hardware.fast_link / 1e9:g} GB/s in a node and "
        f"{hardware.slow_link / 1e9:g} between nodes; `tools/plan_pipeline.py --calibrate` measures instead"
    )


def _recomputed(parallel: ParallelConfig) -> str:
    """Both switches in words, such as `full+vision`."""
    return parallel.recompute + "+vision" * parallel.recompute_vision


def _layers(places: Sequence[StagePlace]) -> str:
    """Layers of each chunk of a rank, such as `8` or `4+4`."""
    return "+".join(str(len(place.layers)) for place in places)
