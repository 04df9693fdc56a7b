"""From planned rows to a micro-batch: read tokens, expand images, join everything into one stream.

In: the `RowSpec`s of one micro-batch, stores, and what the model expects of images. Out: a `MicroBatch` (and a
sentence for each image that could not be decoded). Boundaries of documents are taken after images are expanded, so
they are those that attention sees.

Shapes: t tokens of the micro-batch, d documents, i images, p positions per image, S side of an image in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megavl.config import Modality
from megavl.data.microbatch import EVERY_IMAGE, IGNORE, ImageShare, MicroBatch, PixelRule
from megavl.data.mixture import RowSpec
from megavl.data.pixels import decode_image, to_pixels
from megavl.data.rows import Part, SampleStore, reads_as_stream
from megavl.data.sequence import expand


@dataclass(frozen=True, kw_only=True)
class CollateSettings:
    """What does not change from row to row."""

    image_id: int
    """Placeholder id; -1 where the tokenizer has none."""
    pad_id: int
    """Token of padding positions."""
    tokens_per_image: int
    """p."""
    image_size: int
    """S."""
    background: tuple[int, int, int]
    """RGB around an image, and in place of one that can not be decoded."""
    separate_documents: bool
    """Documents of a row are told apart; off: one causal sequence per row."""
    pixels: PixelRule
    """Which images are decoded."""


@dataclass
class _Stream:
    """A micro-batch while it grows."""

    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    labels: list[NDArray[np.int64]] = field(default_factory=list)
    slots: list[NDArray[np.int64]] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    length: int = 0

    def append(self, tokens: NDArray[np.int64], labels: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Adds a part behind the others; `slots` count from its start."""
        self.tokens.append(tokens)
        self.labels.append(labels)
        self.slots.append(slots + self.length)
        self.length += len(tokens)

    def end_document(self) -> None:
        """What was added since the last call is one document."""
        if self.length > self.bounds[-1]:
            self.bounds.append(self.length)


def build_microbatch(
    rows: Sequence[RowSpec],
    stores: Mapping[str, SampleStore],
    settings: CollateSettings,
    padded_length: int = 0,
    images_before: int = 0,
) -> tuple[MicroBatch, list[str]]:
    """Joins rows into one micro-batch.

    Args:
        rows: in order; none makes a micro-batch of padding alone.
        stores: opened store of each source, by its name.
        settings: see `CollateSettings`.
        padded_length: t of the result; a last document without labels fills it up. Ignored if the rows are longer.
        images_before: images in the earlier micro-batches of the step.

    Returns:
        The micro-batch, and one sentence per image that could not be decoded: it shows the background colour, and
        its text keeps its labels, so that ranks that do not decode images need not be told.

    Raises:
        ValueError: placeholders of a sample and its images differ in number.
    """
    stream = _Stream()
    for row in rows:
        _append_row(stream, row, stores[row.source], settings)
    if padded_length > stream.length:
        padding = padded_length - stream.length
        stream.append(_filled(padding, settings.pad_id), _filled(padding, IGNORE), _filled(0, 0))
        stream.end_document()
    modalities, num_images = {row.modality for row in rows}, sum(row.num_images for row in rows)
    share = settings.pixels.of(images_before, num_images)
    microbatch = _tensors(
        stream,
        num_images=num_images,
        modality=modalities.pop() if len(modalities) == 1 else None,
        sample_ids=tuple((row.source, part.sample) for row in rows for part in row.parts),
        images_before=images_before,
        pixel_share=share or EVERY_IMAGE,
    )
    if share is None:
        return microbatch, []
    pixels, failed = _decode_share(rows, stores, settings, share.of(microbatch))
    return replace(microbatch, pixels=torch.stack(pixels) if pixels else None), failed  # [i, 3, S, S]


def _append_row(stream: _Stream, row: RowSpec, store: SampleStore, settings: CollateSettings) -> None:
    if reads_as_stream(store):
        _append_stream_row(stream, row.parts, store, settings.separate_documents)
    else:
        for part in row.parts:
            tokens = store.tokens_slice(part.sample, part.start, part.stop)
            count = int(store.image_counts[part.sample])
            try:
                expanded = expand(
                    tokens, store.learn(part.sample), settings.image_id, settings.tokens_per_image, num_images=count
                )
            except ValueError as error:
                raise ValueError(f"source {row.source}, sample {part.sample}: {error}") from error
            stream.append(*expanded)
            if settings.separate_documents:
                stream.end_document()
    stream.end_document()


def _append_stream_row(stream: _Stream, parts: Sequence[Part], store: SampleStore, separate: bool) -> None:
    """A row of a plain corpus: all tokens are learnt; a document that goes on in the next row keeps its last label."""
    for at, part in enumerate(parts):
        goes_on = part.stop < store.lengths[part.sample]
        read = store.tokens_slice(part.sample, part.start, part.stop + goes_on).astype(np.int64)
        tokens, labels = read[: part.stop - part.start], read[1:]
        if not goes_on:
            joined = not separate and at + 1 < len(parts)
            after = _first_token(store, parts[at + 1]) if joined else IGNORE
            labels = np.append(labels, after)
        stream.append(tokens, labels, _filled(0, 0))
        if separate:
            stream.end_document()


def _first_token(store: SampleStore, part: Part) -> int:
    return int(store.tokens_slice(part.sample, part.start, part.start + 1)[0])


def _decode_share(
    rows: Sequence[RowSpec], stores: Mapping[str, SampleStore], settings: CollateSettings, wanted: range
) -> tuple[list[torch.Tensor], list[str]]:
    """Pixels of the images `wanted` of a micro-batch, uint8 [3, S, S] each, and a sentence for each bad one."""
    decoded: list[torch.Tensor] = []
    failed: list[str] = []
    image = 0
    for row in rows if wanted else ():
        for part in row.parts if row.num_images else ():
            for number, data in enumerate(stores[row.source].images(part.sample)):
                if image in wanted:
                    where = f"source {row.source}, sample {part.sample}, image {number}"
                    decoded.append(_decode(data, where, settings, failed))
                image += 1
    return decoded, failed


def _decode(data: bytes, where: str, settings: CollateSettings, failed: list[str]) -> torch.Tensor:
    """Pixels of one image, uint8 [3, S, S]; adds a sentence to `failed` if it is bad."""
    try:
        return to_pixels(decode_image(data, source=where), settings.image_size, settings.background)
    except ValueError as error:
        failed.append(str(error))
        colour, size = torch.tensor(settings.background, dtype=torch.uint8), settings.image_size
        return colour[:, None, None].expand(3, size, size)


def _tensors(
    stream: _Stream,
    *,
    num_images: int,
    modality: Modality | None,
    sample_ids: tuple[tuple[str, int], ...],
    images_before: int,
    pixel_share: ImageShare,
) -> MicroBatch:
    """The micro-batch without its pixels."""
    bounds = np.array(stream.bounds, dtype=np.int64)  # [d+1]
    sizes = np.diff(bounds)  # [d]
    positions = np.arange(stream.length) - np.repeat(bounds[:-1], sizes)  # [t], from 0 in each document
    return MicroBatch(
        tokens=_joined(stream.tokens),
        labels=_joined(stream.labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_document=int(sizes.max(initial=0)),
        pixels=None,
        image_slots=_joined(stream.slots),
        num_images=num_images,
        modality=modality,
        sample_ids=sample_ids,
        images_before=images_before,
        pixel_share=pixel_share,
    )


def _joined(arrays: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays) if arrays else _filled(0, 0))


def _filled(length: int, value: int) -> NDArray[np.int64]:
    return np.full(length, value, dtype=np.int64)
