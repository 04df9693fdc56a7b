r"""The schedule on paper (`megavl/planning/simulate.py`) beside megatron-core's real one, in milliseconds.

    torchrun --nproc-per-node 4 tools/check_simulator.py                # stages that sleep: the schedule alone
    torchrun --nproc-per-node 4 tools/check_simulator.py --unit-ms 20   # longer stages, so that messages count less

Four processes exchange real messages through megatron-core's 1F1B and interleaved schedules; their stages sleep as long
as a layer split says, so they do not compete for cores. Per split and kind of step: real, simulated, their ratio.
Exit status: 0 if every ratio is within 15% and the splits of a pipeline size rank alike in both, 1 otherwise.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from megavl.config import ParallelConfig
from megavl.model.sizes import SIZES
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.planning.emulate import KINDS, LAYOUTS, emulate_step, example_seconds
from megavl.planning.simulate import simulate

TOLERANCE = 0.15
"""Of the ratio. Splits whose simulated times are closer than a tenth of it need not rank alike."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status, the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit-ms", type=float, default=8.0, help="a decoder layer, both passes (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each step; the fastest counts (default 3)")
    options = parser.parse_args(arguments)
    small = SIZES["tiny"]
    model = dataclasses.replace(small, decoder=dataclasses.replace(small.decoder, layers=30))
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    faults = []
    own_rank = 0
    for number, (pipeline, virtual, layout) in enumerate(LAYOUTS):
        parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual, layout=layout, device="cpu")
        groups = init_groups(parallel)
        for kind in KINDS:
            times = example_seconds(layout, kind, unit_s=options.unit_ms / 1e3)
            real = min(emulate_step(*times, model, parallel, groups) for _ in range(options.repeats))
            simulated = simulate(*times, pipeline=pipeline, virtual=virtual).step_s
            found.setdefault((kind, pipeline), []).append((simulated, real))
            line = f"pipeline {pipeline} x {virtual}  {layout:16} {kind:6}"
            line += f" real {1e3 * real:8.1f}  simulated {1e3 * simulated:8.1f}  ratio {real / simulated:.3f}"
            if groups.rank == 0:
                print(line, flush=True)
            if abs(real / simulated - 1) > TOLERANCE:
                faults.append(line)
        own_rank = groups.rank
        destroy_groups(leave_world=number == len(LAYOUTS) - 1)
    for (kind, pipeline), pairs in found.items():
        faults += [f"{kind} steps of pipeline {pipeline} rank differently" for _ in range(1) if not ranks_alike(pairs)]
    if own_rank == 0:
        print("\n".join(f"not as simulated: {fault}" for fault in faults) or "real and simulated agree")
    return int(bool(faults))


def ranks_alike(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether (simulated, real) pairs have one order, those apart that are too close to tell."""
    return all(
        (a[1] < b[1]) == (a[0] < b[0]) or abs(a[0] / b[0] - 1) < TOLERANCE / 10 for a in pairs for b in pairs if a != b
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
