"""Look at a run before it costs anything: python -m megavl.train RECIPE.py --dry-run --gpus N [--section.field value]

In: the command line of a run with `--dry-run`; no GPU, no torchrun, and nothing is written. Out: plan, memory of every
rank and what dominates it, time of the run, sources, checkpoints; then every problem at once, and exit status 1 if
there is one. Times are estimates: from a calibration where there is one, from assumed rates otherwise.
"""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megavl.config import Recipe
from megavl.model.sizes import count_parameters
from megavl.parallel.validate import check_layout
from megavl.planning.data_check import DataReport, check_data
from megavl.planning.from_recipe import (
    PLANNED,
    find_hardware,
    plan_auto,
    recipe_batch,
    recipe_case,
    recipe_mix,
    with_layout,
)
from megavl.planning.hardware import GIB, HARDWARE, Hardware, read_calibration
from megavl.planning.report import plan_lines
from megavl.planning.search import USABLE, Plan, plan_layout, plan_sizes
from megavl.recipe import parse_command_line
from megavl.training.freeze import TRAINED
from megavl.validate import validate

FASTER = 0.01
"""Another split, placement or recomputation is named if the given one takes this much longer."""


def dry_run(arguments: Sequence[str]) -> int:
    """Print what a run would be; returns the exit status."""
    parser = argparse.ArgumentParser(prog="megavl.train RECIPE.py --dry-run", allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="look at the run without starting it")
    parser.add_argument("--gpus", type=int, required=True, help="ranks that the run would have")
    parser.add_argument(
        "--hardware", choices=HARDWARE, help="assumed rates (default h200; cpu where the recipe says so)"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a device instead of the hardware's")
    parser.add_argument("--calibration", metavar="FILE", help="measured rates (default: calibration.json of the run)")
    options, rest = parser.parse_known_args(arguments)
    try:
        recipe = parse_command_line(rest)
        hardware = _hardware(recipe, options)
    except ValueError as error:
        print(f"megavl: {error}", file=sys.stderr)
        return 1
    lines, problems = preflight(recipe, options.gpus, hardware)
    print("\n".join(lines))
    if problems:
        print(f"\n{len(problems)} problem(s):", file=sys.stderr)
        print("\n".join(f"- {problem}" for problem in problems), file=sys.stderr)
        return 1
    print("\nno problem found")
    return 0


def preflight(recipe: Recipe, gpus: int, hardware: Hardware) -> tuple[list[str], list[str]]:
    """What the run would be, and everything that stands in its way.

    Args:
        recipe: the run.
        gpus: its ranks.
        hardware: rates and memory of a device.

    Returns:
        Lines to print, and one sentence per problem.
    """
    data = check_data(recipe)
    problems = [*validate(recipe), *data.problems]
    plan, advice, layout_problems = _plan(recipe, gpus, hardware, data)
    problems += layout_problems
    lines = [
        f"{gpus} ranks, {recipe.stage.steps:,} steps of {recipe.stage.global_batch:,} rows, training stage "
        f"{recipe.stage.number}"
    ]
    if plan is not None:
        lines += ["", "PLAN", *plan_lines(plan), *advice, "", "TIME", *_time_lines(recipe, plan)]
        problems += _memory_problems(plan)
    lines += ["", "DATA", *(data.lines or ["no source could be read; rows are taken as full"])]
    size = checkpoint_bytes(recipe)
    lines += ["", "CHECKPOINTS", *_checkpoint_lines(recipe, size, plan)]
    return lines, list(dict.fromkeys([*problems, *_disk_problems(recipe, size)]))


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of one checkpoint: all weights, and the optimizer state of those that are trained."""
    element, state = (2, 12) if recipe.stage.dtype == "bf16" else (4, 8)
    trained = TRAINED[recipe.stage.number]
    return sum(count * (element + state * trained[name]) for name, count in count_parameters(recipe.model).items())


def _hardware(recipe: Recipe, options: argparse.Namespace) -> Hardware:
    """The machine that the options or the recipe name."""
    named = options.hardware or ("cpu" if recipe.parallel.device == "cpu" else "h200")
    found = find_hardware(recipe, named)
    if options.calibration:
        found = read_calibration(options.calibration, HARDWARE[named])
    return dataclasses.replace(found, memory_gib=options.memory) if options.memory else found


def _plan(recipe: Recipe, gpus: int, hardware: Hardware, data: DataReport) -> tuple[Plan | None, list[str], list[str]]:
    """The layout with its costs, what would be faster, and what is wrong with it."""
    auto = recipe.parallel.layout == "auto"
    plain = with_layout(recipe, "") if auto else recipe
    problems = check_layout(plain, gpus)
    mix = recipe_mix(recipe, data.stores)
    if problems or not mix:
        return None, [], problems
    if auto:
        return plan_auto(recipe, hardware, mix, gpus), [], []
    case, batch = recipe_case(recipe, hardware), recipe_batch(recipe, gpus)
    plan, best = plan_layout(case, mix, batch), plan_sizes(case, mix, batch)
    assert best is not None, "more stages than layers"
    return plan, _advice(plan, best), []


def _advice(plan: Plan, best: Plan) -> list[str]:
    """What would fit, or be faster, with the same sizes; nothing if `plan` is about as good."""
    fields = [
        f"parallel.{name} {getattr(best.case.parallel, name)}"
        for name in ("layout", *PLANNED)
        if getattr(best.case.parallel, name) != getattr(plan.case.parallel, name)
    ]
    gain = plan.expected_s / best.expected_s - 1
    if not fields or not best.fits():
        return []
    if not plan.fits():
        return [f"with {', '.join(fields)} it is estimated to fit"]
    return [f"{', '.join(fields)} is estimated to be {100 * gain:.1f}% faster"] if gain > FASTER else []


def _memory_problems(plan: Plan) -> list[str]:
    """Ranks that do not fit their device."""
    allowed = USABLE * plan.case.hardware.memory_gib
    return [
        f"pipeline rank {rank} needs {memory.total / GIB:.1f} GiB, most of it {memory.largest()}; a device has "
        f"{plan.case.hardware.memory_gib:g} GiB, of which {allowed:.1f} are planned with"
        for rank, memory in enumerate(plan.memory)
        if memory.total > allowed * GIB
    ]


def _time_lines(recipe: Recipe, plan: Plan) -> list[str]:
    """The whole run."""
    seconds = recipe.stage.steps * plan.expected_s
    return [
        f"about {_duration(seconds)} for {recipe.stage.steps:,} steps (estimate from {plan.case.hardware.origin}; "
        "without data waits, checkpoints and held-out measurements)"
    ]


def _checkpoint_lines(recipe: Recipe, size: int, plan: Plan | None) -> list[str]:
    """Size, how often, and how much stays."""
    saving = recipe.checkpoint
    lines = [f"{size / GIB:.1f} GiB each, {saving.keep} kept: {saving.keep * size / GIB:.1f} GiB in {recipe.run_dir}"]
    often = []
    if saving.every_steps:
        every = f", about {_duration(saving.every_steps * plan.expected_s)}" if plan else ""
        often.append(f"every {saving.every_steps:,} steps{every}")
    if saving.every_minutes:
        often.append(f"every {saving.every_minutes:g} minutes")
    lines.append(f"saved {' and '.join(often)}" if often else "saved only at the end and when asked to stop")
    return lines


def _disk_problems(recipe: Recipe, size: int) -> list[str]:
    """A folder that cannot hold the checkpoints, a start that is not there."""
    problems = []
    folder = next(p for p in (Path(recipe.run_dir).absolute(), *Path(recipe.run_dir).absolute().parents) if p.exists())
    free, keep = shutil.disk_usage(folder).free, recipe.checkpoint.keep
    needed = (keep + 1) * size  # the next one is complete before the oldest goes
    if free < needed:
        problems.append(
            f"checkpoint.keep {keep} needs room for {keep + 1} checkpoints, {needed / GIB:.1f} GiB; {folder} has "
            f"{free / GIB:.1f} GiB free on this machine"
        )
    start = recipe.checkpoint.init_from
    if start and not Path(start).exists():
        problems.append(f"checkpoint.init_from {start}: there is no such folder")
    return problems


def _duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
