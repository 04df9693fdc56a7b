"""The batches of one data-parallel rank, read ahead by loader processes.

In: a recipe and this rank's place in the data-parallel group. Out: one `StepBatch` per step. Tensor- and
pipeline-parallel ranks of one data-parallel rank read the same rows; each decodes the images that it encodes.

Nothing is drawn at random here and torch's global generator is not touched: the state to resume from is the step.
"""

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch.utils.data import DataLoader, Dataset

from megavl.config import Recipe, SourceConfig
from megavl.data.collate import CollateSettings
from megavl.data.microbatch import EVERY_PIXEL, NO_PIXELS, PixelRule, StepBatch
from megavl.data.mixture import RowSpec, StepPlan, row_spec
from megavl.data.order import order_key
from megavl.data.parcel import Parcel, wrap
from megavl.data.rank_batch import RankPlace, build_step, collate_settings, open_stores, rank_place, rank_rows
from megavl.data.rows import UNSHUFFLED, SampleStore, make_rows
from megavl.data.tokenizer import Tokenizer

STEPS_AHEAD = 2  # steps that each loader process prepares beyond the one in use; smooths slow multimodal steps


def make_loader(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    dp_rank: int,
    dp_size: int,
    pixels: PixelRule,
    last_stage: bool,
    length_multiple: int,
    equal_lengths: bool,
    start: int,
    stop: int | None = None,
    pin_memory: bool = False,
) -> Iterator[StepBatch]:
    """Opens the sources, plans, and starts reading.

    Args:
        recipe: the run.
        tokenizer: of the run; stores built with another are refused.
        dp_rank: index in the data-parallel group.
        dp_size: size of the data-parallel group.
        pixels: images that this rank decodes.
        last_stage: this rank computes the loss. Labels are small and are read everywhere.
        length_multiple: micro-batches are padded to a multiple of this many tokens.
        equal_lengths: pad all micro-batches of a step to the longest of this rank.
        start: first step.
        stop: step after the last; None: `recipe.stage.steps`.
        pin_memory: tensors come in pinned memory.

    Returns:
        Steps `start` to `stop` - 1 in order. `next()` waits only if the loader processes are behind. An error in
        one of them is raised by `next()`.

    Raises:
        ValueError: a source can not be used, or the global batch does not divide.
    """
    place = rank_place(recipe, dp_rank, dp_size, length_multiple, equal_lengths)
    sources = [s for s in recipe.data.sources if s.share > 0]
    stores = open_stores(sources, recipe, tokenizer)
    plan = StepPlan(recipe.data, recipe.stage, stores, recipe.model.tokens_per_image)
    plan.prepare(start)
    reader = _StepReader(plan, stores, place, collate_settings(recipe, tokenizer, pixels))
    return _read_ahead(
        reader, range(start, recipe.stage.steps if stop is None else stop), recipe.data.workers, pin_memory
    )


@dataclass(frozen=True)
class _Failure:
    """An exception in a loader process; the process itself lives on, so nobody waits for it in vain."""

    sentence: str
    """What to tell the user."""
    is_user_error: bool
    """A `ValueError` with a sentence of its own; otherwise the traceback is part of the sentence."""


class _StepReader(Dataset[Any]):
    """Step -> `Parcel`; runs in a loader process."""

    def __init__(
        self, plan: StepPlan, stores: Mapping[str, SampleStore], place: RankPlace, settings: CollateSettings
    ) -> None:
        self._plan, self._stores, self._place, self._settings = plan, stores, place, settings

    def __getitem__(self, step: int) -> Parcel | _Failure:
        try:
            return wrap(self.read(step))
        except ValueError as error:
            return _Failure(f"step {step}: {error}", is_user_error=True)
        except Exception:
            return _Failure(f"step {step}: reading failed\n{traceback.format_exc()}", is_user_error=False)

    def read(self, step: int) -> StepBatch:
        """The step's batch of this rank."""
        rows = rank_rows(self._plan, step, self._place)
        batch, failed = build_step(rows, self._stores, self._place, self._settings)
        answered = tuple(failed) if self._settings.pixels.answers else ()
        return replace(batch, step=step, language_rows=self._plan.language_rows(step), failed=answered)


def _read_ahead(reader: _StepReader, steps: range, workers: int, pin_memory: bool) -> Iterator[StepBatch]:
    loader: DataLoader[Any] = DataLoader(
        reader,
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        prefetch_factor=STEPS_AHEAD if workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,  # the plan is shared, not copied
        generator=torch.Generator(),  # the global one would be one number further after each start
    )
    return _open_parcels(iter(loader))  # loader processes start here, not at the first `next()`


def _open_parcels(parcels: Iterator[Parcel | _Failure]) -> Iterator[StepBatch]:
    for parcel in parcels:
        if isinstance(parcel, _Failure):
            raise ValueError(parcel.sentence) if parcel.is_user_error else RuntimeError(parcel.sentence)
        yield parcel.open()


def _as_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    # SIGTERM and ctrl-C go to the process group of the training process, which needs its loaders until it stops.
    os.setsid()


def validation_batches(
    recipe: Recipe,
    tokenizer: Tokenizer,
    source: SourceConfig,
    *,
    dp_rank: int,
    dp_size: int,
    first_stage: bool,
    length_multiple: int,
    equal_lengths: bool,
) -> "ValidationBatches":
    """The first `logging.validation_rows` rows of a held-out source, in order, without packing.

    Args:
        recipe: the run.
        tokenizer: of the run.
        source: one of `recipe.data.validation`.
        dp_rank: index in the data-parallel group.
        dp_size: size of the data-parallel group.
        first_stage: decode images.
        length_multiple: micro-batches are padded to a multiple of this many tokens.
        equal_lengths: pad all micro-batches of a step to the longest of this rank.

    Returns:
        Batches of at most `global_batch` rows, read when they are asked for. Each rank has as many, with as many
        micro-batches; those beyond the last row are padding without labels.

    Raises:
        ValueError: the source can not be used.
    """
    place = rank_place(recipe, dp_rank, dp_size, length_multiple, equal_lengths)
    stores = open_stores([source], recipe, tokenizer)
    rows = make_rows(
        source.name,
        stores[source.name],
        seq_length=recipe.data.seq_length,
        tokens_per_image=recipe.model.tokens_per_image,
        text_only_limit=recipe.data.length_counts == "text",
        packing=False,
        key=order_key(0),
    )
    count = min(rows.num_rows, recipe.logging.validation_rows)
    specs = [
        row_spec(source, UNSHUFFLED, r, parts, stores[source.name], recipe.model.tokens_per_image)
        for r, parts in enumerate(rows.parts(UNSHUFFLED, range(count)))
    ]
    # Interleaved pipelines need a multiple of the pipeline size.
    multiple = recipe.parallel.pipeline if recipe.parallel.virtual_pipeline > 1 else 1
    settings = collate_settings(recipe, tokenizer, EVERY_PIXEL if first_stage else NO_PIXELS)
    return ValidationBatches(specs, stores, place, settings, recipe.stage.global_batch, multiple)


class ValidationBatches(Sequence[StepBatch]):
    """Held-out rows as a list of steps, each read when it is indexed, so images are not all kept in memory."""

    def __init__(
        self,
        rows: Sequence[RowSpec],
        stores: Mapping[str, SampleStore],
        place: RankPlace,
        settings: CollateSettings,
        step_rows: int,
        microbatch_multiple: int,
    ) -> None:
        """Takes all rows of the source; `step_rows` at most go into one batch."""
        self._rows, self._stores, self._place, self._settings = rows, stores, place, settings
        self._step_rows, self._multiple = step_rows, microbatch_multiple

    def __len__(self) -> int:
        return -(-len(self._rows) // self._step_rows)

    @overload
    def __getitem__(self, index: int) -> StepBatch: ...

    @overload
    def __getitem__(self, index: slice) -> list[StepBatch]: ...

    def __getitem__(self, index: int | slice) -> StepBatch | list[StepBatch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows = self._rows[index * self._step_rows : (index + 1) * self._step_rows]
        passes = -(-len(rows) // (self._place.dp_size * self._place.micro_batch))
        passes = -(-passes // self._multiple) * self._multiple
        grouped = [[rows[r] for r in numbers] for numbers in self._place.row_numbers(len(rows), passes)]
        batch, failed = build_step(grouped, self._stores, self._place, self._settings)
        language = sum(row.modality == "language" for row in rows)
        return replace(batch, step=index, language_rows=language, failed=tuple(failed))
