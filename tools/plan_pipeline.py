r"""Plan a layout without a GPU: decoder layers per pipeline rank, time, parameters and memory of each, recipe fields.

    python tools/plan_pipeline.py --model 7b --tensor 4 --pipeline 8                      # the split
    python tools/plan_pipeline.py --model 7b --gpus 512 --global-batch 2304               # sizes and split
    python tools/plan_pipeline.py --model 7b --gpus 64 --pipeline 4 --timeline plan.html  # the step, drawn
    python tools/plan_pipeline.py --model 1.3b --calibrate here.json                      # time the modules here first
    python tools/plan_pipeline.py --model 7b --gpus 64 --calibration here.json

What is not given is searched: tensor, pipeline, chunks per rank, rows per micro-batch, who encodes the images, and the
least recomputation that fits. The layout with the shortest expected step over text and image steps that fits the memory
is printed with the fields to paste into a recipe. Times are estimates: from assumed rates, or from a calibration.

Exit status: 0 if a plan was found that fits, 1 otherwise.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from megavl.config import ParallelConfig
from megavl.model.sizes import SIZES
from megavl.planning.candidates import RECOMPUTE
from megavl.planning.costs import Case
from megavl.planning.estimate import make_mix
from megavl.planning.hardware import HARDWARE, Hardware, read_calibration
from megavl.planning.report import plan_lines, ranking_lines
from megavl.planning.search import Plan, parallel_fields, search
from megavl.planning.timeline import draw_timeline

MICRO_BATCHES = 32
"""Micro-batches of a step on one data-parallel rank where no global batch is given."""


def main(arguments: Sequence[str]) -> int:
    """Plan and print; returns the exit status."""
    options = parse(arguments)
    try:
        if options.calibrate:
            from megavl.planning.calibrate import calibrate  # needs torch and megatron-core

            calibrate(SIZES[options.model], Path(options.calibrate), tokens=options.calibrate_tokens)
        plans = find(options)
    except ValueError as error:
        print(f"plan_pipeline: {error}", file=sys.stderr)
        return 1
    best = plans[0]
    print("\n".join(plan_lines(best)))
    print("\nfields of the recipe:\n  " + "\n  ".join(parallel_fields(best.case.parallel, best.batch)))
    if len(plans) > 1:
        print(f"\nbest of {len(plans)} layouts:\n" + "\n".join(ranking_lines(plans, options.top)))
    for path in options.timeline or ():
        draw_timeline(best, Path(path))
        print(f"wrote {path}")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="7b", help="sizes (default 7b)")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="training stage (default 2)")
    parser.add_argument("--gpus", type=int, help="ranks of the whole run (default tensor * pipeline)")
    for name in ("tensor", "pipeline", "virtual"):
        parser.add_argument(f"--{name}", type=int, help="keep this size instead of searching")
    parser.add_argument("--micro-batch", type=int, help="rows per forward pass (default: searched)")
    parser.add_argument("--global-batch", type=int, help=f"rows a step (default {MICRO_BATCHES} micro-batches a rank)")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a row (default 4096)")
    parser.add_argument("--language-share", type=float, default=0.7, help="share of text steps (default 0.7)")
    parser.add_argument("--images", type=int, default=4, help="images in a row of an image step (default 4)")
    parser.add_argument(
        "--vision", choices=("replicate", "split_tensor", "split_model"), help="keep it (default: searched)"
    )
    parser.add_argument("--recompute", choices=RECOMPUTE, help="keep it (default: the least that fits)")
    parser.add_argument("--recompute-vision", choices=("True", "False"), help="keep it (default: only if it must be)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--hardware", choices=HARDWARE, default="h200", help="assumed rates (default h200)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a device instead of the hardware's")
    parser.add_argument("--calibration", metavar="FILE", help="rates that --calibrate measured")
    parser.add_argument(
        "--calibrate", metavar="FILE", help="time the modules on this machine, write FILE, plan with it"
    )
    parser.add_argument("--calibrate-tokens", type=int, default=1024, help="tokens of the timed layer (default 1024)")
    parser.add_argument("--timeline", action="append", metavar="FILE", help="draw the step: .png or .html (repeatable)")
    parser.add_argument("--top", type=int, default=8, help="layouts to list (default 8)")
    return parser.parse_args(arguments)


def find(options: argparse.Namespace) -> list[Plan]:
    """Plans for the command line, best first.

    Raises:
        ValueError: a size or a share that cannot be, or nothing fits.
    """
    check(options)
    fields = {"tensor": options.tensor, "pipeline": options.pipeline, "virtual_pipeline": options.virtual}
    fields |= {"vision": options.vision, "recompute": options.recompute}
    fields["recompute_vision"] = options.recompute_vision and options.recompute_vision == "True"
    given = {name: value for name, value in fields.items() if value is not None}
    if options.tensor and options.pipeline:
        given.setdefault("virtual_pipeline", 1)  # a plain schedule, unless asked otherwise
    parallel = ParallelConfig(**given, sequence=True, distributed_optimizer=True, overlap_grad_reduce=True)
    model_ranks = parallel.tensor * parallel.pipeline
    gpus = options.gpus or model_ranks
    if gpus % model_ranks:
        raise ValueError(f"--gpus {gpus} does not divide by tensor * pipeline {parallel.tensor} * {parallel.pipeline}")
    model, machine = SIZES[options.model], hardware(options)
    return search(
        Case(model=model, stage=options.stage, parallel=parallel, hardware=machine, dtype=options.dtype),
        make_mix(options.seq_length, options.language_share, options.images),
        gpus=gpus,
        global_batch=options.global_batch or MICRO_BATCHES * gpus // model_ranks,
        fixed=list(given),
        micro_batch=options.micro_batch or (None if options.global_batch else 1),
    )


def check(options: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        ValueError: the first of them.
    """
    for name in ("gpus", "tensor", "pipeline", "virtual", "micro_batch", "global_batch", "seq_length"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is below 1")
    if not 0 <= options.language_share <= 1:
        raise ValueError(f"--language-share {options.language_share} is outside 0 to 1")
    slots = options.images * SIZES[options.model].tokens_per_image
    if not 0 <= slots <= options.seq_length:
        raise ValueError(f"--images {options.images} take {slots} tokens, --seq-length is {options.seq_length}")


def hardware(options: argparse.Namespace) -> Hardware:
    """Assumed or calibrated rates with the memory that was asked for."""
    found = HARDWARE[options.hardware]
    if path := options.calibrate or options.calibration:
        found = read_calibration(path, found)
    return dataclasses.replace(found, memory_gib=options.memory) if options.memory else found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
