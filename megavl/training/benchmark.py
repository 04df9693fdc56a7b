"""One measured row: steps of a recipe at its own shapes, timed after a warm-up.

In: a recipe and how many steps. Out: a `Row`: median and spread of the step time, rates, memory, and what was measured
where, ready to be appended to a CSV file.
"""

import csv
import dataclasses
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import megatron.core
import torch
import torch.distributed as dist

from megavl.config import ParallelConfig, Recipe
from megavl.ops import choose
from megavl.parallel.groups import Groups
from megavl.training.flops import peak_flops
from megavl.training.rank_report import StepTotals
from megavl.training.step import StepResult
from megavl.training.synthetic_run import DTYPES, SyntheticRun, build_run, recipe_batch
from megavl.training.throughput import head_skips_unlabelled, step_counts, throughput


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the CSV; times are medians over the timed steps. Empty in the file: not known."""

    device: str
    date: str
    commit: str
    """Short; `+` behind it: the files had changes that were not committed."""
    versions: str
    model: str
    """What the command line calls it."""
    layers: int
    """Decoder layers: fewer than the model's own where it was reduced."""
    stage: int
    """Training stage."""
    dtype: str
    ranks: int
    layout: str
    vision: str
    """Placement."""
    kernels: str
    """Operators that run in Triton."""
    recompute: str
    compile_vision: bool
    images_per_row: int
    tokens: int
    """Per step, all data-parallel ranks."""
    images: int
    """Per step, all data-parallel ranks."""
    steps: int
    """Timed."""
    step_ms: float
    """Median; the slowest rank of each step counts."""
    p10_ms: float
    p90_ms: float
    tokens_per_s: float
    images_per_s: float
    tflops: float
    llm_tflops: float
    hardware_tflops: float
    mfu: float | None
    llm_mfu: float | None
    hfu: float | None
    vision_ms: float
    forward_ms: float
    backward_ms: float
    reduction_ms: float
    optimizer_ms: float
    bubble: float
    """Of the pipeline rank with the largest."""
    memory_gib: float


def measure(
    recipe: Recipe, groups: Groups, *, name: str, images: int, micro_batches: int, warm_up: int, steps: int
) -> Row:
    """Time steps on fresh random data; all ranks must call it.

    Args:
        recipe: what to run.
        groups: this rank's groups.
        name: the model's, for the row.
        images: of each row.
        micro_batches: of each data-parallel rank in a step.
        warm_up: steps before the first that counts.
        steps: that count.

    Raises:
        ValueError: the images do not fit into a row.
    """
    run = build_run(recipe, groups)
    seconds: list[float] = []
    said: list[tuple[StepResult, StepTotals]] = []
    batch = recipe_batch(recipe, groups, images, micro_batches=micro_batches, step=0)
    for step in range(warm_up + steps):
        upcoming = recipe_batch(recipe, groups, images, micro_batches=micro_batches, step=step + 1)
        dist.barrier(group=groups.gloo_world)
        began = perf_counter()
        step_said = run.step(batch, upcoming)
        if step >= warm_up:
            seconds.append(perf_counter() - began)
            said.append(step_said)
        batch = upcoming
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=groups.gloo_world)
    return _row(run, said, slowest.tolist(), name=name, images=images)


def _row(
    run: SyntheticRun,
    said: Sequence[tuple[StepResult, StepTotals]],
    seconds: Sequence[float],
    *,
    name: str,
    images: int,
) -> Row:
    recipe, groups = run.recipe, run.groups
    median = statistics.median(seconds)
    on_cuda = groups.device.type == "cuda"
    device = torch.cuda.get_device_name(groups.device) if on_cuda else f"CPU {platform.machine()}"
    dtype, totals = DTYPES[recipe.stage.dtype], [of_step for _, of_step in said]
    counts, padded = step_counts(*said[0], head_skips=head_skips_unlabelled(recipe, groups.device, dtype))
    speed = throughput(
        recipe.model,
        recipe.parallel,
        run.trained,
        counts=counts,
        padded=padded,
        seconds=median,
        ranks=groups.world_size,
        peak=peak_flops(device) if recipe.stage.dtype == "bf16" else None,
    )
    chosen = choose(recipe.kernels, groups.device, dtype)
    tenths = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [median] * 9
    return Row(
        device=device,
        date=date.today().isoformat(),
        commit=_commit(),
        versions=_versions(),
        model=name,
        layers=recipe.model.decoder.layers,
        stage=recipe.stage.number,
        dtype=recipe.stage.dtype,
        ranks=groups.world_size,
        layout=describe_layout(recipe.parallel, groups),
        vision=recipe.parallel.vision,
        kernels=" ".join(op for op, choice in chosen.items() if choice.implementation == "triton") or "none",
        recompute=recipe.parallel.recompute + (" + vision" if recipe.parallel.recompute_vision else ""),
        compile_vision=recipe.parallel.compile_vision,
        images_per_row=images,
        tokens=padded.tokens,
        images=padded.images,
        steps=len(seconds),
        step_ms=1e3 * median,
        p10_ms=1e3 * tenths[0],
        p90_ms=1e3 * tenths[-1],
        **{f"{part}_ms": 1e3 * statistics.median(t.parts[part] for t in totals) for part in totals[0].parts},
        bubble=statistics.median(max(t.bubble) for t in totals),
        memory_gib=max(t.memory for t in totals) / 2**30,
        **dataclasses.asdict(speed),
    )


def describe_layout(parallel: ParallelConfig, groups: Groups) -> str:
    """A layout in a word, as `tools/verify_layouts.py` reads it, with the data-parallel size in front."""
    sizes = {"tp": parallel.tensor, "pp": parallel.pipeline, "vpp": parallel.virtual_pipeline}
    switches = {
        "sp": parallel.sequence,
        "dist": parallel.distributed_optimizer,
        "overlap": parallel.overlap_grad_reduce,
        "gather": parallel.overlap_param_gather,
    }
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1] + [n for n, on in switches.items() if on]
    split = f" ({parallel.layout})" if parallel.layout else ""
    return f"dp{groups.data_size}" + "".join(parts) + split


def append_row(path: Path, row: Row) -> None:
    """Add a line to a CSV file, which is made if it is not there.

    Raises:
        ValueError: the file has other columns.
    """
    columns = [field.name for field in dataclasses.fields(Row)]
    values = {name: "" if value is None else value for name, value in dataclasses.asdict(row).items()}
    values = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text().splitlines()[:1] if path.exists() else []
    if old and next(csv.reader(old)) != columns:
        raise ValueError(f"{path} has {len(next(csv.reader(old)))} other columns than the {len(columns)} of a row")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not old:
            writer.writeheader()
        writer.writerow(values)


def _versions() -> str:
    found = {"torch": torch.__version__, "megatron-core": megatron.core.__version__, "triton": _triton()}
    return ", ".join(f"{name} {number}" for name, number in found.items() if number)


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the checkout that this file is in."""
    commit, changes = (
        subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    return (commit.strip() or "unknown") + ("+" if changes.strip() else "")
