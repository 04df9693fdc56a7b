"""Real training steps of a small model with ranks slowed down evenly, beside what the planner says of them.

In: a layout, and how many images each micro-batch holds, in a started world of CPU ranks. Out: a `RanStep` per kind of
step, and what was planned for it. The real step is the whole one (towers, adaptor, decoder, loss, backward pass,
reduction, optimizer), with `training/dilated_clock.py` in place of the clock, so that ranks do not compete for the
cores of a small machine. What is planned comes from parts of the model that are timed here, `planning/calibrate.py`, at
the pace of the run: on all ranks at once, with the same rests, as a core that was left for a while has lost what its
caches held (forward pass of a decoder layer, medians, busy machine: 6.0 ms in a loop, 6.9 to 8.7 ms so). The pace of a
small machine changes by a tenth or two within minutes, so parts are timed before every run and the plan takes the
median of all timings.

Another load on the machine that leaves a rank less than 1 / `factor` of a core makes its passes too long (`crowding`).
Such a step says nothing about a device per rank and is run again, a few times.
Shapes: d data-parallel ranks, m micro-batches of one of them, s stages.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch.distributed as dist

from megavl.config import (
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Recipe,
    SamConfig,
    SiglipConfig,
    StageConfig,
)
from megavl.data.microbatch import StepBatch
from megavl.parallel.groups import Groups, destroy_groups, init_groups
from megavl.planning.calibrate import time_parts
from megavl.planning.costs import Case
from megavl.planning.estimate import mixed_step_s
from megavl.planning.hardware import HARDWARE, measured_rates
from megavl.planning.schedule import rank_tasks
from megavl.planning.simulate import simulate
from megavl.training.dilated_clock import DilatedClock
from megavl.training.flops import StepCounts
from megavl.training.step import train_step
from megavl.training.synthetic_run import build_run, document_batch

MODEL = ModelConfig(
    decoder=DecoderConfig(layers=12, hidden=192, heads=6, kv_heads=6, ffn=512, vocab=4608),
    siglip=SiglipConfig(image_size=128, patch_size=16, width=128, layers=4, heads=4, mlp=512),
    sam=SamConfig(
        image_size=256,
        patch_size=16,
        width=128,
        layers=4,
        heads=4,
        mlp=512,
        window=7,
        global_layers=(1, 3),
        neck=64,
        upsample=32,
        downsample=(64, 64),
    ),
    adaptor="hybrid",
    background=(127, 127, 127),
)
"""The head is worth 1.5 decoder layers, an image 1.3; a layer takes 5 ms forward and 10 backward on one core."""
TOKENS, ROWS = 256, 8
"""Of a micro-batch, which is one row; rows of a step over all data-parallel ranks."""
LAYERS_TIMED, IMAGES_TIMED = 3, 2
"""In a row and at a time, about as many as a stage has: an image alone takes 20 ms, one of two 18."""
TRIES, CROWDED = 3, 1.05
"""Steps that are run at most until one is not crowded, and the `crowding` from which a step is."""

LAYOUTS: tuple[ParallelConfig, ...] = (
    ParallelConfig(device="cpu", pipeline=4, layout="3,3,3,3"),
    ParallelConfig(device="cpu", pipeline=4, layout="4,4,3,1"),
    ParallelConfig(device="cpu", pipeline=4, layout="1,4,4,3"),
    ParallelConfig(device="cpu", pipeline=2, layout="6,6"),
    ParallelConfig(device="cpu", pipeline=2, layout="8,4"),
    ParallelConfig(device="cpu", pipeline=2, virtual_pipeline=2, layout="3,3,4,2"),
)
"""That are checked, on four ranks. None has tensor ranks: their collectives lie inside the passes, before the rest, so
they would cost nothing."""
IMAGES: dict[str, tuple[int, ...]] = {"text": (0,), "image": (2,), "mixed": (0, 3, 1)}
"""Kind of step -> images of successive micro-batches."""

Seconds = list[list[float]]
"""[m][s]."""
Timing = dict[str, Any]
"""Part of the model -> its work and seconds, as in a calibration."""


@dataclass(frozen=True, kw_only=True)
class RanStep:
    """A step as it ran."""

    real: float
    """Seconds, on the slowest rank."""
    scheduled: float
    """Seconds from the times of its own passes: the schedule on paper, and the optimizer as it ran."""
    crowding: float
    """How many times longer than they should the passes of a rank took, the worst rank."""


class DilatedRun:
    """A layout's training, slowed down."""

    def __init__(self, parallel: ParallelConfig, groups: Groups, factor: float) -> None:
        """Build this rank's part; all ranks must call it.

        Args:
            parallel: layout.
            groups: this rank's groups, formed for it.
            factor: times slower.
        """
        self.parallel, self.groups = parallel, groups
        self.clock = DilatedClock(factor)
        self._recipe = Recipe(
            run_dir="none",
            model=MODEL,
            parallel=parallel,
            data=DataConfig(tokenizer="none", sources=(), seq_length=TOKENS),
            stage=StageConfig(number=2, steps=1, global_batch=ROWS, dtype="fp32"),
            optim=OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0),
        )
        self._run = build_run(self._recipe, groups, self.clock)

    def step(self, images: Sequence[int]) -> RanStep:
        """Run one step; all ranks must call it.

        Args:
            images: of each micro-batch of this rank, [m].
        """
        made = [document_batch(self._recipe, [(TOKENS, count)], seed=index) for index, count in enumerate(images)]
        batch = StepBatch(step=0, language_rows=0, micro_batches=tuple(made))
        self.clock.passes.clear()
        dist.barrier(self.groups.gloo_world)
        began = time.perf_counter()
        train_step(self._run.chunks, self._run.optimizer, batch, self.groups, lr=1e-4, encoder=self._run.encoder)
        took, parts = time.perf_counter() - began, self.clock.read()
        said: list[Any] = [None] * self.groups.world_size
        place = (self.groups.data_rank, self.groups.pipeline_rank)
        mine = (place, took, parts, self.clock.passes)
        dist.all_gather_object(said, mine, group=self.groups.gloo_world)
        # Whoever comes last to the end of the reduction has not waited there.
        end = min(parts["reduction"] for _, _, parts, _ in said) + max(parts["optimizer"] for _, _, parts, _ in said)
        pipelines = [self._on_paper(said, data, len(images)) for data in range(self.groups.data_size)]
        crowding = [
            sum(p.took_s for p in passes) / sum(self.clock.factor * p.computed_s for p in passes)
            for _, _, _, passes in said
        ]
        real = max(took for _, took, _, _ in said)
        return RanStep(real=real, scheduled=max(pipelines) + end, crowding=max(crowding))

    def _on_paper(self, said: Sequence[Any], data: int, micro_batches: int) -> float:
        """The schedule of one data-parallel copy, from how long each of its passes took."""
        pipeline, virtual = self.parallel.pipeline, self.parallel.virtual_pipeline
        forward: Seconds = [[0.0] * (pipeline * virtual) for _ in range(micro_batches)]
        backward: Seconds = [[0.0] * (pipeline * virtual) for _ in range(micro_batches)]
        for (data_rank, rank), _, _, passes in said:
            if data_rank != data:
                continue
            tasks = rank_tasks(rank, pipeline, virtual, micro_batches)
            assert [t.backward for t in tasks] == [p.backward for p in passes], "passes ran in another order"
            for task, ran in zip(tasks, passes, strict=True):
                row, stage = (backward if task.backward else forward)[task.micro_batch], task.chunk * pipeline + rank
                row[stage] = ran.took_s
        return simulate(forward, backward, pipeline=pipeline, virtual=virtual).step_s


def run_steps(parallel: ParallelConfig, factor: float, tries: int = TRIES) -> dict[str, RanStep]:
    """A step of each kind of `IMAGES`, of several tries the least crowded; all ranks must call it.

    Args:
        parallel: layout.
        factor: times slower.
        tries: steps that are run at most until one is not crowded.
    """
    groups = init_groups(parallel)
    run = DilatedRun(parallel, groups, factor)
    run.step([1] * parallel.pipeline)  # the first step makes the optimizer's state
    steps = {}
    for kind in IMAGES:
        images = images_of(kind, groups.data_size)
        ran = [run.step(images)]
        while len(ran) < tries and ran[-1].crowding >= CROWDED:  # which is the same on every rank
            ran.append(run.step(images))
        steps[kind] = min(ran, key=lambda step: step.crowding)
    destroy_groups(leave_world=False)
    return steps


def planned_s(parallel: ParallelConfig, kind: str, timings: Sequence[Timing], factor: float, ranks: int) -> float:
    """Seconds of a step of `IMAGES` from the times of the model's parts: costs, schedule, reduction, update.

    Args:
        parallel: layout.
        kind: of step.
        timings: from `time_device`; the median counts.
        factor: times slower.
        ranks: of the world.
    """
    parts = {
        name: {
            "work": part["work"],
            "seconds": {d: median(t[name]["seconds"][d] for t in timings) for d in ("forward", "backward")},
        }
        for name, part in timings[0].items()
    }
    base = HARDWARE["cpu"]
    hardware = dataclasses.replace(base, bandwidth=base.bandwidth / factor, measured=measured_rates(parts))
    case = Case(model=MODEL, stage=2, parallel=parallel, hardware=hardware, dtype="fp32")
    data = ranks // parallel.pipeline
    return mixed_step_s(case, [row_counts(count) for count in images_of(kind, data)], data)


def time_device(factor: float) -> Timing:
    """Times of the model's parts, on all ranks at the pace of a run; the mean over them. All ranks must call it."""
    groups = init_groups(ParallelConfig(device="cpu"))
    found = time_parts(MODEL, groups, tokens=TOKENS, layers=LAYERS_TIMED, images=IMAGES_TIMED, rest=factor - 1)
    every: list[Any] = [None] * groups.world_size
    dist.all_gather_object(every, found["parts"], group=groups.gloo_world)
    destroy_groups(leave_world=False)
    return {
        name: {
            "work": part["work"],
            "seconds": {d: factor * fmean(p[name]["seconds"][d] for p in every) for d in ("forward", "backward")},
        }
        for name, part in found["parts"].items()
    }


def images_of(kind: str, data: int) -> list[int]:
    """Of each micro-batch of one of `data` data-parallel ranks, [m]."""
    pattern = IMAGES[kind]
    return [pattern[index % len(pattern)] for index in range(ROWS // data)]


def row_counts(images: int) -> StepCounts:
    """What a micro-batch with so many images holds."""
    return StepCounts(images=images, tokens=TOKENS, squared_lengths=TOKENS**2, logits=TOKENS)
