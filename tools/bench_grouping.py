r"""What grouping rows by modality is worth (`data.grouping`): `none`, `microbatch`, `step` on the same rows.

    python tools/bench_grouping.py --simulate                  # the 7B at 32 to 2048 GPUs, packed and unpacked
    python tools/bench_grouping.py --simulate --model 1.3b --vision-kernel reference

`--simulate` runs the schedule on paper for every data-parallel rank and step; times are estimates from assumed rates.
It prints the gain over shuffled rows and what it is made of: computing, padding, pipeline bubble, waiting for the
slowest data-parallel rank.
"""

import argparse
import sys
from collections.abc import Sequence

from megavl.config import KernelsConfig, ParallelConfig
from megavl.model.sizes import SIZES
from megavl.planning.costs import Case
from megavl.planning.estimate import make_mix, stage_loads
from megavl.planning.grouping import RowSizes, compare_groupings, grouping_lines
from megavl.planning.hardware import HARDWARE
from megavl.planning.split import best_split

SCALES = ((32, 1, 18), (32, 2, 18), (32, 4, 18), (32, 8, 36), (512, 1, 4), (256, 2, 9), (128, 4, 18))
"""(data-parallel ranks, pipeline size, micro-batches) that are simulated."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", required=True, help="on paper, at scale")
    parser.add_argument("--model", choices=SIZES, default="7b", help="sizes (default 7b)")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="training stage (default 2)")
    parser.add_argument("--language-share", type=float, default=0.7, help="share of text rows (default 0.7)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each grouping (default 40)")
    parser.add_argument("--hardware", choices=HARDWARE, default="h200", help="assumed rates (default h200)")
    for name in ("vision", "loss"):
        parser.add_argument(f"--{name}-kernel", choices=("triton", "reference"), default="triton")
    return simulate_scales(parser.parse_args(arguments))


def simulate_scales(options: argparse.Namespace) -> int:
    """Print a table per layout and kind of row."""
    if not 0 < options.language_share < 1 or options.steps < 1:
        print(f"bench_grouping: --language-share {options.language_share} must lie between 0 and 1, and --steps "
              f"{options.steps} be at least 1", file=sys.stderr)  # fmt: skip
        return 1
    kernels = KernelsConfig(sam_attention=options.vision_kernel, linear_cross_entropy=options.loss_kernel)
    for data, pipeline, micro_batches in SCALES:
        parallel = ParallelConfig(pipeline=pipeline)
        case = Case(
            model=SIZES[options.model], stage=options.stage, parallel=parallel, hardware=HARDWARE[options.hardware],
            kernels=kernels,
        )  # fmt: skip
        loads = stage_loads(case, make_mix(4096, 1.0, 0), 1)  # the text split
        split = best_split(loads, case.model.decoder.layers, pipeline)
        assert split is not None, f"{pipeline} stages"
        layout = ",".join(map(str, split)) if pipeline > 1 else ""
        case = Case(
            model=case.model, stage=case.stage, parallel=ParallelConfig(pipeline=pipeline, layout=layout),
            hardware=case.hardware, kernels=kernels,
        )  # fmt: skip
        for packed in (True, False):
            kind = "packed" if packed else "one sample a row"
            times = compare_groupings(
                case, RowSizes(packed=packed), data=data, micro_batches=micro_batches, steps=options.steps,
                language_share=options.language_share,
            )  # fmt: skip
            print(
                f"\ndata {data} x pipeline {pipeline} ({layout or 'whole'}), {micro_batches} micro-batches, rows {kind}"
            )
            print("\n".join(grouping_lines(times)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
