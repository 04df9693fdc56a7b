"""Files that `torch.save` wrote (`.bin`, `.pth`, `.pt`), read tensor by tensor and without running what they contain.

In: a file. Out: the object in it, with a `LazyTensor` for every tensor. The object's structure is read by torch with
`weights_only`, so a file that asks for anything but tensors and plain values is refused; the values stay on disk until
a lazy tensor is read. Views, shared and strided storages are read as what they show.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megavl.checkpoint.convert.file_ranges import read_values
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.folder import CheckpointError

_LOCAL_HEADER = 30
"""Bytes of a zip entry's header before the name; the lengths of name and extra field are its last four."""


class Record(NamedTuple):
    """Where one of its parts lies in a file of `torch.save`."""

    offset: int
    """Byte at which it starts."""
    nbytes: int
    """Its bytes."""


def read_torch_file(path: Path, allowed: Sequence[type] = ()) -> Any:
    """The object that `torch.save` wrote: dicts, lists and tuples as they are, tensors as `LazyTensor`.

    Args:
        path: a zip file of torch (1.6 or later).
        allowed: plain record classes that the file may refer to, besides what torch calls safe.

    Raises:
        CheckpointError: not such a file, damaged, or it asks for objects that only a trusted file may ask for.
    """
    records = _sizes_by_offset(path)
    try:
        with FakeTensorMode(), _only_safe(allowed):
            content = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}, which could run code" if asked else "its content is damaged"
        raise CheckpointError(f"{path}: refused, {what}") from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({str(error).splitlines()[0]})") from None
    return _with_lazy_tensors(content, path, path.name, records)


@contextmanager
def _only_safe(allowed: Sequence[type]) -> Iterator[None]:
    """Let torch take these classes only: importing megatron-core declares more of them safe for the whole process."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(allowed))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def find_records(stream: IO[bytes], where: str) -> dict[str, Record]:
    """Where everything in such a file lies. torch guesses the offsets from its own alignment; these are looked up.

    Args:
        stream: the file, or a part of one that is a whole file of `torch.save`.
        where: for error messages.

    Raises:
        CheckpointError: not such a file, or its values cannot be used as they lie.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{where}: its tensors are compressed, which torch.save never does")
            if any(e.filename.endswith("/byteorder") and archive.read(e) != b"little" for e in entries):
                raise CheckpointError(f"{where}: written on a machine of other byte order")
            records: dict[str, Record] = {}
            for entry in entries:
                stream.seek(entry.header_offset)
                name, extra = struct.unpack("<HH", stream.read(_LOCAL_HEADER)[-4:])
                offset = entry.header_offset + _LOCAL_HEADER + name + extra
                records[entry.filename.partition("/")[2]] = Record(offset, entry.file_size)
            return records
    except (zipfile.BadZipFile, struct.error, NotImplementedError):
        raise CheckpointError(
            f"{where}: truncated, or not a zip file of torch.save (a file of torch before 1.6 must be saved again)"
        ) from None


def _sizes_by_offset(path: Path) -> dict[int, int]:
    """Byte at which a storage starts in the file -> its bytes."""
    try:
        with path.open("rb") as stream:
            return {record.offset: record.nbytes for record in find_records(stream, str(path)).values()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _with_lazy_tensors(value: Any, path: Path, name: str, records: dict[int, int]) -> Any:
    """Replace every tensor; `name` says where `value` stands."""
    if isinstance(value, Tensor):
        return _lazy(value, path, name, records)
    if isinstance(value, Mapping):
        return {key: _with_lazy_tensors(item, path, f"{name}: {key}", records) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_with_lazy_tensors(item, path, f"{name}[{at}]", records) for at, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _lazy(tensor: Tensor, path: Path, name: str, records: dict[int, int]) -> LazyTensor:
    """A tensor of the file. `tensor` has its shape, strides and place in a storage, but no values."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{name}: a tensor of layout {tensor.layout}, only dense ones can be read")
    at: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[assignment]
    shape, strides, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    dtype, size = tensor.dtype, tensor.dtype.itemsize
    extent = _extent(shape, strides)
    if extent and (records.get(at, -1) < (offset + extent) * size):
        raise CheckpointError(
            f"{name}: needs {(offset + extent) * size:,} bytes at byte {at:,} of {path}, where "
            f"{records.get(at, 0):,} are stored"
        )

    def rows(first: int, stop: int) -> Tensor:
        part = (stop - first, *shape[1:]) if shape else ()
        start = offset + (first * strides[0] if shape else 0)
        values = read_values(path, at + start * size, _extent(part, strides), dtype)
        return values.as_strided(part, strides).contiguous()

    return LazyTensor(shape=shape, dtype=dtype, rows=rows, source=name)


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of the storage from the first of a tensor to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
