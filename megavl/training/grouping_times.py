"""What grouping rows by modality is worth: the same rows in steps of one modality, in micro-batches of one, mixed.

In: a layout and how rows are filled. Out: for each grouping the time of all its steps, and what it is made of, measured
with real processes. The model is small; an image costs 7% of a full row's decoder work (3.5% in the 1.3B hybrid at
4,096 tokens, 0.9% in the 7B). The rows come from the step plan of training, over sources that have lengths but no
content: 70% are full rows of a corpus, 30% hold captions and conversations with 1 to 3 images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist

from megavl.config import (
    DataConfig,
    DecoderConfig,
    Grouping,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Recipe,
    SamConfig,
    SiglipConfig,
    SourceConfig,
    StageConfig,
)
from megavl.data.microbatch import StepBatch
from megavl.data.mixture import RowSpec, StepPlan
from megavl.data.rank_batch import RankPlace, padded_lengths, rank_rows
from megavl.parallel.groups import Groups
from megavl.training.step import train_step
from megavl.training.synthetic_run import SyntheticRun, build_run, document_batch

GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
STEPS, MULTIMODAL = 10, 0.3
"""Steps of a measurement, and the share of multimodal rows: 3 whole steps of them, where steps have one modality."""

MODEL = ModelConfig(
    decoder=DecoderConfig(layers=4, hidden=128, heads=4, kv_heads=4, ffn=352, vocab=512),
    siglip=SiglipConfig(image_size=48, patch_size=8, width=64, layers=3, heads=4, mlp=256),
    sam=SamConfig(
        image_size=96,
        patch_size=8,
        width=64,
        layers=3,
        heads=4,
        mlp=256,
        window=6,
        global_layers=(2,),
        neck=32,
        upsample=24,
        downsample=(32, 64),
    ),
    adaptor="hybrid",
    background=(122, 116, 104),
)
LENGTH = 256
"""Tokens of a full row; an image takes 36."""


@dataclass(frozen=True, kw_only=True)
class GroupingTime:
    """All steps of one grouping: seconds, the mean over ranks, the median of the rounds."""

    seconds: float
    """Of the slowest rank in each step, added up."""
    tokens: int
    """Padding excluded, all data-parallel ranks."""
    padding: float
    """Share of the computed tokens that are padding."""
    computing: float
    """Vision, forward and backward passes, the share for padding taken out."""
    computing_padding: float
    """The same for padding, taken as its share of the tokens."""
    bubble: float
    """Waiting for pipeline neighbours, messages included."""
    data_wait: float
    """The reduction of gradients: waiting for the slowest data-parallel rank, and the transfer."""
    rest: float
    """Optimizer, and what no mark covers."""


def measure_groupings(
    parallel: ParallelConfig, groups: Groups, *, packing: bool, global_batch: int, rounds: int
) -> dict[Grouping, GroupingTime]:
    """Train the same rows under each grouping; all ranks must call it.

    Args:
        parallel: layout that `groups` was formed for.
        groups: this rank's groups.
        packing: several samples share a multimodal row; otherwise such a row is one sample.
        global_batch: rows of a step.
        rounds: repetitions, the groupings in turn.
    """
    recipe = _recipe(parallel, packing, global_batch)
    run = build_run(recipe, groups)
    plans = {grouping: _plan(recipe, grouping) for grouping in GROUPINGS}
    read = [sorted((row.source, row.parts) for row in _all_rows(plan)) for plan in plans.values()]
    assert all(same == read[0] for same in read), "groupings read different rows"
    batches = {grouping: _batches(recipe, groups, plan) for grouping, plan in plans.items()}
    _train(run, batches["none"][:2])  # warm-up
    found: dict[Grouping, list[GroupingTime]] = {grouping: [] for grouping in GROUPINGS}
    for _ in range(rounds):
        for grouping in GROUPINGS:
            tokens = sum(row.length for row in _all_rows(plans[grouping]))
            found[grouping].append(_time(run, batches[grouping], tokens))
    return {grouping: _middle(times) for grouping, times in found.items()}


def _recipe(parallel: ParallelConfig, packing: bool, global_batch: int) -> Recipe:
    sources = (
        SourceConfig(name="corpus", path="", modality="language", share=1 - MULTIMODAL),
        SourceConfig(name="captions", path="", modality="multimodal", share=MULTIMODAL),
    )
    return Recipe(
        run_dir="none",
        model=MODEL,
        parallel=parallel,
        data=DataConfig(tokenizer="none", sources=sources, seq_length=LENGTH, packing=packing),
        stage=StageConfig(number=2, steps=STEPS, global_batch=global_batch, micro_batch=2, dtype="fp32"),
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0),
    )


def _stores() -> dict[str, Any]:
    """Lengths and image counts of two sources, as `StepPlan` reads them; a stored sample has one token per image."""
    random = np.random.default_rng(0)
    documents = random.integers(20, 400, 2000)
    images = random.choice([1, 1, 1, 2, 3], 2000)
    text = np.minimum(random.lognormal(3.6, 0.6, 2000).astype(int) + 8, LENGTH - images * MODEL.tokens_per_image)
    return {
        "corpus": SimpleNamespace(
            manifest={"kind": "text"}, num_samples=2000, lengths=documents, image_counts=np.zeros(2000, dtype=int)
        ),
        "captions": SimpleNamespace(
            manifest={"kind": "captions"}, num_samples=2000, lengths=text + images, image_counts=images
        ),
    }


def _plan(recipe: Recipe, grouping: Grouping) -> StepPlan:
    return StepPlan(replace(recipe.data, grouping=grouping), recipe.stage, _stores(), MODEL.tokens_per_image)


def _all_rows(plan: StepPlan) -> list[RowSpec]:
    """Rows of all steps."""
    return [row for step in range(STEPS) for row in plan.rows(step)]


def _batches(recipe: Recipe, groups: Groups, plan: StepPlan) -> list[StepBatch]:
    """This rank's part of every step, with made-up content."""
    place = RankPlace(
        dp_rank=groups.data_rank,
        dp_size=groups.data_size,
        micro_batch=recipe.stage.micro_batch,
        length_multiple=groups.tensor_size,
        equal_lengths=groups.pipeline_size > 1,
    )
    images = _stores()["captions"].image_counts
    batches = []
    for step in range(STEPS):
        mine = rank_rows(plan, step, place)
        made = []
        for own, length in zip(mine, padded_lengths(mine, place), strict=True):
            documents = [document for row in own for document in _documents(row, images)]
            padding = length - sum(tokens for tokens, _ in documents)
            made.append(document_batch(recipe, documents, seed=step, padding=padding))
        batches.append(StepBatch(step=step, language_rows=0, micro_batches=tuple(made)))
    return batches


def _documents(row: RowSpec, images: Any) -> list[tuple[int, int]]:
    """(tokens, images among them) of each document of a row."""
    counts = [0 if row.modality == "language" else int(images[part.sample]) for part in row.parts]
    stored = [part.stop - part.start for part in row.parts]
    return [(n + count * (MODEL.tokens_per_image - 1), count) for n, count in zip(stored, counts, strict=True)]


def _train(run: SyntheticRun, batches: Sequence[StepBatch]) -> tuple[float, dict[str, float]]:
    """Seconds of the steps, each the slowest rank's; and of their parts, the mean over ranks."""
    whole, parts = 0.0, torch.zeros(0)
    for batch in batches:
        dist.barrier(group=run.groups.gloo_world)
        began = perf_counter()
        train_step(run.chunks, run.optimizer, batch, run.groups, lr=run.recipe.optim.lr)
        if run.groups.device.type == "cuda":
            torch.cuda.synchronize()
        slowest = torch.tensor(perf_counter() - began)
        seconds = run.clock.read()
        names, own = list(seconds), torch.tensor(list(seconds.values()))
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=run.groups.gloo_world)
        dist.all_reduce(own, group=run.groups.gloo_world)
        whole += slowest.item()
        parts = own / run.groups.world_size + (parts if len(parts) else 0)
    return whole, dict(zip(names, parts.tolist(), strict=True))


def _time(run: SyntheticRun, batches: Sequence[StepBatch], tokens: int) -> GroupingTime:
    seconds, parts = _train(run, batches)
    computed = torch.tensor(float(sum(m.tokens.numel() for batch in batches for m in batch.micro_batches)))
    dist.all_reduce(computed, group=run.groups.gloo_world)
    copies = run.groups.world_size // run.groups.data_size  # tensor and pipeline ranks hold the same tokens
    padding = 1 - tokens * copies / computed.item()
    computing = parts["vision"] + parts["forward"] + parts["backward"]
    return GroupingTime(
        seconds=seconds,
        tokens=tokens,
        padding=padding,
        computing=computing * (1 - padding),
        computing_padding=computing * padding,
        bubble=parts["schedule"],
        data_wait=parts["reduction"],
        rest=seconds - computing - parts["schedule"] - parts["reduction"],
    )


def _middle(times: Sequence[GroupingTime]) -> GroupingTime:
    """The round of median time, whole: its parts add up."""
    return sorted(times, key=lambda time: time.seconds)[len(times) // 2]


def grouping_table(times: dict[Grouping, GroupingTime]) -> str:
    """A line per grouping, and where its gain over mixed rows comes from, in percent of the mixed time."""
    names = {
        "computing": "computing",
        "computing_padding": "padding",
        "bubble": "bubble",
        "data_wait": "data-parallel wait",
        "rest": "rest",
    }
    lines = [f"{'grouping':12}{'seconds':>9}{'tokens/s':>10}{'gain':>8}" + "".join(f"{n:>20}" for n in names.values())]
    mixed = times["none"]
    for grouping, time in times.items():
        gain = mixed.seconds / time.seconds - 1
        saved = {n: (getattr(mixed, n) - getattr(time, n)) / mixed.seconds for n in names}
        cells = [f"{getattr(time, n):9.2f} s ({saved[n]:+6.1%})" for n in names]
        lines.append(
            f"{grouping:12}{time.seconds:9.2f}{time.tokens / time.seconds:10.0f}{gain:+8.1%}"
            + "".join(f"{cell:>20}" for cell in cells)
        )
    return "\n".join(lines)
