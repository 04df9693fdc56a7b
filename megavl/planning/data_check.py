"""What a run's sources hold, and every way in which they cannot give what the recipe asks; only lengths are read.

In: a recipe. Out: `DataReport`: lines about the sources and the order of reading, one sentence per problem, and the
stores that could be opened.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from megavl.config import Recipe, SourceConfig
from megavl.data.mixture import StepPlan
from megavl.data.plan_report import describe_plan
from megavl.data.rows import SampleStore, counted_lengths, reads_as_stream
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer


@dataclass
class DataReport:
    """What was found."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stores: dict[str, SampleStore] = field(default_factory=dict)
    """Those that could be opened, training sources only."""


def check_data(recipe: Recipe) -> DataReport:
    """Open every source; nothing stops at the first problem."""
    report = DataReport()
    fingerprint = None
    try:
        fingerprint = Tokenizer(recipe.data.tokenizer).fingerprint
    except (ValueError, OSError) as error:
        report.problems.append(f"data.tokenizer {recipe.data.tokenizer}: {error}")
    for source in (*recipe.data.sources, *recipe.data.validation):
        try:
            store = Store(source.path, fingerprint, recipe.model.decoder.vocab)
        except (ValueError, OSError) as error:
            report.problems.append(f"source {source.name}: {error}")
            continue
        report.problems += _store_problems(recipe, source, store)
        if source in recipe.data.sources:
            report.stores[source.name] = store
            report.lines += _store_lines(source, store)
    if not report.problems:  # the plan needs all of it
        report.lines += _plan_lines(recipe, report)
    return report


def _store_problems(recipe: Recipe, source: SourceConfig, store: Store) -> Iterator[str]:
    """Samples that do not fit a row, and sources that are not what they are called."""
    images = int(np.asarray(store.image_counts).sum())
    if source.modality == "multimodal" and not images and recipe.stage.number != 0:
        yield f"source {source.name}: modality multimodal, but its {store.num_samples} samples hold 0 images"
    if source.modality == "language" and images:
        yield f"source {source.name}: modality language, but its {store.num_samples} samples hold {images} images"
    if reads_as_stream(store):
        return
    limit, per_image = recipe.data.seq_length, recipe.model.tokens_per_image
    lengths = counted_lengths(store, per_image, recipe.data.length_counts == "text")
    long = lengths > limit
    if long.any():
        yield (
            f"source {source.name}: {int(long.sum())} of {len(lengths)} samples are longer than data.seq_length {limit}"
            f"; the longest, sample {int(lengths.argmax())}, has {int(lengths.max())} tokens"
        )
    if recipe.data.length_counts == "all":
        room = limit // per_image
        many = np.asarray(store.image_counts) > room
        if many.any():
            yield (
                f"source {source.name}: {int(many.sum())} of {len(lengths)} samples hold more images than fit, up to "
                f"{int(np.asarray(store.image_counts).max())}; data.seq_length {limit} has room for {room} of "
                f"{per_image} tokens, and an image is never cut"
            )
    empty = int((lengths < 1).sum())
    if empty:
        yield f"source {source.name}: {empty} of {len(lengths)} samples have no tokens"


def _store_lines(source: SourceConfig, store: Store) -> Iterator[str]:
    lengths, images = np.asarray(store.lengths), np.asarray(store.image_counts)
    yield (
        f"{source.name}: {source.modality}, share {100 * source.share:.2f}%, {store.num_samples:,} samples, "
        f"{int(lengths.sum()):,} stored tokens, {int(images.sum()):,} images (up to "
        f"{int(images.max(initial=0))} a sample)"
    )
    rejected = store.manifest["counts"]["rejected"] if store.manifest else 0
    if rejected:
        yield f"{source.name}: {rejected:,} inputs were rejected when the store was built (reasons in its manifest)"


def _plan_lines(recipe: Recipe, report: DataReport) -> list[str]:
    """The order of reading; shares that the run cannot meet are problems."""
    try:
        plan = StepPlan(recipe.data, recipe.stage, report.stores, recipe.model.tokens_per_image)
    except ValueError as error:
        report.problems.append(str(error))
        return []
    rows = recipe.stage.steps * recipe.stage.global_batch
    for source in plan.configs():
        drawn = plan.drawn(source.name, recipe.stage.steps)
        wanted = source.share * rows
        # What of the mean share is lost to a modality warm-up is by design; a source that never comes is not.
        if drawn < 1:
            report.problems.append(
                f"source {source.name}: its share {source.share:g} of {rows} rows comes to {wanted:.2f}, and the run "
                f"draws {drawn} rows of it; give it a larger share or more steps"
            )
    return describe_plan(plan)
