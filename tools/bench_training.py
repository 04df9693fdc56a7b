r"""Time training steps of a recipe on made-up batches, and append one row to a CSV file.

    python tools/bench_training.py examples/deepseek_vl_1.3b/stage2.py --images 4
    torchrun --nproc-per-node 8 tools/bench_training.py RECIPE.py --parallel.tensor 2 --parallel.recompute full
    python tools/bench_training.py --matrix          # every row that one 80 GB GPU can give, one process after another

Rows have the recipe's length and are full; each text token is learnt. `--model` takes the sizes of a name in
`megavl/model/sizes.py` instead of the recipe's. The row has median and spread of the step time, tokens and images per
second, MFU of the whole model and of its language part (empty where the device's peak is not known), what the hardware
carried out, the parts of a step, memory, and device, commit, versions, layout, kernels and recomputation.

Exit status: 0 if every row was measured, 1 otherwise. `--matrix` goes on after a row that failed and names it.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from megavl.config import KernelsConfig, Recipe
from megavl.model.sizes import SIZES
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.parallel.validate import check_layout
from megavl.recipe import parse_command_line
from megavl.training.benchmark import Row, append_row, measure

ROOT = Path(__file__).parents[1]

IMAGES = 4
"""Images of a row of 4,096 tokens in the matrix."""


def main(arguments: Sequence[str]) -> int:
    """Measure one row, or the matrix; returns the exit status, the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", action="store_true", help="measure all rows of one GPU")
    parser.add_argument("--list", action="store_true", help="with --matrix: print the commands only")
    parser.add_argument("--model", choices=SIZES, help="sizes instead of the recipe's")
    parser.add_argument("--images", type=int, default=0, help="images of each row (default 0: text)")
    parser.add_argument("--micro-batches", type=int, default=8, help="of each data-parallel rank in a step")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first that counts")
    parser.add_argument("--steps", type=int, default=20, help="steps that count")
    parser.add_argument("--csv", type=Path, help="where the row goes (default tools/results/DEVICE.csv)")
    options, rest = parser.parse_known_args(arguments)
    if options.matrix:
        return run_matrix(options.csv, only_list=options.list)
    try:
        if min(options.micro_batches, options.steps) < 1 or min(options.images, options.warm_up) < 0:
            raise ValueError("--micro-batches and --steps must be at least 1, --images and --warm-up at least 0")
        recipe = parse_command_line(rest)
        if options.model:
            recipe = resize(recipe, options.model, rest)
        row = bench(recipe, options, options.model or Path(rest[0]).resolve().parent.name)
        if int(os.environ.get("RANK", "0")) == 0:
            path = options.csv or ROOT / "tools" / "results" / f"{row.device.replace(' ', '_')}.csv"
            print(line(row))
            append_row(path, row)
            print(f"-> {path}")
    except ValueError as error:
        print(f"bench_training: {error}", file=sys.stderr)
        return 1
    return 0


def resize(recipe: Recipe, name: str, arguments: Sequence[str]) -> Recipe:
    """The recipe with the sizes of `name`; `--model.` options still count for the fields that both have."""
    model = SIZES[name]
    if any(argument.startswith("--model.decoder.layers") for argument in arguments):
        model = replace(model, decoder=replace(model.decoder, layers=recipe.model.decoder.layers))
    return replace(recipe, model=model)


def bench(recipe: Recipe, options: argparse.Namespace, name: str) -> Row:
    """Check, form the groups, measure.

    Raises:
        ValueError: a sentence per problem.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    copies = max(1, world // (recipe.parallel.tensor * recipe.parallel.pipeline))
    rows = options.micro_batches * copies * recipe.stage.micro_batch
    recipe = replace(recipe, stage=replace(recipe.stage, global_batch=rows))
    problems = check_layout(recipe, world)
    if problems:
        raise ValueError("\n".join(problems))
    groups = init_groups(recipe.parallel)
    try:
        return measure(
            recipe,
            groups,
            name=name,
            images=options.images,
            micro_batches=options.micro_batches,
            warm_up=options.warm_up,
            steps=options.steps,
        )
    finally:
        destroy_groups()


def line(row: Row) -> str:
    """A row for the terminal."""
    mfu = "unknown" if row.mfu is None or row.llm_mfu is None else f"{row.mfu:.1%}, language part {row.llm_mfu:.1%}"
    return (
        f"{row.model}, {row.layers} layers, stage {row.stage}, {row.images_per_row} images a row, {row.layout}, "
        f"kernels {row.kernels}, recompute {row.recompute}: {row.step_ms:.1f} ms "
        f"({row.p10_ms:.1f} to {row.p90_ms:.1f}), {row.tokens_per_s:.0f} tok/s, {row.images_per_s:.1f} img/s, "
        f"{row.tflops:.1f} TFLOP/s a rank, MFU {mfu}, {row.memory_gib:.1f} GiB"
    )


def matrix() -> Iterator[list[str]]:
    """Arguments of each row: three models, text and images, kernels on and off, recomputation on and off.

    The 7B's full state takes more than one card has; 8 of its 30 layers fit, and all of them in stage 1, where the
    decoder is frozen.
    """
    off = [word for field in fields(KernelsConfig) for word in (f"--kernels.{field.name}", "reference")]
    whole = ["--data.seq_length", "4096", "--data.length_counts", "all"]
    for model, recipe, extra, cases in (
        ("1.3b", "examples/deepseek_vl_1.3b/stage2.py", [], (0, IMAGES)),
        ("1.3b_hybrid", "examples/deepseek_vl_1.3b/stage2.py", [], (0, IMAGES)),
        ("7b", "examples/deepseek_vl_7b/stage2.py", ["--model.decoder.layers", "8"], (0, IMAGES)),
        ("7b", "examples/deepseek_vl_7b/stage1.py", whole, (IMAGES,)),  # stage 1 has no text steps
    ):
        for images in cases:
            for kernels in ([], off):
                for recompute in ("none", "full"):
                    alone = ["--parallel.tensor", "1", "--parallel.pipeline", "1", "--parallel.layout", ""]
                    alone += ["--parallel.sequence", "False", "--parallel.recompute", recompute]
                    yield [recipe, "--model", model, "--images", str(images), *alone, *extra, *kernels]


def run_matrix(path: Path | None, *, only_list: bool) -> int:
    """A process per row, so that no row inherits another's memory; returns 1 if one failed."""
    failed = []
    for arguments in matrix():
        if path is not None:
            arguments = [*arguments, "--csv", str(path)]
        command = [sys.executable, "tools/bench_training.py", *arguments]
        print(" ".join(command), flush=True)
        if not only_list and subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(" ".join(arguments))
    print("\n".join(f"not measured: {arguments}" for arguments in failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
