r"""The schedule on paper (`megavl/planning/simulate.py`) beside megatron-core's real one, in milliseconds.

    torchrun --nproc-per-node 4 tools/check_simulator.py                # stages that sleep: the schedule alone
    torchrun --nproc-per-node 4 tools/check_simulator.py --unit-ms 20   # longer stages, so that messages count less
    torchrun --nproc-per-node 4 tools/check_simulator.py --compute      # training steps of a model: costs as well

Four processes exchange real messages through megatron-core's 1F1B and interleaved schedules. By default their stages
sleep as long as a layer split says, so they do not compete for cores; the fastest of the repeats counts.

With `--compute` they train: vision, decoder, loss, backward pass, reduction, optimizer. Each process rests after every
pass until it was `--dilation` times slower than its core, so that few cores carry four ranks; means over the repeats
count, without those in which another load left too little of the cores. Two forecasts stand beside the real time:
`planned`, from times of single parts of the model measured here (`planning/calibrate.py`), as a plan is made;
`scheduled`, from the times of the very passes that ran. If the first is off and the second is not, the costs are wrong;
if both are, the schedule is. Where every repeat of a step was crowded, the table says by how much its passes took too
long; the real step is then longer than planned, which a larger dilation or a quieter machine cures.

Measured on an idle machine of two cores (18 rows): real over `scheduled` 1.005 to 1.010, real over `planned` 0.99 to
1.23, 15 rows within 15%. The same pass takes up to a fifth longer from one minute to the next there, and layouts closer
than that swap, so the exit status was 1.

Exit status: 0 if every ratio is within 15% and the layouts rank alike in both, 1 otherwise.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
import torch.distributed as dist

from megavl.config import ParallelConfig
from megavl.model.sizes import SIZES
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.planning import dilated_steps
from megavl.planning.emulate import KINDS, LAYOUTS, emulate_step, example_seconds
from megavl.planning.simulate import simulate

TOLERANCE = 0.15
"""Of the ratios."""


class Line(NamedTuple):
    """One row of the table."""

    comparable: str
    """Rows with the same word here are ranked."""
    name: str
    """Layout and kind of step."""
    real: float
    """Seconds."""
    forecasts: dict[str, float]
    """Seconds, by name; the first one ranks the layouts."""

    crowding: float = 1.0
    """How many times longer than they should passes took, as other load left too little of the cores."""

    def ratios(self) -> dict[str, float]:
        """Real over forecast."""
        return {name: self.real / seconds for name, seconds in self.forecasts.items()}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status, the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit-ms", type=float, default=8.0, help="a sleeping layer, both passes (default 8)")
    parser.add_argument("--compute", action="store_true", help="train a small model instead of sleeping")
    parser.add_argument("--dilation", type=float, default=4.0, help="with --compute: times slower (default 4)")
    parser.add_argument("--repeats", type=int, help="rounds over all layouts (default 4; with --compute 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if options.dilation < 1:
            raise ValueError(f"--dilation {options.dilation} is below 1")
        if options.compute:
            lines = training(options.dilation, options.repeats or 2)
        else:
            lines = sleeping(options.unit_ms / 1e3, options.repeats or 4)
    except ValueError as error:
        print(f"check_simulator: {error}", file=sys.stderr)
        return 1
    faults = [describe(line) for line in lines if any(abs(r - 1) > TOLERANCE for r in line.ratios().values())]
    close = TOLERANCE / 3 if options.compute else TOLERANCE / 10
    for group in dict.fromkeys(line.comparable for line in lines):
        pairs = [(next(iter(li.forecasts.values())), li.real) for li in lines if li.comparable == group]
        faults += [f"{group}: layouts rank differently"] if not ranks_alike(pairs, close) else []
    if dist.get_rank() == 0:
        print("\n".join(describe(line) for line in lines))
        print("\n".join(f"not as simulated: {fault}" for fault in faults) or "real and simulated agree")
    dist.destroy_process_group()
    return int(bool(faults))


def sleeping(unit_s: float, repeats: int) -> list[Line]:
    """The table of stages that sleep; repeats go round, so that another load meets all layouts."""
    small = SIZES["tiny"]
    model = dataclasses.replace(small, decoder=dataclasses.replace(small.decoder, layers=30))
    lines: dict[str, Line] = {}
    for pipeline, virtual, layout in LAYOUTS * repeats:
        parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual, layout=layout, device="cpu")
        groups = init_groups(parallel)
        for kind in KINDS:
            times = example_seconds(layout, kind, unit_s=unit_s)
            real = emulate_step(*times, model, parallel, groups)
            name = f"{describe_layout(parallel)} {kind:6}"
            simulated = simulate(*times, pipeline=pipeline, virtual=virtual).step_s
            least = min(real, lines[name].real) if name in lines else real
            lines[name] = Line(f"{kind} steps of pipeline {pipeline}", name, least, {"simulated": simulated})
        destroy_groups(leave_world=False)
    return list(lines.values())


def training(factor: float, repeats: int) -> list[Line]:
    """The table of steps of a model; the model's parts are timed anew before every run.

    Rank 0 tells each repeat on the error stream as it comes.
    """
    found: dict[tuple[ParallelConfig, str], list[dilated_steps.RanStep]] = {}
    timings = []
    for parallel in dilated_steps.LAYOUTS * repeats:
        timings.append(dilated_steps.time_device(factor))
        for kind, step in dilated_steps.run_steps(parallel, factor).items():
            found.setdefault((parallel, kind), []).append(step)
            if dist.get_rank() == 0:
                print(describe(mean_line(parallel, kind, [step], {})), file=sys.stderr, flush=True)
    lines = []
    for (parallel, kind), steps in found.items():
        planned = dilated_steps.planned_s(parallel, kind, timings, factor, dist.get_world_size())
        lines.append(mean_line(parallel, kind, steps, {"planned": planned}))
    return lines


def mean_line(
    parallel: ParallelConfig, kind: str, steps: Sequence[dilated_steps.RanStep], forecasts: dict[str, float]
) -> Line:
    """Means over the repeats of a step that were not crowded, or else the least crowded one."""
    calm = [step for step in steps if step.crowding < dilated_steps.CROWDED]
    counted = calm or [min(steps, key=lambda step: step.crowding)]
    return Line(
        f"{kind} steps",
        f"{describe_layout(parallel)} {kind:6}",
        fmean(step.real for step in counted),
        {**forecasts, "scheduled": fmean(step.scheduled for step in counted)},
        max(step.crowding for step in counted),
    )


def describe_layout(parallel: ParallelConfig) -> str:
    """Sizes and split."""
    return f"pipeline {parallel.pipeline} x {parallel.virtual_pipeline}  {parallel.layout:16}"


def describe(line: Line) -> str:
    """A row in words."""
    forecasts = [
        f"  {name} {1e3 * line.forecasts[name]:8.1f} ratio {ratio:.3f}" for name, ratio in line.ratios().items()
    ]
    crowded = f"  passes {line.crowding:.2f} times too long" if line.crowding >= dilated_steps.CROWDED else ""
    return f"{line.name} real {1e3 * line.real:8.1f}" + "".join(forecasts) + crowded


def ranks_alike(pairs: Sequence[tuple[float, float]], close: float) -> bool:
    """Whether (simulated, real) pairs have one order, those apart whose simulated times differ by less than `close`."""
    return all((a[1] < b[1]) == (a[0] < b[0]) or abs(a[0] / b[0] - 1) < close for a in pairs for b in pairs if a != b)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
