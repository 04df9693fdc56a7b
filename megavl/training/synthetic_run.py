"""Training steps of a recipe on made-up batches: what is timed and traced where there is no data.

In: a recipe. Out: a `SyntheticRun` of this rank, and batches of the recipe's shapes.
Shapes: t tokens of a micro-batch, p positions per image, i images, S side of an image in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megavl.config import Recipe
from megavl.data.microbatch import IGNORE, MicroBatch, StepBatch
from megavl.model.build import build_stages
from megavl.ops import make_ops
from megavl.parallel.gradients import unwrap, wrap_stages
from megavl.parallel.groups import Groups
from megavl.parallel.random_state import seed_everything
from megavl.parallel.vision_ahead import AheadEncoder, make_ahead_encoder
from megavl.training.freeze import apply_freeze, compile_frozen_towers, frozen_components, trained_components
from megavl.training.optimizer import make_optimizer
from megavl.training.rank_report import StepTotals, exchange, report
from megavl.training.step import StepResult, train_step
from megavl.training.step_clock import StepClock

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """A recipe's model, built as for training."""

    recipe: Recipe
    """Model, layout, stage, type, optimizer."""
    groups: Groups
    """This rank's place."""
    chunks: list[DistributedDataParallel]
    """Wrapped stages."""
    optimizer: ChainedOptimizer
    """AdamW."""
    encoder: AheadEncoder | None
    """What runs frozen towers before the schedule."""
    clock: StepClock
    """Times of the parts."""
    trained: set[str]
    """Components of which something is trained, on whichever rank."""

    def step(self, batch: StepBatch, upcoming: StepBatch | None = None) -> tuple[StepResult, StepTotals]:
        """Make one step and say what it held and took; all ranks must call it. `data_wait_s` is 0.

        `upcoming` is the batch of the next step, if one follows, as the training loop hands it on.
        """
        result = train_step(
            self.chunks,
            self.optimizer,
            batch,
            self.groups,
            lr=self.recipe.optim.lr,
            encoder=self.encoder,
            upcoming=upcoming,
        )
        assert not result.skipped, result.skipped
        if self.groups.device.type == "cuda":
            torch.cuda.synchronize()
        parts, memory = self.clock.read(), self.clock.peak_memory()
        mine = report(batch, self.groups, stop=False, save=False, data_wait_s=0.0, parts=parts, memory=memory)
        return result, exchange(mine, self.groups)


def build_run(recipe: Recipe, groups: Groups, clock: StepClock | None = None) -> SyntheticRun:
    """Build this rank's part; all ranks must call it.

    Args:
        recipe: what to build.
        groups: this rank's groups.
        clock: what the marks of a step go to; None: a `StepClock`.
    """
    seed_everything(recipe.stage.seed, groups)
    dtype = DTYPES[recipe.stage.dtype]
    ops = make_ops(recipe.kernels, groups.device, dtype)
    stages = build_stages(
        recipe.model,
        recipe.parallel,
        dtype=dtype,
        seed=recipe.stage.seed,
        pg=groups.pg,
        device=groups.device,
        ops=ops,
    )
    apply_freeze(stages, recipe.stage.number)
    if recipe.parallel.compile_vision:
        compile_frozen_towers(stages)
    chunks = wrap_stages(stages, recipe.parallel, groups)
    optimizer = make_optimizer(chunks, recipe.optim, recipe.parallel, groups)
    frozen = frozen_components(recipe.stage.number)
    clock = clock or StepClock(groups.device)
    clock.attach(chunks)
    trained: list[Any] = [None] * groups.world_size
    dist.all_gather_object(trained, trained_components(unwrap(chunks)), group=groups.gloo_world)
    return SyntheticRun(
        recipe=recipe,
        groups=groups,
        chunks=chunks,
        optimizer=optimizer,
        encoder=make_ahead_encoder(stages, recipe.model, recipe.parallel, groups, frozen=frozen, ops=ops),
        clock=clock,
        trained=set().union(*trained),
    )


def recipe_batch(recipe: Recipe, groups: Groups, images: int, *, micro_batches: int, step: int) -> StepBatch:
    """This data-parallel rank's batch at the recipe's shapes: full rows, each one document, every text token learnt.

    Args:
        recipe: row length, rows per micro-batch, sizes.
        groups: this rank's groups.
        images: of each row; the rest of it is text.
        micro_batches: of this rank.
        step: seeds the values, with the rank's place.

    Raises:
        ValueError: so many images do not fit into a row.
    """
    rows = [(recipe.data.seq_length, images)] * recipe.stage.micro_batch
    first = (step * groups.data_size + groups.data_rank) * micro_batches
    made = [
        replace(document_batch(recipe, rows, seed=first + index), images_before=index * images * len(rows))
        for index in range(micro_batches)
    ]
    return StepBatch(step=step, language_rows=0, micro_batches=tuple(made))


def document_batch(recipe: Recipe, documents: Sequence[tuple[int, int]], *, seed: int, padding: int = 0) -> MicroBatch:
    """A micro-batch of random values.

    Args:
        recipe: sizes.
        documents: (tokens, images among them) of each document; images stand after the first token.
        seed: of tokens and pixels.
        padding: tokens of a last document without labels.

    Raises:
        ValueError: the images of a document do not fit into it.
    """
    model, generator = recipe.model, torch.Generator().manual_seed(seed)
    short = [(tokens, images) for tokens, images in documents if images * model.tokens_per_image + 2 > tokens]
    if short:
        tokens, images = short[0]
        raise ValueError(f"{images} images of {model.tokens_per_image} tokens and text do not fit into {tokens} tokens")
    lengths = [tokens for tokens, _ in documents] + [padding] * (padding > 0)
    total, starts = sum(lengths), [sum(lengths[:index]) for index in range(len(lengths))]
    ids = torch.randint(0, model.decoder.vocab - 1, (total,), generator=generator)  # [t]
    labels = torch.randint(0, model.decoder.vocab - 1, (total,), generator=generator)
    slots = [
        torch.arange(start + 1, start + 1 + images * model.tokens_per_image)
        for start, (_, images) in zip(starts, documents, strict=False)
    ]
    image_slots = torch.cat(slots)  # [i*p]
    labels[image_slots - 1] = IGNORE  # the token before an image position, and those of the image but its last
    labels[total - padding :] = IGNORE
    count = sum(images for _, images in documents)
    shape = (count, 3, model.image_size, model.image_size)
    return MicroBatch(
        tokens=ids,
        labels=labels,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([*starts, total], dtype=torch.int32),
        max_document=max(lengths),
        pixels=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) if count else None,
        image_slots=image_slots,
        num_images=count,
        modality="multimodal" if count else "language",
        sample_ids=tuple(("made up", index) for index in range(len(documents))),
    )
