"""Write the rank files of a layout, reading every source tensor once and holding a few of its rows.

In: lazy tensors by full name and where they lie under a layout. Out: one file of `torch.save` per rank. torch writes
each file with room for its values but without them; then threads read rows of a tensor and put each rank's part of
them where torch left room for it.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megavl.checkpoint.convert.file_ranges import bytes_of
from megavl.checkpoint.convert.formats import Progress
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.rank_layout import Slab
from megavl.checkpoint.convert.safetensors_file import pieces
from megavl.checkpoint.convert.torch_file import find_records

THREADS = 3
"""Pieces read and written at a time."""
PIECE_BYTES = 64 << 20
"""Rows are read in pieces of about this size; a thread holds one and a rank's part of it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's part of one source tensor."""

    source: LazyTensor
    """The full tensor."""
    slabs: list[Slab]
    """Which of its rows and columns."""
    shape: tuple[int, ...]
    """Shape of the part."""


@dataclass(frozen=True)
class _Room:
    """Where a part's values belong."""

    part: Part
    file: int
    offset: int


def write_rank_files(files: dict[Path, dict[str, Any]], progress: Progress) -> None:
    """Write every file.

    Args:
        files: path -> what the file holds: nested dicts of plain values, with a `Part` for every tensor.
        progress: told the bytes of each part of a piece.

    Raises:
        CheckpointError: a tensor cannot be read.
        OSError: the file system refused.
    """
    with ExitStack() as stack:
        rooms: dict[int, list[_Room]] = {}
        for path, content in files.items():
            offsets = _write_without_values(path, content)
            file = os.open(path, os.O_WRONLY)
            stack.callback(os.close, file)
            for part, offset in offsets:
                rooms.setdefault(id(part.source), []).append(_Room(part, file, offset))
        sources = {str(key): of_source[0].part.source for key, of_source in rooms.items()}
        cut = pieces(sources, PIECE_BYTES)
        _in_threads(((rooms[int(key)], first, stop) for key, first, stop in cut), progress)


def _write_without_values(path: Path, content: dict[str, Any]) -> list[tuple[Part, int]]:
    """Let torch write everything but the values; each part, and the byte at which its values belong."""
    parts: list[Part] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with FakeTensorMode():
        described = _with_fake_tensors(content, parts)
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(described, path)
    except RuntimeError as error:  # all that torch says of what the file system refused
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from None
    with path.open("rb") as stream:
        found = find_records(stream, str(path))
    records = [found[f"data/{number}"] for number in range(len(parts))]  # torch numbers storages as it meets them
    for part, record in zip(parts, records, strict=True):
        needed = torch.Size(part.shape).numel() * part.source.dtype.itemsize
        assert record.nbytes == needed, f"{path} has room for {record}, {part.source.source} needs {needed} bytes"
    return [(part, record.offset) for part, record in zip(parts, records, strict=True)]


def _with_fake_tensors(value: Any, parts: list[Part]) -> Any:
    """`value` with a tensor without memory for every part, which are collected in the order of torch's pickling."""
    if isinstance(value, Part):
        parts.append(value)
        return torch.empty(value.shape, dtype=value.source.dtype)
    if isinstance(value, dict):
        return {key: _with_fake_tensors(item, parts) for key, item in value.items()}
    return value


def _in_threads(work: Iterator[tuple[list[_Room], int, int]], progress: Progress) -> None:
    """Copy all pieces; the first error stops every thread."""
    lock, stop = threading.Lock(), threading.Event()

    def copy_all() -> None:
        while not stop.is_set():
            with lock:
                piece = next(work, None)
            if piece is None:
                return
            try:
                _copy(*piece, progress)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(THREADS) as pool:
        for worker in [pool.submit(copy_all) for _ in range(THREADS)]:
            worker.result()


def _copy(rooms: list[_Room], first: int, stop: int, progress: Progress) -> None:
    """Read rows of one source tensor and write what each rank has of them."""
    rows = rooms[0].part.source.read(first, stop)
    for room in rooms:
        for slab in room.part.slabs:
            met = slab.meet(first, stop)
            if met is None:
                continue
            mine = rows[met.first - first : met.stop - first] if rows.dim() else rows
            mine = mine if met.columns is None else mine[:, met.columns].contiguous()
            row = torch.Size(room.part.shape[1:]).numel() * mine.dtype.itemsize
            _write(room.file, room.offset + met.local * row, mine)
            progress(mine.nbytes)


def _write(file: int, offset: int, values: Tensor) -> None:
    """All bytes of a contiguous tensor."""
    left = bytes_of(values)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
