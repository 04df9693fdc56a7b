r"""Time the Triton kernels against their peers, or trace one training step.

    python tools/profile_kernels.py                                         # every operator at DeepSeek-VL's shapes
    python tools/profile_kernels.py --op sam_attention --shape mb8 --peer eager --dtype bf16
    python tools/profile_kernels.py --tables                                # the kept tables into kernels/README.md
    python tools/profile_kernels.py --tune --op swiglu                      # try other launch configurations
    python tools/profile_kernels.py --trace RECIPE.py --parallel.tensor 1   # Chrome trace, time by operator and module
    torchrun --nproc-per-node 4 tools/profile_kernels.py --trace RECIPE.py  # the same for a layout, one trace a rank

An operator is timed only if it agrees with its reference in the type that is timed. Rows go to
`kernels/results/<gpu>.csv`, the table into `kernels/README.md`, the roofline beside the CSV; with `--out FOLDER` all of
it goes there, the table into `FOLDER/README.md`. Without a GPU the agreement is checked in Triton's interpreter and
nothing is timed.

Exit status: 0 if every operator agrees with its reference and ran, 1 otherwise.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

if not torch.cuda.is_available():  # Triton reads it when a kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"

import triton

from megavl.config import Recipe
from megavl.kernels.benchmark import OURS, Ceilings, Timing, cases, gate, measure_ceilings, operators, time_case
from megavl.kernels.configurations import TABLE as CONFIGURATIONS
from megavl.kernels.records import (
    README,
    RESULTS,
    Origin,
    Row,
    compile_table,
    csv_path,
    make_rows,
    measured_table,
    plot_roofline,
    put_table,
    read_rows,
    write_rows,
)
from megavl.model.sizes import SIZES
from megavl.training.flops import StepCounts, step_flops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODELS = ("1.3b", "1.3b_hybrid", "7b")
TOKENS, IMAGES = 4096, 4
"""The micro-batch that a kernel's share refers to."""


def main(arguments: Sequence[str]) -> int:
    """Gate, time, write; or trace. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only this operator (may be given several times)")
    parser.add_argument("--shape", action="append", help="only cases whose name has this part, such as 7b or mb8")
    parser.add_argument("--peer", action="append", help="only this peer beside our kernel, such as eager")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="type of the inputs (default bf16)")
    parser.add_argument("--repeats", type=int, default=60, help="timed calls of each implementation, at least 50")
    parser.add_argument("--out", type=Path, help="folder for CSV, table and roofline in place of kernels/")
    parser.add_argument("--tables", action="store_true", help="only write the kept tables into kernels/README.md")
    parser.add_argument("--tune", action="store_true", help="try launch configurations on this GPU, keep the fastest")
    parser.add_argument("--trace", metavar="RECIPE.py", help="trace one step; further arguments are the recipe's")
    parser.add_argument("--trace-folder", type=Path, default=Path("runs/trace"), help="where traces go")
    options, rest = parser.parse_known_args(arguments)
    if options.trace is None and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    unknown = sorted(set(options.op or ()) - set(operators()))
    if unknown:
        parser.error(f"--op {' '.join(unknown)}: operators are {', '.join(operators())}")
    if options.repeats < 50:
        parser.error(f"--repeats {options.repeats} is below 50")
    if options.trace is not None:
        return trace([options.trace, *rest], options.trace_folder)
    if options.tables:
        return write_tables(options.out)
    return tune(options) if options.tune else profile(options)


def profile(options: argparse.Namespace) -> int:
    """Gate of every chosen operator, and times of those that are green where there is a GPU."""
    ops = options.op or operators()
    if not torch.cuda.is_available():
        print("No GPU: agreement with the references is checked in Triton's interpreter, and nothing is timed.")
        return int(bool(refused(ops, torch.device("cpu"), (torch.float32, torch.float16))))
    device = torch.device("cuda")
    red: set[str] = set()
    for name in options.dtype or ["bf16"]:
        dtype = DTYPES[name]
        bad = refused(ops, device, (dtype,))
        red |= bad
        ceilings = measure_ceilings(device, dtype)
        print(f"{name}: copy {ceilings.copy / 1e9:.0f} GB/s, matmul {ceilings.matmul / 1e12:.0f} TFLOP/s", flush=True)
        for op in ops:
            if op not in bad and not time_operator(op, device, dtype, ceilings, options):
                red.add(op)
    write_tables(options.out)
    return int(bool(red))


def tune(options: argparse.Namespace) -> int:
    """Measure other launch configurations of the chosen operators; the table of configurations keeps what is faster."""
    if not torch.cuda.is_available():
        print("No GPU: launch configurations are measured on one, and nothing was tried.")
        return 1
    from megavl.kernels import tuning

    for op in options.op or operators():
        for sentence in tuning.tune(op, torch.device("cuda"), options.repeats):
            print(sentence, flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        shutil.copy(CONFIGURATIONS, options.out)
    return 0


def refused(ops: Sequence[str], device: torch.device, dtypes: tuple[torch.dtype, ...]) -> set[str]:
    """Operators whose gate is red; says the outcome of each."""
    red = set()
    for op in ops:
        reason = gate(op, device, dtypes)
        print(f"{op:22} {'red, not timed: ' + reason if reason else 'agrees with its reference'}", flush=True)
        if reason:
            red.add(op)
    return red


def time_operator(
    op: str, device: torch.device, dtype: torch.dtype, ceilings: Ceilings, options: argparse.Namespace
) -> bool:
    """Time the chosen cases of an operator, keep the rows case by case; says whether our kernel ran in all of them."""
    origin, ran = where(device), True
    peers = tuple(options.peer) if options.peer else None
    for case in cases(op):
        if options.shape and not any(part in case.name for part in options.shape):
            continue
        timings = time_case(case, device, dtype, peers, options.repeats)
        timed = {name: t for name, t in timings.items() if isinstance(t, Timing)}
        rows = make_rows(case, dtype, timed, ceilings, micro_batch_flops(), origin)
        if rows:
            write_rows(csv_path(origin.gpu, options.out or RESULTS), rows)
        for row in rows:
            print(line(row), flush=True)
        for name, sentence in timings.items():
            if isinstance(sentence, str):
                print(f"{op} {case.name} {case.direction}: {name} did not run: {sentence}", flush=True)
        ran = ran and OURS in timed
    return ran


def line(row: Row) -> str:
    """A row for the terminal."""
    return (
        f"{row.op:22} {row.case:34} {row.direction:16} {row.implementation:14} {row.p50_ms:9.4f} ms "
        f"{row.percent_of_floor:4.0f}% of floor {row.gb_per_s:6.0f} GB/s {row.tflop_per_s:6.1f} TFLOP/s "
        f"{row.peak_mib:7.0f} MiB x{row.times_ours:.2f} {row.step_share}"
    )


def where(device: torch.device) -> Origin:
    """Device, day, commit and versions."""
    root = Path(__file__).parents[1]
    commit, changes = (
        subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    return Origin(
        gpu=torch.cuda.get_device_name(device),
        date=date.today().isoformat(),
        commit=(commit or "unknown") + ("+" if changes else ""),
        torch=torch.__version__,
        triton=triton.__version__,
    )


def micro_batch_flops() -> dict[str, float]:
    """Model -> operations of a micro-batch of 4,096 tokens with 4 images in stage 2, forward and backward."""
    counts = StepCounts(images=IMAGES, tokens=TOKENS, squared_lengths=TOKENS**2, logits=TOKENS)
    trained = ("sam_adaptor", "aligner", "decoder")
    return {name: sum(step_flops(SIZES[name], trained, counts).values()) for name in MODELS}


def write_tables(out: Path | None = None) -> int:
    """Put the kept rows into kernels/README.md (or `out`/README.md), and draw the roofline of each GPU."""
    folder, page = (RESULTS, README) if out is None else (out, out / "README.md")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(README, page)
    put_table("compiled", compile_table(), page)
    tables = []
    for path in sorted(folder.glob("*.csv")):
        if path.name == "compiled.csv":
            continue
        rows = read_rows(path)
        tables.append(f"{measured_table(rows)}\n\n![roofline]({path.relative_to(page.parent).with_suffix('.png')})")
        plot_roofline(rows, path.with_suffix(".png"))
    put_table("measured", "\n\n".join(tables) or "Nothing has been measured yet.", page)
    return 0


def trace(arguments: Sequence[str], folder: Path) -> int:
    """Trace a step of a recipe on every rank; rank 0 prints its tables."""
    from megavl.parallel.groups import destroy_groups, init_groups  # imports megatron-core, which takes seconds
    from megavl.parallel.validate import check_layout
    from megavl.recipe import parse_command_line
    from megavl.training.trace import module_table, operator_table, trace_step

    try:
        recipe: Recipe = parse_command_line(arguments)
        problems = check_layout(recipe, int(os.environ.get("WORLD_SIZE", "1")))
        if problems:
            raise ValueError("; ".join(problems))
    except ValueError as error:
        print(f"profile_kernels: {error}", file=sys.stderr)
        return 1
    groups = init_groups(recipe.parallel)
    path = folder / f"{Path(arguments[0]).stem}_rank{groups.rank}.json"
    found = trace_step(recipe, groups, path)
    if groups.rank == 0:
        kind = "device" if groups.device.type == "cuda" else "CPU"
        print(f"{groups.describe()}\nrank 0, {kind} time, trace in {path}\n")
        print(f"{operator_table(found)}\n\n{module_table(found)}")
    destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
