r"""What grouping rows by modality is worth (`data.grouping`): `none`, `microbatch`, `step` on the same rows.

    python tools/bench_grouping.py --simulate                  # the 7B at 32 to 2048 GPUs, packed and unpacked
    python tools/bench_grouping.py --simulate --model 1.3b --vision-kernel reference
    torchrun --nproc-per-node 2 tools/bench_grouping.py --measure                 # data parallel 2, packed and unpacked
    torchrun --nproc-per-node 4 tools/bench_grouping.py --measure --pipeline 2    # with a pipeline: bubble, padding

Both print the gain over mixed rows and what it is made of: computing, padding, pipeline bubble, waiting for the slowest
data-parallel rank. `--simulate` runs the schedule on paper for every data-parallel rank and step; times are estimates
from assumed rates. `--measure` trains a small model with real processes. Run it with as many free cores as ranks: on
fewer, ranks that wait leave their core to others, and waiting costs nothing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from megavl.config import KernelsConfig, ParallelConfig
from megavl.model.sizes import SIZES
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.planning.costs import Case
from megavl.planning.estimate import make_mix, stage_loads
from megavl.planning.grouping import RowSizes, compare_groupings, grouping_lines
from megavl.planning.hardware import HARDWARE
from megavl.planning.split import best_split
from megavl.training.grouping_times import STEPS, grouping_table, measure_groupings

SCALES = ((32, 1, 18), (32, 2, 18), (32, 4, 18), (32, 8, 36), (512, 1, 4), (256, 2, 9), (128, 4, 18))
"""(data-parallel ranks, pipeline size, micro-batches) that are simulated."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--simulate", action="store_true", help="on paper, at scale")
    way.add_argument("--measure", action="store_true", help="with real processes")
    paper = parser.add_argument_group("with --simulate")
    paper.add_argument("--model", choices=SIZES, default="7b", help="sizes (default 7b)")
    paper.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="training stage (default 2)")
    paper.add_argument("--language-share", type=float, default=0.7, help="share of text rows (default 0.7)")
    paper.add_argument("--steps", type=int, default=40, help="steps of each grouping (default 40)")
    paper.add_argument("--hardware", choices=HARDWARE, default="h200", help="assumed rates (default h200)")
    for name in ("vision", "loss"):
        paper.add_argument(f"--{name}-kernel", choices=("triton", "reference"), default="triton")
    real = parser.add_argument_group("with --measure")
    real.add_argument("--pipeline", type=int, default=1, help="pipeline size; data parallel is what is left")
    real.add_argument("--global-batch", type=int, default=16, help="rows of a step (default 16)")
    real.add_argument("--rounds", type=int, default=3, help="repetitions, median time printed (default 3)")
    real.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    try:
        (simulate if options.simulate else measure)(options)
    except ValueError as error:
        print(f"bench_grouping: {error}", file=sys.stderr)
        return 1
    return 0


def simulate(options: argparse.Namespace) -> None:
    """Print a table per layout and kind of row.

    Raises:
        ValueError: shares or steps that mean nothing.
    """
    if not 0 < options.language_share < 1 or options.steps < 1:
        raise ValueError(
            f"--language-share {options.language_share} must lie between 0 and 1, and --steps {options.steps} be at "
            "least 1"
        )
    for data, pipeline, micro_batches in SCALES:
        case = _case(options, pipeline)
        for packed in (True, False):
            times = compare_groupings(
                case,
                RowSizes(packed=packed),
                data=data,
                micro_batches=micro_batches,
                steps=options.steps,
                language_share=options.language_share,
            )
            layout, kind = case.parallel.layout or "whole", "packed" if packed else "one sample a row"
            print(f"\ndata {data} x pipeline {pipeline} ({layout}), {micro_batches} micro-batches, rows {kind}")
            print("\n".join(grouping_lines(times)))


def _case(options: argparse.Namespace, pipeline: int) -> Case:
    """The model under the split that is best for text."""
    case = Case(
        model=SIZES[options.model],
        stage=options.stage,
        parallel=ParallelConfig(pipeline=pipeline),
        hardware=HARDWARE[options.hardware],
        kernels=KernelsConfig(sam_attention=options.vision_kernel, linear_cross_entropy=options.loss_kernel),
    )
    split = best_split(stage_loads(case, make_mix(4096, 1.0, 0), 1), case.model.decoder.layers, pipeline)
    assert split is not None, f"{pipeline} stages"
    layout = ",".join(map(str, split)) if pipeline > 1 else ""
    return replace(case, parallel=ParallelConfig(pipeline=pipeline, layout=layout))


def measure(options: argparse.Namespace) -> None:
    """Train under each grouping, unpacked and packed, and print the tables on rank 0; all ranks call it.

    Raises:
        ValueError: a batch or a layout that does not divide.
    """
    copies = max(1, int(os.environ.get("WORLD_SIZE", "1")) // options.pipeline)
    batch, rounds = options.global_batch, options.rounds
    if rounds < 1 or batch < 1 or batch % (2 * copies):
        raise ValueError(
            f"--global-batch {batch} must be a multiple of {2 * copies}, two rows for each of {copies} data-parallel "
            f"ranks, and --rounds {rounds} at least 1"
        )
    parallel = ParallelConfig(pipeline=options.pipeline, device=options.device)
    groups = init_groups(parallel)
    for packing in (False, True):
        times = measure_groupings(parallel, groups, packing=packing, global_batch=batch, rounds=rounds)
        if groups.rank == 0:
            kind = "several samples a row" if packing else "one sample a row"
            print(f"\nmultimodal rows: {kind}; {STEPS} steps of {batch} rows, {groups.describe()}")
            print(grouping_table(times))
    destroy_groups()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
