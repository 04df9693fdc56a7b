"""safetensors files, read and written a piece at a time.

In: a file, or lazy tensors. Out: lazy tensors, or a file, or shards with their index. The `safetensors` package maps a
file into memory to read it and wants every tensor in memory to write it; here a 15 GB checkpoint passes through a few
pieces of 64 MB. A header is checked before anything is read: what it says must fit the file exactly.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.checkpoint.convert.file_ranges import bytes_of, read_values
from megavl.checkpoint.convert.formats import Progress
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.folder import CheckpointError

PIECE = 64 << 20
"""Bytes that a writing thread holds at a time."""
SHARD = 5_000_000_000
"""Bytes of tensors per file of a sharded checkpoint, as the released ones have."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What transformers looks for."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_THREADS = 3


@dataclass(frozen=True)
class _Place:
    """A tensor in a file's header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    """Bytes after the header."""
    last: int


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a file, in the order in which they lie.

    Raises:
        CheckpointError: the file is truncated or its header does not describe it.
    """
    header, data = _read_header(path)
    header.pop("__metadata__", None)
    places = sorted((_place(path, name, entry) for name, entry in header.items()), key=lambda p: (p.first, p.last))
    for before, after in pairwise(places):
        if after.first < before.last:
            raise CheckpointError(
                f"{path}: {before.name} ends at byte {before.last:,} and {after.name} starts at {after.first:,}, "
                "tensors overlap"
            )
    size, described = path.stat().st_size - data, max((place.last for place in places), default=0)
    if size != described:
        raise CheckpointError(f"{path}: tensors take {described:,} bytes by the header, the file has {size:,} for them")
    return {place.name: _lazy(path, data, place) for place in places}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the byte at which tensors start."""
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(
                    f"{path}: a header of {length:,} bytes in a file of {size:,}, truncated or damaged"
                )
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a {type(header).__name__}, not a table of tensors")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return table


def _place(path: Path, name: str, entry: Any) -> _Place:
    """A header's entry, checked by itself."""
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header's entry {name} is not a type, a shape and two offsets") from None
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} is of type {dtype}, known are {', '.join(_DTYPES)}")
    if not whole:
        raise CheckpointError(f"{path}: {name} has shape {shape} and offsets {first}, {last}, not all whole numbers")
    needed = torch.Size(shape).numel() * _DTYPES[dtype].itemsize
    if last - first != needed:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} needs {needed:,} bytes, the header gives {last - first:,}"
        )
    return _Place(name, _DTYPES[dtype], shape, first, last)


def _lazy(path: Path, data: int, place: _Place) -> LazyTensor:
    shape, dtype = place.shape, place.dtype
    row = torch.Size(shape[1:]).numel()

    def rows(first: int, stop: int) -> Tensor:
        at = data + place.first + first * row * dtype.itemsize
        return read_values(path, at, (stop - first) * row, dtype).view((stop - first, *shape[1:]) if shape else ())

    return LazyTensor(shape=shape, dtype=dtype, rows=rows, source=f"{path.name}: {place.name}")


def plan_shards(tensors: Mapping[str, LazyTensor], limit: int = SHARD) -> dict[str, list[str]]:
    """Tensors by file, filled in order, none above `limit` bytes unless one tensor is.

    Returns:
        File name -> tensor names, as transformers calls and fills them.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{at:05d}-of-{count:05d}.safetensors": names for at, names in enumerate(shards, 1)}


def write_shards(tensors: Mapping[str, LazyTensor], folder: Path, progress: Progress, limit: int = SHARD) -> None:
    """One file, or several and `model.safetensors.index.json`.

    Raises:
        CheckpointError: the disk is full, or a source cannot be read.
    """
    shards = plan_shards(tensors, limit)
    for file, names in shards.items():
        write_safetensors({name: tensors[name] for name in names}, folder / file, progress)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(torch.Size(tensor.shape).numel() for tensor in tensors.values()),
                "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            },
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_safetensors(tensors: Mapping[str, LazyTensor], path: Path, progress: Progress) -> None:
    """Write a new file: the header, then pieces of rows at their offsets, by several threads; on disk on return.

    Raises:
        CheckpointError: the disk is full, or a source cannot be read.
    """
    header, places = _make_header(tensors)
    data = len(header)
    size = data + sum(tensor.nbytes for tensor in tensors.values())
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.posix_fallocate(handle, 0, size)  # a full disk shows now
            _write_at(handle, memoryview(header), 0)
            _write_pieces(handle, tensors, {name: data + at for name, at in places.items()}, progress)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written, {error.strerror} ({size:,} bytes needed)") from None


def _make_header(tensors: Mapping[str, LazyTensor]) -> tuple[bytes, dict[str, int]]:
    """The header with its length, and where each tensor starts after it; tensors begin at multiples of 8 bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    at = 0
    for name in sorted(tensors, key=lambda n: -tensors[n].dtype.itemsize):  # wide types first keep all of them aligned
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{tensor.source}: type {tensor.dtype} has no name in safetensors")
        places[name], last = at, at + tensor.nbytes
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, last]}
        at = last
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places


def _write_pieces(handle: int, tensors: Mapping[str, LazyTensor], places: dict[str, int], progress: Progress) -> None:
    """Read and write every piece; the first failure ends it."""

    def write(piece: tuple[str, int, int]) -> None:
        name, first, stop = piece
        tensor = tensors[name]
        values = tensor.read(first, stop)
        row_bytes = tensor.nbytes // max(tensor.num_rows, 1)
        _write_at(handle, bytes_of(values), places[name] + first * row_bytes)
        progress(values.nbytes)

    pool = ThreadPoolExecutor(_THREADS)
    try:
        for _ in pool.map(write, pieces(tensors)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def pieces(tensors: Mapping[str, LazyTensor], size: int = PIECE) -> Iterator[tuple[str, int, int]]:
    """Cut tensors into (name, first row, row after the last) of about `size` bytes."""
    for name, tensor in tensors.items():
        if tensor.nbytes:
            step = max(1, size * tensor.num_rows // tensor.nbytes)
            for first in range(0, tensor.num_rows, step):
                yield name, first, min(first + step, tensor.num_rows)


def _write_at(handle: int, content: memoryview, offset: int) -> None:
    """All bytes, at a position."""
    done = 0
    while done < len(content):  # one call moves at most 2 GiB
        done += os.pwrite(handle, content[done:], offset + done)
