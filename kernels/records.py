"""Measured rows: kept as CSV per GPU, shown as a table in README.md and as a roofline plot.

In: timings of a case (`megavl.kernels.benchmark`). Out: `kernels/results/<gpu>.csv`, in which a new measurement of the
same thing replaces the old one, and what is drawn from it.
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from megavl.kernels.ahead_of_time import read_table
from megavl.kernels.benchmark import (
    KERNELS,
    OURS,
    Case,
    Ceilings,
    Timing,
    calls_per_step,
    case_bytes,
    floor_ms,
)

RESULTS = KERNELS / "results"
README = KERNELS / "README.md"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where and when a row was measured."""

    gpu: str
    """Name of the device."""
    date: str
    """Day, ISO."""
    commit: str
    """Commit of the working tree, with `+` where files differ from it."""
    torch: str
    """Version."""
    triton: str
    """Version."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of one case; a line of the CSV."""

    op: str
    case: str
    direction: str
    dtype: str
    implementation: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int
    gb_per_s: float
    """Bytes of the case, each counted once, over the median."""
    tflop_per_s: float
    """Matrix-product operations of the case over the median."""
    floor_ms: float
    percent_of_floor: float
    """100 where the median is the floor."""
    peak_mib: float
    times_ours: float
    """Median over that of our kernel: above 1 the peer is slower. 0 where ours was not timed."""
    step_share: str
    """`MODEL PERCENT`: all calls of a micro-batch over that micro-batch at the matmul ceiling (an upper bound of the
    share of a real step, which runs below the ceiling)."""
    intensity: float
    """Operations per byte of the case."""
    copy_gb_per_s: float
    """Ceiling of the same run."""
    matmul_tflop_per_s: float
    """Ceiling of the same run."""
    gpu: str
    date: str
    commit: str
    torch: str
    triton: str

    def key(self) -> tuple[str, ...]:
        """What a later measurement of the same thing shares."""
        return self.op, self.case, self.direction, self.dtype, self.implementation


def make_rows(
    case: Case,
    dtype: torch.dtype,
    timings: dict[str, Timing],
    ceilings: Ceilings,
    step_flops: dict[str, float],
    origin: Origin,
) -> list[Row]:
    """Rows of one case.

    Args:
        case: what was timed.
        dtype: in which type.
        timings: by implementation.
        ceilings: of the same run.
        step_flops: model -> operations of one micro-batch, forward and backward.
        origin: where.
    """
    size, floor = case_bytes(case, dtype), floor_ms(case, dtype, ceilings)
    ours = timings[OURS].p50 if OURS in timings else None
    rows = []
    for name, timing in timings.items():
        rows.append(
            Row(
                op=case.op,
                case=case.name,
                direction=case.direction,
                dtype=str(dtype).removeprefix("torch."),
                implementation=name,
                p20_ms=timing.p20,
                p50_ms=timing.p50,
                p80_ms=timing.p80,
                repeats=timing.repeats,
                gb_per_s=size / timing.p50 / 1e6,
                tflop_per_s=case.flops / timing.p50 / 1e9,
                floor_ms=floor,
                percent_of_floor=100 * floor / timing.p50,
                peak_mib=timing.peak_mib,
                times_ours=timing.p50 / ours if ours else 0.0,
                step_share=_step_share(case, timing.p50, ceilings, step_flops),
                intensity=case.flops / size if size else 0.0,
                copy_gb_per_s=ceilings.copy / 1e9,
                matmul_tflop_per_s=ceilings.matmul / 1e12,
                **asdict(origin),
            )
        )
    return rows


def _step_share(case: Case, p50: float, ceilings: Ceilings, step_flops: dict[str, float]) -> str:
    """`MODEL PERCENT` for every model whose step holds the case."""
    shares = {
        model: 100 * calls * p50 / (1e3 * step_flops[model] / ceilings.matmul)
        for model, calls in calls_per_step(case).items()
        if model in step_flops
    }
    return ", ".join(f"{model} {share:.2g}%" for model, share in shares.items())


def csv_path(gpu: str, folder: Path = RESULTS) -> Path:
    """`NVIDIA H200` -> `nvidia_h200.csv`."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}.csv"


def write_rows(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Add rows to a file, in place of older ones with the same key; returns all rows of the file."""
    merged = {row.key(): row for row in [*(read_rows(path) if path.exists() else []), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in merged.values())
    return list(merged.values())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [Row(**{f.name: f.type(line[f.name]) for f in fields(Row)}) for line in lines]  # type: ignore[operator]


def measured_table(rows: list[Row]) -> str:
    """Our kernels as Markdown, one line per case, peers as ratios."""
    lines = [
        "| operator | case | direction | type | p20 / p50 / p80 ms | GB/s | TFLOP/s | % of floor | peak MiB | peers, "
        "times our median (peak MiB) | share of a step |",
        "|---|---|---|---|---|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        if row.implementation != OURS:
            continue
        peers = [r for r in rows if r.key()[:-1] == row.key()[:-1] and r.implementation != OURS]
        beside = ", ".join(f"{r.implementation} {r.times_ours:.2f} ({r.peak_mib:.0f})" for r in peers)
        times = f"{row.p20_ms:.4f} / {row.p50_ms:.4f} / {row.p80_ms:.4f}"
        figures = f"{row.gb_per_s:.0f} | {row.tflop_per_s:.1f} | {row.percent_of_floor:.0f} | {row.peak_mib:.0f}"
        lines.append(
            f"| {row.op} | {row.case} | {row.direction} | {row.dtype} | {times} | {figures} | {beside} | "
            f"{row.step_share} |"
        )
    origins = sorted({f"{r.gpu}, {r.date}, commit {r.commit}, torch {r.torch}, triton {r.triton}" for r in rows})
    ceilings = sorted({f"copy {r.copy_gb_per_s:.0f} GB/s, matmul {r.matmul_tflop_per_s:.0f} TFLOP/s" for r in rows})
    return "\n".join([*lines, "", "; ".join(origins) + ". Ceilings of the runs: " + "; ".join(ceilings) + "."])


def compile_table() -> str:
    """`results/compiled.csv` as Markdown."""
    lines = [
        "| operator | kernel and configuration | target | warps | stages | registers | shared bytes | spills | "
        "instructions counted |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for r in read_table().values():
        sizes = f"{r['num_warps']} | {r['num_stages']} | {r['registers']} | {r['shared_bytes']} | {r['spill_bytes']}"
        lines.append(f"| {r['op']} | {r['variant']} | sm_{r['capability']} | {sizes} | {r['counts']} |")
    versions = sorted({r["triton"] for r in read_table().values()})
    return "\n".join([*lines, "", f"Compiled by triton {', '.join(versions)}."])


def put_table(name: str, table: str, path: Path = README) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
        ValueError: the file lacks a marker.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = path.read_text()
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(
            f"{path} has {text.count(start)} lines {start} and {text.count(end)} lines {end}; needs 1 each"
        )
    before, after = text.partition(start)[0], text.partition(end)[2]
    path.write_text(f"{before}{start}\n\n{table}\n\n{end}{after}")


def plot_roofline(rows: list[Row], path: Path) -> None:
    """Our kernels under the ceilings of their runs, as a picture: matrix operations per byte against their rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    copy, matmul = (max(getattr(r, f) for r in rows) for f in ("copy_gb_per_s", "matmul_tflop_per_s"))
    ridge = 1e3 * matmul / copy
    right = max(10 * ridge, *(2 * r.intensity for r in rows))
    axes.plot([1, ridge, right], [copy / 1e3, matmul, matmul], color="black", label="ceilings of the run")
    left = 1.0
    for op in sorted({r.op for r in rows}):
        # Operators without matrix products stand at the left, each at a place of its own, under the same line.
        ours = [r for r in rows if r.op == op and r.implementation == OURS]
        points = [(r.intensity, r.tflop_per_s) if r.intensity >= 1 else (left, left * r.gb_per_s / 1e3) for r in ours]
        left *= 1.3 if any(r.intensity < 1 for r in ours) else 1.0
        if points:
            axes.scatter([x for x, _ in points], [y for _, y in points], s=18, label=op)
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte (left, side by side: no products)", ylabel="TFLOP/s"
    )
    axes.set_title(rows[0].gpu)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
