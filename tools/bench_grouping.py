r"""What grouping rows by modality is worth (`data.grouping`): `none`, `microbatch`, `step` on the same rows.

    torchrun --nproc-per-node 2 tools/bench_grouping.py --measure                 # data parallel 2, packed and unpacked
    torchrun --nproc-per-node 4 tools/bench_grouping.py --measure --pipeline 2    # with a pipeline: bubble, padding

`--measure` trains a small model with real processes. For each grouping it prints the time of all steps, its gain over
mixed rows, and what the time is made of with what was saved there: computing, computing padding, pipeline bubble,
waiting for the slowest data-parallel rank. Run it with as many free cores as ranks: on fewer, ranks that wait leave
their core to others, and waiting costs nothing.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megavl.config import ParallelConfig
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.training.grouping_times import STEPS, grouping_table, measure_groupings


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", required=True, help="with real processes")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline size; data parallel is what is left")
    parser.add_argument("--global-batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the one of median time is printed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    return measure(parser.parse_args(arguments))


def measure(options: argparse.Namespace) -> int:
    """Train under each grouping, unpacked and packed, and print the tables on rank 0."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    copies = max(1, world // options.pipeline)
    if options.rounds < 1 or options.global_batch < 1 or options.global_batch % (2 * copies):
        print(
            f"bench_grouping: --global-batch {options.global_batch} must be a multiple of {2 * copies}, two rows for "
            f"each of {copies} data-parallel ranks, and --rounds {options.rounds} at least 1",
            file=sys.stderr,
        )
        return 1
    parallel = ParallelConfig(pipeline=options.pipeline, device=options.device)
    try:
        groups = init_groups(parallel)
    except ValueError as error:
        print(f"bench_grouping: {error}", file=sys.stderr)
        return 1
    for packing in (False, True):
        batch, rounds = options.global_batch, options.rounds
        times = measure_groupings(parallel, groups, packing=packing, global_batch=batch, rounds=rounds)
        if groups.rank == 0:
            kind = "several samples a row" if packing else "one sample a row"
            print(f"\nmultimodal rows: {kind}; {STEPS} steps of {batch} rows, {groups.describe()}")
            print(grouping_table(times))
    destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
