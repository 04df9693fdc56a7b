"""Real training steps on few cores, as they would be on a device per rank, to hold the planner against.

In: a layout and what its micro-batches hold, in a started world. Out: seconds of a step of the whole model (towers,
decoder, loss, backward pass, reduction, optimizer) on ranks that compute `factor` times slower than a core does, and
how long each pass took.
Shapes: m micro-batches, s stages.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
from megavl.parallel.groups import Groups
from megavl.planning.costs import Case
from megavl.planning.hardware import Hardware, Rate
from megavl.planning.schedule import rank_tasks
from megavl.planning.simulate import simulate
from megavl.training.dilated_clock import DilatedClock, Pass
from megavl.training.flops import StepCounts
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
TOKENS = 256
STAGE = 2
KINDS = {"text": (0,), "image": (2,), "mixed": (0, 3, 1)}

Seconds = list[list[float]]


@dataclass(frozen=True)
class RealStep:
    seconds: float
    forward: list[Seconds]
    backward: list[Seconds]
    computed: list  # debug


def recipe_of(parallel: ParallelConfig) -> Recipe:
    return Recipe(
        run_dir="none",
        model=MODEL,
        parallel=parallel,
        data=DataConfig(tokenizer="none", sources=(), seq_length=TOKENS),
        stage=StageConfig(number=STAGE, steps=1, global_batch=8, dtype="fp32"),
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0),
    )


def counts_of(images: int) -> StepCounts:
    return StepCounts(images=images, tokens=TOKENS, squared_lengths=TOKENS**2, logits=TOKENS)


def slower(hardware: Hardware, factor: float) -> Hardware:
    return dataclasses.replace(
        hardware,
        fp32_flops=hardware.fp32_flops / factor,
        bandwidth=hardware.bandwidth / factor,
        measured={
            name: Rate(forward=rate.forward / factor, backward=rate.backward / factor)
            for name, rate in hardware.measured.items()
        },
    )


def case_of(parallel: ParallelConfig, hardware: Hardware) -> Case:
    return Case(model=MODEL, stage=STAGE, parallel=parallel, hardware=hardware, dtype="fp32")


class DilatedRun:
    def __init__(self, parallel: ParallelConfig, groups: Groups, factor: float) -> None:
        self.parallel, self.groups, self.recipe = parallel, groups, recipe_of(parallel)
        self.clock = DilatedClock(factor)
        self.run = build_run(self.recipe, groups, self.clock)

    def step(self, images: Sequence[int], number: int) -> RealStep:
        made = [
            document_batch(self.recipe, [(TOKENS, count)], seed=1000 * number + 10 * index + self.groups.data_rank)
            for index, count in enumerate(images)
        ]
        batch = StepBatch(step=number, language_rows=0, micro_batches=tuple(made))
        self.clock.passes.clear()
        dist.barrier(self.groups.gloo_world)
        start = time.perf_counter()
        from megavl.training.step import train_step
        train_step(self.run.chunks, self.run.optimizer, batch, self.groups, lr=1e-4, encoder=self.run.encoder)
        taken = time.perf_counter() - start
        parts = self.clock.read()
        every: list = [None] * self.groups.world_size
        dist.all_gather_object(
            every,
            (taken, self.groups.data_rank, self.groups.tensor_rank, self.groups.pipeline_rank, list(self.clock.passes), parts),
            group=self.groups.gloo_world,
        )
        return self._collect(every, len(images))

    def _collect(self, every, m) -> RealStep:
        p, v = self.parallel.pipeline, self.parallel.virtual_pipeline
        data = self.groups.data_size
        f = [[[0.0] * (p * v) for _ in range(m)] for _ in range(data)]
        b = [[[0.0] * (p * v) for _ in range(m)] for _ in range(data)]
        c = [[[[0.0] * (p * v) for _ in range(m)] for _ in range(data)] for _ in range(2)]
        for _, d, t, rank, passes, _ in every:
            tasks = rank_tasks(rank, p, v, m)
            assert [task.backward for task in tasks] == [one.backward for one in passes]
            for task, one in zip(tasks, passes, strict=True):
                at = task.chunk * p + rank
                to = b if task.backward else f
                to[d][task.micro_batch][at] = max(to[d][task.micro_batch][at], one.took_s)
                c[task.backward][d][task.micro_batch][at] = one.computed_s
        return RealStep(max(one[0] for one in every), f, b, [c, [e[5] for e in every]])
