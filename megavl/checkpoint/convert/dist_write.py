"""Write a checkpoint of megatron-core without a process group and without holding it in memory.

In: named lazy tensors. Out: the `.distcp` files, torch's index and megatron-core's marker, as `dist_checkpointing.load`
wants them under any layout. megatron-core's writer wants every tensor in memory before it starts; here each of a few
threads reads the next piece of a tensor, lets `torch.save` append it to the thread's file, and forgets it.
"""

import io
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megavl.checkpoint.convert.formats import Progress
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.safetensors_file import pieces
from megavl.checkpoint.folder import BACKEND, MARKER, write_durably

THREADS = 3
"""Files written at a time."""
PIECE_BYTES = 128 << 20
"""Rows are saved in pieces of about this size; a thread holds one at a time."""


def write_tensors(folder: Path, tensors: Mapping[str, LazyTensor], progress: Progress) -> None:
    """Write everything but what training adds; the marker last.

    Args:
        folder: existing, empty or with other files of the checkpoint.
        tensors: by their names in the checkpoint, read in this order.
        progress: told the bytes of each piece.

    Raises:
        CheckpointError: a tensor cannot be read.
        OSError: the file system refused.
    """
    written = [_Piece(name, tensors[name], first, stop) for name, first, stop in pieces(tensors, PIECE_BYTES)]
    queue, lock, stop = iter(written), threading.Lock(), threading.Event()

    def take() -> "_Piece | None":
        with lock:
            return None if stop.is_set() else next(queue, None)

    def write_file(number: int) -> list[WriteResult]:
        results, name = [], file_name(number)
        with (folder / name).open("wb") as stream:
            while (piece := take()) is not None:
                try:
                    results.append(_append(piece, stream, name))
                except BaseException:
                    stop.set()
                    raise
                progress(piece.nbytes)
        return results

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(write_file, range(THREADS)))
    nothing = io.BytesIO()
    torch.save({}, nothing)  # megatron-core asks for the file; all that we save besides tensors is JSON
    write_durably(folder / COMMON_STATE_FNAME, nothing.getvalue())
    FileSystemWriter(folder).finish(_index(written, tensors), results)
    write_durably(folder / MARKER, json.dumps(BACKEND))


def file_name(number: int) -> str:
    """The file of one thread, named as training names that of one rank."""
    return f"__{number}_0.distcp"


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor."""

    name: str
    tensor: LazyTensor
    first: int
    stop: int

    @property
    def index(self) -> MetadataIndex:
        """The name under which the index knows it."""
        return MetadataIndex(self.name, self.offsets)

    @property
    def offsets(self) -> torch.Size:
        """Where in the tensor it starts."""
        rank = len(self.tensor.shape)
        return torch.Size([self.first, *[0] * (rank - 1)] if rank else [])

    @property
    def sizes(self) -> torch.Size:
        """Its shape."""
        return torch.Size([self.stop - self.first, *self.tensor.shape[1:]] if self.tensor.shape else [])

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.sizes.numel() * self.tensor.dtype.itemsize


def _append(piece: _Piece, stream: io.BufferedWriter, name: str) -> WriteResult:
    """Write one piece behind the others of a file."""
    start = stream.tell()
    try:
        torch.save(piece.tensor.read(piece.first, piece.stop), stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides what the file system said behind "unexpected pos"
            raise error.__context__ from None
        raise
    length = stream.tell() - start
    return WriteResult(piece.index, length, _StorageInfo(name, start, length))


def _index(written: list[_Piece], tensors: Mapping[str, LazyTensor]) -> Metadata:
    """torch's description of all tensors; where they lie comes from the results of writing."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for piece in written:
        chunks.setdefault(piece.name, []).append(ChunkStorageMetadata(piece.offsets, piece.sizes))
    entries = {
        name: TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks[name])
        for name, tensor in tensors.items()
    }
    return Metadata(dict(entries))
