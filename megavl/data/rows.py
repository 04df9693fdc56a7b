"""Rows of one source: which tokens of which samples make a row.

In: an opened store (lengths only, no tokens are read) and the sequence length. Out: the rows of an epoch, each a
tuple of `Part`. There are three kinds:

- `StreamRows`, for plain corpora (a bare `.bin/.idx` pair, or a store without learn flags): the documents of an
  epoch, shuffled and joined, are cut into rows of `seq_length`, as Megatron's GPT data does. Documents may be cut;
  only the last row of an epoch is shorter, so every token of an epoch is read exactly once.
- `SampleRows`, for stores with learn flags or images (captions, interleaved documents, conversations, text-only SFT)
  in a stage without packing: one sample per row, whole.
- `PackRows`, for the same stores with packing: several whole samples per row, planned from the lengths.

Shapes: n samples of the source.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megavl.data.order import order_key, shuffled
from megavl.data.packing import pack

UNSHUFFLED = -1
"""Epoch number of documents in the order of the store, for validation."""


class Part(NamedTuple):
    """Tokens [start, stop) of one sample, counted before images are expanded."""

    sample: int
    start: int
    stop: int


class SampleStore(Protocol):
    """What rows and micro-batches need of `megavl.data.store.Store`."""

    @property
    def manifest(self) -> dict[str, Any] | None:
        """None for a bare pair; `kind` is "text" for a plain corpus."""

    @property
    def num_samples(self) -> int:
        """Samples in the store."""

    @property
    def lengths(self) -> NDArray[np.integer]:
        """Tokens of each sample, one per image, [n]."""

    @property
    def image_counts(self) -> NDArray[np.integer]:
        """Images of each sample, [n]."""

    def tokens_slice(self, i: int, start: int, stop: int, /) -> NDArray[np.integer]:
        """Token ids [start, stop) of a sample."""

    def learn(self, i: int, /) -> NDArray[np.bool_]:
        """Which tokens of a sample are targets."""

    def images(self, i: int, /) -> list[bytes]:
        """Encoded images of a sample in reading order."""


class SourceRows(Protocol):
    """The rows of one source."""

    unit: str
    """What a row is, in the plural."""
    num_rows: int
    """Rows per epoch."""
    fill: float
    """Tokens over the room of all rows of an epoch."""

    def parts(self, epoch: int, rows: Sequence[int]) -> list[tuple[Part, ...]]:
        """What each of `rows` of an epoch holds."""


class StreamRows:
    """Full rows from the joined documents of an epoch."""

    unit = "rows of joined documents"

    def __init__(self, store: SampleStore, seq_length: int, key: int) -> None:
        """Takes the key of the document order; it is combined with the epoch."""
        self._lengths, self._seq_length, self._key = np.asarray(store.lengths), seq_length, key
        self._total = int(self._lengths.sum(dtype=np.int64))
        self.num_rows = -(-self._total // seq_length)
        self.fill = self._total / (self.num_rows * seq_length) if self.num_rows else 0.0
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def parts(self, epoch: int, rows: Sequence[int]) -> list[tuple[Part, ...]]:
        """What each of `rows` of an epoch holds."""
        documents, ends = self._epoch(epoch)
        return [self._cut(documents, ends, row) for row in rows]

    def _cut(self, documents: NDArray[np.int64], ends: NDArray[np.int64], row: int) -> tuple[Part, ...]:
        begin, stop = row * self._seq_length, min((row + 1) * self._seq_length, self._total)
        parts = []
        place = int(np.searchsorted(ends, begin, side="right"))
        while begin < stop:
            sample = int(documents[place])
            length, end = int(self._lengths[sample]), int(ends[place])
            if length:
                first = begin - (end - length)
                parts.append(Part(sample, first, first + min(end, stop) - begin))
            begin, place = min(end, stop), place + 1
        return tuple(parts)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents in the order of `epoch`, and where each ends in the stream; int64 [n] each."""
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # an epoch and the next, while steps straddle them
                del self._epochs[min(self._epochs)]
            order = np.arange(len(self._lengths), dtype=np.int64)
            if epoch != UNSHUFFLED:
                order = shuffled(order, len(order), order_key(self._key, "documents", epoch))
            self._epochs[epoch] = (order, np.cumsum(self._lengths[order], dtype=np.int64))
        return self._epochs[epoch]


class SampleRows:
    """One whole sample per row."""

    unit = "samples"

    def __init__(self, store: SampleStore, counted: NDArray[np.int64], seq_length: int) -> None:
        """Takes the tokens of each sample that count towards `seq_length`, int64 [n]."""
        self._lengths, self.num_rows = np.asarray(store.lengths), store.num_samples
        self.fill = float(counted.mean()) / seq_length if len(counted) else 0.0

    def parts(self, epoch: int, rows: Sequence[int]) -> list[tuple[Part, ...]]:
        """What each of `rows` of an epoch holds; the same in every epoch."""
        return [(Part(row, 0, int(self._lengths[row])),) for row in rows]


class PackRows:
    """Several whole samples per row; `fill` is the packing's fill rate."""

    unit = "packs"

    def __init__(self, store: SampleStore, counted: NDArray[np.int64], seq_length: int, key: int) -> None:
        """Takes the tokens of each sample that count towards `seq_length`, int64 [n], and the key of the order."""
        self._lengths, self._key = np.asarray(store.lengths), key
        self._packs = pack(counted, seq_length)
        self.num_rows, self.fill = len(self._packs), self._packs.fill
        self._epochs: dict[int, NDArray[np.uint64]] = {}

    def parts(self, epoch: int, rows: Sequence[int]) -> list[tuple[Part, ...]]:
        """What each of `rows` of an epoch holds; equally long samples change places from epoch to epoch."""
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # an epoch and the next, while steps straddle them
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._packs.group_keys(order_key(self._key, "packs", epoch))
        found = self._packs.samples(rows, self._epochs[epoch])
        return [
            tuple(Part(s, 0, t) for s, t in zip(samples.tolist(), self._lengths[samples].tolist(), strict=True))
            for samples in found
        ]


def reads_as_stream(store: SampleStore) -> bool:
    """Whether a store is a plain corpus, read as full rows: a bare pair, or kind `text`."""
    return store.manifest is None or store.manifest["kind"] == "text"


def make_rows(
    name: str,
    store: SampleStore,
    *,
    seq_length: int,
    tokens_per_image: int,
    text_only_limit: bool,
    packing: bool,
    key: int,
) -> SourceRows:
    """The rows of a source.

    Args:
        name: the source, for errors.
        store: opened store.
        seq_length: longest row in tokens.
        tokens_per_image: positions that one image takes.
        text_only_limit: count text tokens alone towards `seq_length`.
        packing: fill rows with several samples.
        key: seeds the order.

    Raises:
        ValueError: the source is empty, or a sample is longer than `seq_length`.
    """
    if not store.num_samples or not int(np.asarray(store.lengths).sum()):
        raise ValueError(f"source {name} has {store.num_samples} samples and no tokens; it needs at least one")
    if reads_as_stream(store):
        return StreamRows(store, seq_length, key)
    counted = counted_lengths(store, tokens_per_image, text_only_limit)
    _check_lengths(name, counted, seq_length)
    return PackRows(store, counted, seq_length, key) if packing else SampleRows(store, counted, seq_length)


def counted_lengths(store: SampleStore, tokens_per_image: int, text_only: bool) -> NDArray[np.int64]:
    """Tokens of each sample that count towards the sequence length, int64 [n]: all of them, or those of the text."""
    images = np.asarray(store.image_counts, dtype=np.int64)
    return np.asarray(store.lengths, dtype=np.int64) + images * (-1 if text_only else tokens_per_image - 1)


def _check_lengths(name: str, counted: NDArray[np.int64], seq_length: int) -> None:
    longest, shortest = int(counted.argmax()), int(counted.argmin())
    if counted[longest] > seq_length:
        raise ValueError(
            f"source {name}: sample {longest} has {counted[longest]} tokens, data.seq_length is {seq_length} "
            f"({int((counted > seq_length).sum())} of {len(counted)} samples are longer; rebuild the store)"
        )
    if counted[shortest] < 1:
        raise ValueError(f"source {name}: sample {shortest} has {counted[shortest]} tokens, needs at least 1")
