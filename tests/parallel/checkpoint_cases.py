"""What the ranks of the checkpoint tests run: a small model trained for a few steps, saved, loaded.

The global batch of a step is a function of the step alone, so any layout sees the same rows.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megavl.checkpoint import folder, forked_write
from megavl.checkpoint.reader import Loaded, load, load_model
from megavl.checkpoint.writer import CheckpointWriter
from megavl.config import DecoderConfig, ModelConfig, OptimConfig, ParallelConfig, SamConfig, SiglipConfig
from megavl.data.microbatch import IGNORE, MicroBatch, StepBatch
from megavl.model.build import build_stages
from megavl.parallel.gradients import wrap_stages
from megavl.parallel.groups import Groups, init_groups
from megavl.parallel.random_state import seed_everything
from megavl.training.freeze import apply_freeze
from megavl.training.optimizer import make_optimizer
from megavl.training.step import train_step

MODEL = ModelConfig(
    decoder=DecoderConfig(layers=4, hidden=16, heads=2, kv_heads=2, ffn=24, vocab=32, init_std=0.2),
    siglip=SiglipConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp=16),
    sam=SamConfig(
        image_size=16,
        patch_size=4,
        width=8,
        layers=2,
        heads=2,
        mlp=16,
        window=2,
        global_layers=(1,),
        neck=8,
        upsample=8,
        downsample=(8, 8),
    ),
    adaptor="hybrid",
    background=(122, 116, 104),
)
OPTIM = OptimConfig(lr=3e-3, schedule="constant", warmup_steps=0, weight_decay=0.1)
ROWS, ROW_TOKENS = 4, 12


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a call does, in the order of the fields."""

    parallel: ParallelConfig
    stage: int = 3
    dtype: torch.dtype = torch.float32
    model: ModelConfig = MODEL
    load: str = ""
    """Resume from here."""
    load_model: str = ""
    """Start from these weights."""
    init_from: str = ""
    """Checkpoint whose side files the run hands on."""
    run: str = ""
    """Folder to save into; empty: never."""
    background: bool = True
    keep: int = 9
    steps: int = 6
    """Train up to this step."""
    save_at: tuple[int, ...] = ()
    tokenizer: str = "a" * 64
    full_disk: dict[int, int] = field(default_factory=dict)
    """Rank -> bytes of the largest file it can write."""
    free_bytes: int | None = None
    """What the disk says it has free."""
    stuck: int | None = None
    """Rank whose writers never get beyond their first tensor."""
    sabotage: Callable[["Trainer"], None] | None = None
    """Runs on every rank after the last save was begun and before it is finished."""


@dataclass(kw_only=True)
class Trainer:
    """What a training process holds."""

    groups: Groups
    chunks: list[Any]
    optimizer: Any
    step: int = 0
    writer: CheckpointWriter | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    draws: list[tuple[float, ...]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    loaded: Loaded | None = None


def train(plan: Plan) -> dict[str, Any]:
    """Run `plan`; the losses and norms of its steps, what was loaded, and the errors of its saves."""
    trainer = start(plan)
    try:
        while True:
            attempt(trainer, lambda t: t.writer and t.writer.poll())
            if trainer.step in plan.save_at:
                attempt(trainer, lambda t: save(t, plan.background))
                if plan.sabotage and trainer.step == plan.save_at[-1]:
                    plan.sabotage(trainer)
            if trainer.step == plan.steps:
                break
            train_one_step(trainer)
        attempt(trainer, lambda t: t.writer and t.writer.finish())
    finally:
        mend()
    return {
        "losses": trainer.losses,
        "norms": trainer.norms,
        "draws": trainer.draws,
        "problems": trainer.problems,
        "loaded": trainer.loaded,
    }


def refusal(plan: Plan) -> str:
    """The sentence with which `plan` is refused at its start."""
    try:
        start(plan)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def train_and_die(plan: Plan) -> None:
    """Save the last step in the background and be killed before the writers are done."""
    trainer = start(plan)
    while trainer.step < plan.steps:
        train_one_step(trainer)
        if trainer.step == plan.save_at[-1]:
            write_slowly()
            save(trainer, background=True)
            writers = [str(writer.pid) for writer in multiprocessing.active_children()]
            Path(plan.run, f"writers_of_rank_{trainer.groups.rank}").write_text(" ".join(writers))
            time.sleep(0.3)  # the writers are at work
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.step in plan.save_at:
            save(trainer, background=False)


def train_one_step(trainer: Trainer) -> None:
    batch = step_batch(trainer.step, trainer.groups)
    result = train_step(trainer.chunks, trainer.optimizer, batch, trainer.groups, lr=OPTIM.lr)
    assert not result.skipped, result.skipped
    trainer.losses.append(result.loss)
    trainer.norms.append(result.grad_norm)
    trainer.step += 1


def start(plan: Plan) -> Trainer:
    """Build the model with weights that no checkpoint has, and load what the plan says."""
    groups = init_groups(plan.parallel)
    seed_everything(5, groups)
    seed = 2 if plan.load or plan.load_model else 1
    stages = build_stages(plan.model, plan.parallel, dtype=plan.dtype, seed=seed, pg=groups.pg, device=groups.device)
    apply_freeze(stages, plan.stage)
    chunks = wrap_stages(stages, plan.parallel, groups)
    if plan.load_model:
        load_model(Path(plan.load_model), chunks, groups)
    optimizer = make_optimizer(chunks, OPTIM, plan.parallel, groups)
    trainer = Trainer(groups=groups, chunks=chunks, optimizer=optimizer)
    if plan.load:
        trainer.loaded = load(Path(plan.load), chunks, optimizer, groups, seed=5, tokenizer=plan.tokenizer)
        trainer.step = trainer.loaded.step
        trainer.draws.append(draw())
    if plan.run:
        recipe = {"model": asdict(plan.model)}
        trainer.writer = CheckpointWriter(
            Path(plan.run) / "checkpoints",
            groups,
            plan.keep,
            tokenizer="a" * 64,
            recipe=recipe,
            init_from=plan.init_from,
        )
    if groups.rank in plan.full_disk:
        limit_file_size(plan.full_disk[groups.rank])
    if plan.free_bytes is not None:
        folder.shutil = SimpleNamespace(  # type: ignore[assignment]
            disk_usage=lambda _: SimpleNamespace(free=plan.free_bytes), rmtree=shutil.rmtree
        )
    if plan.stuck == groups.rank:
        write_slowly(seconds=600)
    return trainer


def attempt(trainer: Trainer, action: Callable[[Trainer], Any]) -> None:
    """Keep the sentence of a checkpoint error."""
    try:
        action(trainer)
    except ValueError as error:
        trainer.problems.append(str(error))


def save(trainer: Trainer, background: bool) -> None:
    """Save, and note what each generator draws next."""
    assert trainer.writer is not None
    extra = {"rows": trainer.step * ROWS}
    trainer.writer.save(trainer.step, trainer.chunks, trainer.optimizer, extra, background=background)
    trainer.draws.append(draw())


def draw() -> tuple[float, ...]:
    """One number from each generator."""
    return float(torch.rand(())), random.random(), float(np.random.rand())


def limit_file_size(size: int | None) -> None:
    """Let every later write of this process and its children fail beyond `size` bytes of a file, like a full disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def mend() -> None:
    """Undo what a plan broke: the process serves other tests."""
    limit_file_size(None)
    folder.shutil, forked_write.torch = shutil, torch


def write_slowly(seconds: float = 0.03) -> None:
    """From now on, a tensor takes this long to write."""
    quick = torch.save

    def slow(*args: Any) -> None:
        time.sleep(seconds)
        quick(*args)

    forked_write.torch = SimpleNamespace(save=slow)  # type: ignore[assignment]


def wait_for_orphans(run: Path) -> None:
    """Until the writers that `train_and_die` left behind have ended."""
    for pid in " ".join(file.read_text() for file in run.glob("writers_of_rank_*")).split():
        while _is_running(pid):
            time.sleep(0.05)


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def kill_writer_of_rank_one(trainer: Trainer) -> None:
    """As the kernel does when memory runs out."""
    if trainer.groups.rank == 1:
        (writer,) = multiprocessing.active_children()
        writer.kill()


def fill_disk_of_rank_zero(trainer: Trainer) -> None:
    """The tensors are written, the index is not."""
    if trainer.groups.rank == 0:
        limit_file_size(2000)


def step_batch(step: int, groups: Groups) -> StepBatch:
    """This data-parallel rank's part of the global batch of `step`: every second row has an image."""
    mine = [row(step, r) for r in range(ROWS) if r % groups.data_size == groups.data_rank]
    return StepBatch(step=step, language_rows=ROWS // 2, micro_batches=tuple(mine))


def row(step: int, index: int) -> MicroBatch:
    """One row: two documents, the first with an image if `index` is odd."""
    numbers = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(MODEL.decoder.vocab, (ROW_TOKENS,), generator=numbers)
    labels = torch.randint(MODEL.decoder.vocab, (ROW_TOKENS,), generator=numbers)
    images = index % 2
    slots = torch.arange(1, 1 + images * MODEL.tokens_per_image)
    labels[: 1 + int(slots.numel())] = IGNORE
    size = MODEL.image_size
    pixels = torch.randint(256, (images, 3, size, size), generator=numbers, dtype=torch.uint8) if images else None
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        positions=torch.cat([torch.arange(7), torch.arange(ROW_TOKENS - 7)]),
        cu_seqlens=torch.tensor([0, 7, ROW_TOKENS], dtype=torch.int32),
        max_document=7,
        pixels=pixels,
        image_slots=slots,
        num_images=images,
        modality="multimodal" if images else "language",
        sample_ids=(("rows", 1000 * step + index),),
    )
