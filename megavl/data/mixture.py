"""The step plan: which rows, of which sources, make the global batch of a step.

In: the data and stage sections of a recipe and the opened stores. Out: `StepPlan.rows(step)`, a pure function of
(recipe, seed, step). Layout and worker count do not enter, and nothing is remembered between steps.

A row is found in three closed-form moves (`megavl/data/order.py`): the schedule says whether it is a language row and
the how-manyth of its modality it is; the shares deal it to a source; a bijection of the source's rows says which one,
in which epoch. Sources of a modality keep their proportions among themselves; the modality schedule decides the rest.

Shapes: r rows of the global batch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megavl.config import DataConfig, Modality, Recipe, SourceConfig, StageConfig
from megavl.data.order import ModalitySchedule, Shares, exact, order_key, shuffled
from megavl.data.rows import Part, SampleStore, SourceRows, make_rows

MODALITIES: tuple[Modality, Modality] = ("language", "multimodal")
_ORDER = {
    "stage": ("seed", "global_batch"),
    "data": ("seq_length", "length_counts", "packing", "grouping", "language_warmup"),
}
"""Section -> fields that decide, beside the sources, which rows make a step."""


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """One row of the global batch, before anything is read."""

    source: str
    """Name of the source."""
    modality: Modality
    """Modality of the source."""
    epoch: int
    """How often the source was read through before."""
    index: int
    """Which row of the source, from 0."""
    parts: tuple[Part, ...]
    """Samples, or pieces of documents, in order."""
    length: int
    """Tokens after images are expanded."""
    num_images: int
    """Images of all parts."""


def order_changes(recipe: Recipe, before: Mapping[str, Any]) -> list[str]:
    """What a resumed run would read in another order than the run that it continues: a sentence per field.

    Args:
        recipe: the run.
        before: the recipe that the checkpoint was saved with, as JSON has it; of an absent field nothing is said.
    """
    sentences = []
    for section, names in _ORDER.items():
        warming = section == "stage" and recipe.data.language_warmup > 0  # over a fraction of all steps
        for name in (*names, "steps") if warming else names:
            was, now = before.get(section, {}).get(name), getattr(getattr(recipe, section), name)
            if was is not None and was != now:
                sentences.append(f"{section}.{name} was {was}, now {now}")
    drawn = [f"{s.name} {s.share:g}" for s in recipe.data.sources]
    listed = [f"{s['name']} {s['share']:g}" for s in before.get("data", {}).get("sources", ())]
    if listed and listed != drawn:
        sentences.append(f"data.sources were {', '.join(listed)}, now {', '.join(drawn)}")
    return sentences


class StepPlan:
    """The global batch of every step."""

    def __init__(
        self, data: DataConfig, stage: StageConfig, stores: Mapping[str, SampleStore], tokens_per_image: int
    ) -> None:
        """Plans packs and reads lengths; no tokens.

        Args:
            data: sources, shares, grouping.
            stage: batch sizes, steps, seed.
            stores: opened store of each source, by its name.
            tokens_per_image: positions that one image takes.

        Raises:
            ValueError: no source has a share, a source is empty or has a sample longer than the sequence length,
                or a modality warm-up has no language to start from.
        """
        self._data, self._stage = data, stage
        self._tokens_per_image, self._stores = tokens_per_image, stores
        self._sources = {m: [s for s in data.sources if s.modality == m and s.share > 0] for m in MODALITIES}
        self._shares = {m: Shares([s.share for s in sources]) for m, sources in self._sources.items() if sources}
        self.schedule = _schedule(data, stage)
        self.global_batch = stage.global_batch
        """Rows per step."""
        self.steps, self.grouping = stage.steps, data.grouping
        self.unit_rows = {"step": stage.global_batch, "microbatch": stage.micro_batch, "none": 1}[data.grouping]
        """Rows that share one decision about the modality."""
        self.sources: dict[str, SourceRows] = {
            s.name: make_rows(
                s.name,
                stores[s.name],
                seq_length=data.seq_length,
                tokens_per_image=tokens_per_image,
                text_only_limit=data.length_counts == "text",
                packing=data.packing,
                key=order_key(stage.seed, s.name),
            )
            for sources in self._sources.values()
            for s in sources
        }
        """Rows of each source, by its name."""

    def configs(self) -> list[SourceConfig]:
        """Sources that are drawn from, language first."""
        return [source for sources in self._sources.values() for source in sources]

    def language_rows(self, step: int) -> int:
        """Language rows in the global batch of `step`."""
        return self._language_units(step + 1, 0) - self._language_units(step, 0)

    def rows(self, step: int, wanted: Sequence[int] | None = None) -> list[RowSpec]:
        """Rows of the global batch of `step`.

        Args:
            step: from 0.
            wanted: which of the r rows to work out, such as those of one rank; None: all, in order.
        """
        numbers = range(self.global_batch) if wanted is None else wanted
        places = self._places(step, numbers)
        dealt = [(m, *self._shares[m].deal(k)) for m, k in places]  # (modality, source, row of the source)
        by_epoch: dict[tuple[Modality, int, int], list[int]] = defaultdict(list)
        for at, (modality, source, k) in enumerate(dealt):
            by_epoch[modality, source, k // self._rows_of(modality, source).num_rows].append(at)
        found: dict[int, RowSpec] = {}
        for (modality, source, epoch), ats in by_epoch.items():
            num_rows = self._rows_of(modality, source).num_rows
            key = order_key(self._stage.seed, self._sources[modality][source].name, "rows", epoch)
            positions = np.array([dealt[at][2] % num_rows for at in ats], dtype=np.int64)
            config = self._sources[modality][source]
            indices, store = shuffled(positions, num_rows, key).tolist(), self._stores[config.name]
            contents = self.sources[config.name].parts(epoch, indices)
            for at, index, parts in zip(ats, indices, contents, strict=True):
                found[at] = row_spec(config, epoch, index, parts, store, self._tokens_per_image)
        return [found[at] for at in range(len(dealt))]

    def prepare(self, step: int) -> None:
        """Works out the orders that steps from `step` on need, so that forked loader processes share them."""
        for name, rows in self.sources.items():
            rows.parts(self.drawn(name, step) // rows.num_rows, [0])

    def drawn(self, source: str, steps: int) -> int:
        """Rows of `source` in the first `steps` steps, worked out without going through them; within a few rows."""
        for modality, sources in self._sources.items():
            total = sum(exact(s.share) for s in sources)
            for s in sources:
                if s.name == source:
                    language = self._language_units(steps, 0)
                    rows = language if modality == "language" else steps * self.global_batch - language
                    return round(rows * exact(s.share) / total)
        return 0

    def _places(self, step: int, numbers: Sequence[int]) -> list[tuple[Modality, int]]:
        """(modality, how-manyth row of it since step 0) of rows of the global batch."""
        first, of_step = self._language_units(step, 0), self.language_rows(step)
        places: list[tuple[Modality, int]] = []
        for row in numbers:
            if self._data.grouping == "none":  # modalities alternate within the step
                before = self._language_units(step, row)
                is_language = self._language_units(step, row + 1) > before
            else:  # language rows first
                before = first + min(row, of_step)
                is_language = row < of_step
            if is_language:
                places.append(("language", before))
            else:
                places.append(("multimodal", step * self.global_batch + row - before))
        return places

    def _language_units(self, step: int, unit: int) -> int:
        """Language rows before unit `unit` of `step`."""
        units = self.global_batch // self.unit_rows
        return self.schedule.language_before(step, unit, units) * self.unit_rows

    def _rows_of(self, modality: Modality, source: int) -> SourceRows:
        return self.sources[self._sources[modality][source].name]


def row_spec(
    source: SourceConfig, epoch: int, index: int, parts: tuple[Part, ...], store: SampleStore, tokens_per_image: int
) -> RowSpec:
    """Row `index` of a source with the sizes that are known before reading."""
    images = sum(int(store.image_counts[p.sample]) for p in parts)
    return RowSpec(
        source=source.name,
        modality=source.modality,
        epoch=epoch,
        index=index,
        parts=parts,
        length=sum(p.stop - p.start for p in parts) + images * (tokens_per_image - 1),
        num_images=images,
    )


def _schedule(data: DataConfig, stage: StageConfig) -> ModalitySchedule:
    shares: dict[Modality, Fraction] = dict.fromkeys(MODALITIES, Fraction(0))
    for source in data.sources:
        shares[source.modality] += exact(source.share)
    total = shares["language"] + shares["multimodal"]
    if total <= 0:
        raise ValueError(f"the shares of {len(data.sources)} data.sources sum to {float(total)}, need > 0")
    target = shares["language"] / total
    if data.language_warmup > 0 and target == 0:
        raise ValueError(f"data.language_warmup is {data.language_warmup}, but no source has modality language")
    return ModalitySchedule(target=target, warmup_steps=exact(data.language_warmup) * stage.steps)
