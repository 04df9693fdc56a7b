"""The tensors of a megatron-core checkpoint, read row by row from where they lie in its files.

In: a folder with torch's index and `.distcp` files, saved under any layout. Out: full name -> `LazyTensor`. The index
says which chunks a tensor was saved in; each chunk is what `torch.save` wrote, at some place in a file. torch tells
where in it the values start, under its weights-only rules and without reading them, and rows are then read from there.

Shapes: a chunk is a box of the full tensor, given by offsets and sizes.
"""

import io
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megavl.checkpoint.convert.file_ranges import read_values
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.torch_file import find_records
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.index import INDEX, read_metadata, tensor_entries


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of the checkpoint; files are looked at but not read.

    Raises:
        CheckpointError: the index is none, its chunks do not make up the tensors, or a file is missing or too short.
    """
    metadata = read_metadata(folder)
    try:
        entries, places = tensor_entries(metadata), dict(metadata.storage_data)
        return {name: _tensor(name, entry, places, folder) for name, entry in entries.items()}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / INDEX}: not the index of a checkpoint, refused ({error})") from None


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor and the part of a file in which `torch.save` wrote it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    start: int
    length: int
    name: str

    def read(self, first: int, stop: int) -> Tensor:
        """Some rows of the chunk, counted in the chunk."""
        if self._values is None:  # saved with other strides than its shape has
            return _load(self)[first:stop].contiguous()
        row = math.prod(self.sizes[1:])
        values = read_values(
            self.path, self._values + first * row * self.dtype.itemsize, (stop - first) * row, self.dtype
        )
        return values.view(stop - first, *self.sizes[1:]) if self.sizes else values.view(())

    @cached_property
    def _values(self) -> int | None:
        """Where in the file the values start; None if they do not lie in order."""
        with FakeTensorMode():
            tensor = _load(self)
        found, listed = (tensor.dtype, tuple(tensor.shape)), (self.dtype, self.sizes)
        if found != listed:
            raise CheckpointError(f"{self.path}: {self.name} is {found[0]} {found[1]}, {INDEX} says {listed}")
        with _Part(self.path, self.start, self.length) as part:
            records = find_records(cast(BinaryIO, part), f"{self.path}: {self.name}")
        (record,) = (record for name, record in records.items() if name.startswith("data/"))
        needed = int(tensor.untyped_storage().nbytes())
        if record.nbytes != needed:
            raise CheckpointError(f"{self.path}: {self.name} needs {needed} bytes, {record.nbytes} are stored")
        if not tensor.is_contiguous():
            return None
        return self.start + record.offset + int(tensor.storage_offset()) * self.dtype.itemsize


class _Part(io.RawIOBase):
    """A part of a file as a file, for `torch.load`."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(self._length - self._position, 0)]
        count = os.preadv(self._file.fileno(), [room], self._start + self._position)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _load(chunk: _Chunk) -> Tensor:
    """The chunk as torch loads it: a description only where a `FakeTensorMode` is active."""
    try:
        with _Part(chunk.path, chunk.start, chunk.length) as part:
            tensor = torch.load(cast(BinaryIO, part), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{chunk.path}: {chunk.name} at byte {chunk.start} is no tensor ({reason})") from None
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{chunk.path}: {chunk.name} at byte {chunk.start} is a {type(tensor).__name__}")
    return tensor


def _tensor(name: str, entry: TensorStorageMetadata, places: Mapping[MetadataIndex, Any], folder: Path) -> LazyTensor:
    """One tensor of the index."""
    shape, dtype = tuple(entry.size), entry.properties.dtype
    chunks = []
    for box in entry.chunks:
        place = places.get(MetadataIndex(name, box.offsets))
        if place is None:
            raise CheckpointError(f"{folder / INDEX}: no place for {name} at {tuple(box.offsets)}")
        path = _file(folder, place.relative_path)
        chunk = _Chunk(tuple(box.offsets), tuple(box.sizes), dtype, path, place.offset, place.length, name)
        size = path.stat().st_size
        if not 0 <= chunk.start <= chunk.start + chunk.length <= size:
            raise CheckpointError(
                f"{path}: it has {size} bytes, {name} goes from byte {chunk.start} to {chunk.start + chunk.length}"
            )
        chunks.append(chunk)
    _check_cover(name, shape, chunks, folder)
    return LazyTensor(
        shape=shape,
        dtype=dtype,
        rows=lambda first, stop: _rows(shape, dtype, chunks, first, stop),
        source=f"{folder}: {name}",
    )


def _file(folder: Path, name: Any) -> Path:
    """A file of the checkpoint, in its folder."""
    path = folder / str(name)
    if path.name != name or path.is_symlink():
        raise CheckpointError(f"{folder / INDEX}: it names the file {name!r}, which is not one inside the folder")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, {INDEX} places tensors in it")
    return path


def _check_cover(name: str, shape: tuple[int, ...], chunks: Sequence[_Chunk], folder: Path) -> None:
    """Refuse chunks that do not make up the tensor exactly: they must be the cells of a grid, each once."""
    cells = 1
    for dim, size in enumerate(shape):
        spans = sorted({(c.offsets[dim], c.sizes[dim]) for c in chunks})
        cells *= len(spans)
        reached = 0
        for offset, extent in spans:
            if offset != reached or extent < 0:
                break
            reached += extent
        if reached != size:
            raise CheckpointError(
                f"{folder / INDEX}: the chunks of {name} do not fill dimension {dim}: {size} wide, chunks {spans[:8]}"
            )
    if len({c.offsets for c in chunks}) != cells or len(chunks) != cells:
        raise CheckpointError(f"{folder / INDEX}: {name} has {len(chunks)} chunks, {cells} make up its shape {shape}")


def _rows(shape: tuple[int, ...], dtype: torch.dtype, chunks: Sequence[_Chunk], first: int, stop: int) -> Tensor:
    """Rows of the full tensor, put together from the chunks that they meet."""
    if not shape:
        return chunks[0].read(0, 1)
    met = [c for c in chunks if c.offsets[0] < stop and first < c.offsets[0] + c.sizes[0]]
    if len(met) == 1:  # it holds these rows in full width
        return met[0].read(first - met[0].offsets[0], stop - met[0].offsets[0])
    result = torch.empty((stop - first, *shape[1:]), dtype=dtype)
    for chunk in met:
        low, high = max(first, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
        place = [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
        rows = chunk.read(low - chunk.offsets[0], high - chunk.offsets[0])
        result[(slice(low - first, high - first), *place)] = rows
    return result
