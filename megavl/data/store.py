"""A prepared source on disk: token ids, which are learnt, and encoded images, all read in place.

At a prefix P lie:

    P.bin, P.idx          token ids, one document per sample, in megatron-core's IndexedDataset format
    P.learn.bin           uint8 per token, 1 = a target to learn            } not in a store
    P.images.bin          encoded image files, joined                       } of kind `text`,
    P.images.idx.npy      int64 [images + 1], where each image starts       } where all tokens are
    P.image_counts.npy    int32 [samples], images of each sample            } learnt
    P.manifest.json       tokenizer, template, counts, sizes of the files, rejected inputs

A bare `.bin/.idx` pair, as Megatron's own tools write it, is a language store. The files are memory-mapped on first use
in each process, so a `Store` can be pickled or forked into loader processes. Shapes: n tokens of a sample.
"""

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megavl.data.store_writer import FORMAT, IMAGE_COUNTS, IMAGE_OFFSETS, IMAGES, LEARN, MANIFEST, StoreWriter

__all__ = ["Store", "StoreWriter"]
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents
_MAGIC = b"MMIDIDX\x00\x00"


class Store:
    """Reads a prepared source. Samples are numbered from 0 in the order they were written."""

    def __init__(self, prefix: str | Path, tokenizer_fingerprint: str | None = None, vocab_size: int | None = None):
        """Check the files at `prefix` against each other; token ids are not read.

        Args:
            prefix: path without suffix.
            tokenizer_fingerprint: `Tokenizer.fingerprint` of the run, compared with the manifest's.
            vocab_size: rows of the embedding table; ids must be smaller. A bare pair is checked as it is read.

        Raises:
            ValueError: a file is missing, damaged or of another size than the others say; or the tokenizer or the
                vocabulary does not fit.
        """
        self.prefix = str(prefix)
        self._vocab_size = vocab_size
        self.manifest = _read_manifest(self.prefix)
        """What `tools/build_data.py` wrote; None for a bare pair."""
        self._offsets = _check_index(self.prefix)  # int64 [samples + 1], in tokens
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)
        """Stored tokens of each sample: each image counts as one."""
        self.image_counts: NDArray[np.int32] = np.zeros(len(self.lengths), dtype=np.int32)
        """Images of each sample."""
        self._has_learn = self.manifest is not None and self.manifest["kind"] != "text"
        if self.manifest is not None:
            _check_manifest(self.prefix, self.manifest, tokenizer_fingerprint, vocab_size)
        if self._has_learn:
            self.image_counts = np.load(self.prefix + IMAGE_COUNTS, allow_pickle=False)
            self._check_multimodal()
        self._image_starts = np.concatenate([[0], np.cumsum(self.image_counts, dtype=np.int64)])
        self._dataset: IndexedDataset | None = None
        self._learn: NDArray[np.uint8] | None = None
        self._images: NDArray[np.uint8] | None = None
        self._image_offsets: NDArray[np.int64] | None = None

    def _check_multimodal(self) -> None:
        total, samples, images = int(self._offsets[-1]), len(self.lengths), int(self.image_counts.sum())
        flags = Path(self.prefix + LEARN).stat().st_size
        offsets = np.load(self.prefix + IMAGE_OFFSETS, mmap_mode="r", allow_pickle=False)
        stored = Path(self.prefix + IMAGES).stat().st_size
        for name, found, expected in (
            (LEARN, flags, f"{total} tokens in .idx"),
            (IMAGE_COUNTS, len(self.image_counts), f"{samples} samples in .idx"),
            (IMAGE_OFFSETS, len(offsets) - 1, f"{images} images in {IMAGE_COUNTS}"),
            (IMAGES, stored, f"{int(offsets[-1])} bytes in {IMAGE_OFFSETS}"),
        ):
            if found != int(expected.split()[0]):
                raise ValueError(f"{self.prefix}{name} holds {found} entries but there are {expected}")

    @property
    def num_samples(self) -> int:
        """Samples in the store."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Stored tokens over all samples."""
        return int(self._offsets[-1])

    def tokens(self, i: int) -> NDArray[np.integer]:
        """Token ids of sample `i`, [n]."""
        return self.tokens_slice(i, 0, None)

    def tokens_slice(self, i: int, start: int, stop: int | None) -> NDArray[np.integer]:
        """Token ids `start` to `stop` (None: the end) of sample `i`, [stop - start], copied out of the file."""
        begin, length = self._span(i, start, stop)
        dataset = self._open_tokens()
        dtype = dataset.index.dtype
        # A view would outlive the map that it looks into, if the caller drops the store: reading it then crashes.
        ids = dataset.bin_reader.read(dtype=dtype, count=length, offset=begin * DType.size(dtype)).copy()
        if self.manifest is None and self._vocab_size is not None and length:
            for found in (int(ids.max()), int(ids.min())):
                if not 0 <= found < self._vocab_size:
                    raise ValueError(
                        f"{self.prefix}.bin: sample {i} holds id {found}, the vocabulary has {self._vocab_size}"
                    )
        return ids

    def learn(self, i: int) -> NDArray[np.bool_]:
        """Which tokens of sample `i` are targets, [n]."""
        begin, length = self._span(i, 0, None)
        if not self._has_learn:
            return np.ones(length, dtype=bool)
        if self._learn is None:
            self._learn = _map(self.prefix + LEARN)
        return self._learn[begin : begin + length].astype(bool)

    def images(self, i: int) -> list[bytes]:
        """Encoded images of sample `i` in reading order."""
        self._span(i, 0, 0)
        first, last = int(self._image_starts[i]), int(self._image_starts[i + 1])
        if first == last:
            return []
        if self._images is None or self._image_offsets is None:
            self._images = _map(self.prefix + IMAGES)
            self._image_offsets = np.load(self.prefix + IMAGE_OFFSETS, mmap_mode="r", allow_pickle=False)
        offsets = self._image_offsets[first : last + 1]
        return [self._images[a:b].tobytes() for a, b in pairwise(offsets)]

    def _span(self, i: int, start: int, stop: int | None) -> tuple[int, int]:
        """Position in the token file and length of a part of sample `i`."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"{self.prefix}: sample {i} of {self.num_samples}")
        stop = int(self.lengths[i]) if stop is None else stop
        if not 0 <= start <= stop <= self.lengths[i]:
            raise IndexError(f"{self.prefix}: tokens {start} to {stop} of sample {i}, which has {self.lengths[i]}")
        return int(self._offsets[i]) + start, stop - start

    def _open_tokens(self) -> IndexedDataset:
        if self._dataset is None:
            self._dataset = IndexedDataset(self.prefix, mmap=True)
        return self._dataset

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None, "_learn": None, "_images": None, "_image_offsets": None}


def _map(path: str) -> NDArray[np.uint8]:
    return np.memmap(path, dtype=np.uint8, mode="r")


def _read_manifest(prefix: str) -> dict[str, Any] | None:
    path = Path(prefix + MANIFEST)
    if not path.exists():
        if Path(prefix + LEARN).exists() or Path(prefix + IMAGES).exists():
            raise ValueError(f"{path}: missing, although {LEARN} or {IMAGES} is there; the store is incomplete")
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a manifest ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: its format is {found!r}, this version reads {FORMAT!r}")
    return manifest


def _check_index(prefix: str) -> NDArray[np.int64]:
    """Sizes of `.idx` and `.bin` against the counts in `.idx`; returns where each document starts, in tokens."""
    idx, binary = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (idx, binary):
        if not path.is_file():
            raise ValueError(f"{path}: no such file, {prefix} is not a store")
    size = idx.stat().st_size
    with idx.open("rb") as file:
        head = file.read(_HEADER.size)
        magic, version, code, sequences, documents = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
        if magic != _MAGIC or version != 1 or code not in {d.value for d in DType}:
            raise ValueError(f"{idx}: not a Megatron index (its first bytes are {head[:9]!r})")
        if not issubclass(DType.dtype_from_code(code), np.integer):
            raise ValueError(f"{idx}: its tokens are of type {DType.dtype_from_code(code).__name__}, not whole numbers")
        expected = _HEADER.size + sequences * 12 + documents * 8  # int32 length and int64 pointer per sequence
        if size < expected:
            raise ValueError(f"{idx}: {size} bytes, but its {sequences} sequences need {expected}")
        lengths = np.fromfile(file, dtype=np.int32, count=sequences)
        file.seek(max(sequences - 1, 0) * 8, 1)
        last = np.fromfile(file, dtype=np.int64, count=min(sequences, 1))  # byte at which the last sequence starts
        bounds = np.fromfile(file, dtype=np.int64, count=documents)
    if documents < 1 or (int(bounds[0]), int(bounds[-1])) != (0, sequences) or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(
            f"{idx}: its documents go from sequence {bounds[:1].tolist()} to {bounds[-1:].tolist()}, which must rise "
            f"from 0 to its {sequences} sequences"
        )
    if lengths.min(initial=0) < 0:
        raise ValueError(f"{idx}: sequence {int(lengths.argmin())} of {sequences} has {int(lengths.min())} tokens")
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # int64 [sequences + 1]
    needed = int(starts[-1]) * DType.size(code)
    if sequences and int(last[0]) != needed - int(lengths[-1]) * DType.size(code):
        raise ValueError(
            f"{idx}: its last sequence starts at byte {int(last[0])}, after the others comes byte "
            f"{needed - int(lengths[-1]) * DType.size(code)}; an index of parts of a .bin is not read, copy the parts"
        )
    found = binary.stat().st_size
    if found < needed:
        raise ValueError(f"{binary}: {found} bytes, but {idx.name} describes {needed} bytes of tokens")
    if found == 0:
        raise ValueError(f"{binary}: the store holds no tokens")
    return starts[bounds]


def _check_manifest(prefix: str, manifest: dict[str, Any], fingerprint: str | None, vocab_size: int | None) -> None:
    path = prefix + MANIFEST
    built_with = manifest["tokenizer_fingerprint"]
    if fingerprint is not None and fingerprint != built_with:
        raise ValueError(
            f"{path}: the store was built with tokenizer {built_with[:12]}, the run's tokenizer is {fingerprint[:12]}"
        )
    largest = manifest["counts"]["largest_id"]
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(f"{path}: the store holds token id {largest} but the vocabulary has {vocab_size} ids")
    for suffix, size in manifest["file_sizes"].items():
        file = Path(prefix + suffix)
        if not file.is_file():
            raise ValueError(f"{file}: missing, {path} says that it has {size} bytes")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, but {Path(path).name} says {size}")
