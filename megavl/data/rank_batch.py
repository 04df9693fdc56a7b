"""The part of a global batch that belongs to one data-parallel rank.

In: a recipe, this rank's place in the data-parallel group, planned rows. Out: the micro-batches of a step. Row r of a
step belongs to micro-batch r // (dp_size * micro_batch) of rank (r // micro_batch) % dp_size, so another
data-parallel size deals the same rows differently and reads no row twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megavl.config import Recipe, SourceConfig
from megavl.data.collate import CollateSettings, build_microbatch
from megavl.data.microbatch import StepBatch
from megavl.data.mixture import RowSpec
from megavl.data.rows import SampleStore
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """What a rank wants of the global batch."""

    dp_rank: int
    """Index in the data-parallel group."""
    dp_size: int
    """Size of the data-parallel group."""
    micro_batch: int
    """Rows per forward pass."""
    length_multiple: int
    """Micro-batches are padded to a multiple of this many tokens (sequence parallelism)."""
    equal_lengths: bool
    """All micro-batches of a step are padded to the longest of this rank (pipeline buffers)."""

    def row_numbers(self, num_rows: int, num_microbatches: int | None = None) -> list[list[int]]:
        """Rows of each micro-batch of this rank, of `num_rows` in a step; missing rows leave micro-batches empty."""
        per_pass = self.dp_size * self.micro_batch
        count = -(-num_rows // per_pass) if num_microbatches is None else num_microbatches
        first = self.dp_rank * self.micro_batch
        starts = (m * per_pass + first for m in range(count))
        return [[r for r in range(s, s + self.micro_batch) if r < num_rows] for s in starts]


def rank_place(recipe: Recipe, dp_rank: int, dp_size: int, length_multiple: int, equal_lengths: bool) -> RankPlace:
    """What this rank wants of the global batch.

    Raises:
        ValueError: the global batch does not divide.
    """
    per_pass = dp_size * recipe.stage.micro_batch
    if recipe.stage.global_batch % per_pass:
        raise ValueError(
            f"stage.global_batch {recipe.stage.global_batch} is no multiple of {per_pass} = "
            f"{dp_size} data-parallel ranks x stage.micro_batch {recipe.stage.micro_batch}"
        )
    return RankPlace(
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch=recipe.stage.micro_batch,
        length_multiple=length_multiple,
        equal_lengths=equal_lengths,
    )


def open_stores(sources: Sequence[SourceConfig], recipe: Recipe, tokenizer: Tokenizer) -> dict[str, SampleStore]:
    stores: dict[str, SampleStore] = {}
    for source in sources:
        if source.name in stores:
            raise ValueError(f"two sources are named {source.name!r} ({source.path} is the second)")
        stores[source.name] = Store(source.path, tokenizer.fingerprint, recipe.model.decoder.vocab)
    return stores


def collate_settings(recipe: Recipe, tokenizer: Tokenizer, first_stage: bool) -> CollateSettings:
    try:
        image_id = tokenizer.image_id
    except ValueError:  # a text-only tokenizer; `expand` refuses a sample with images
        image_id = -1
    return CollateSettings(
        image_id=image_id,
        pad_id=tokenizer.eos_id,
        tokens_per_image=recipe.model.tokens_per_image,
        image_size=recipe.model.image_size,
        background=recipe.model.background,
        separate_documents=recipe.data.separate_documents,
        load_pixels=first_stage,
    )


def padded_lengths(microbatches: Sequence[Sequence[RowSpec]], place: RankPlace) -> list[int]:
    """Tokens of each micro-batch of one step of this rank, padding included."""
    multiple = place.length_multiple
    lengths = [-(-max(1, sum(r.length for r in rows)) // multiple) * multiple for rows in microbatches]
    return [max(lengths)] * len(lengths) if place.equal_lengths else lengths


def build_step(
    microbatches: Sequence[Sequence[RowSpec]],
    stores: Mapping[str, SampleStore],
    place: RankPlace,
    settings: CollateSettings,
) -> tuple[StepBatch, list[str]]:
    """Micro-batches of one step; `step` and `language_rows` are filled in by the caller."""
    lengths = padded_lengths(microbatches, place)
    built = [build_microbatch(rows, stores, settings, t) for rows, t in zip(microbatches, lengths, strict=True)]
    failed = [sentence for _, sentences in built for sentence in sentences]
    return StepBatch(step=0, language_rows=0, micro_batches=tuple(m for m, _ in built)), failed
