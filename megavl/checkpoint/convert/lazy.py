"""Tensors that are described now and read later: what lets a 15 GB checkpoint pass through 1 GB of memory.

In: a checkpoint of any format. Out: `LazyTensor`s, which know shape and type at once and read values when a writer asks
for them, whole or some rows. Fusing, splitting, slicing and casting give lazy tensors again.

Shapes: r rows, the first dimension; a tensor without dimensions has one row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = Callable[[int, int], Tensor]
"""(first row, row after the last) -> those rows, contiguous, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor of some checkpoint."""

    shape: tuple[int, ...]
    """Full shape."""
    dtype: torch.dtype
    """Type of the values that `rows` gives."""
    rows: Rows
    """Reads a range of rows; the memory is the caller's."""
    source: str
    """Where it lies, for error messages: file and name."""

    @property
    def num_rows(self) -> int:
        """Rows that `rows` can be asked for."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows from `first` to before `stop` (None: the end), contiguous, on the CPU."""
        return self.rows(first, self.num_rows if stop is None else stop)


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The parts one below the other; a range of rows touches only the parts that it meets.

    Raises:
        ValueError: types or shapes beyond the first dimension differ.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{first.source} has {first.dtype} {first.shape} and {part.source} has {part.dtype} {part.shape}; "
                "they are parts of one tensor and must agree"
            )

    def rows(start: int, stop: int) -> Tensor:
        pieces, offset = [], 0
        for part in parts:
            low, high = max(start - offset, 0), min(stop - offset, part.num_rows)
            if low < high:
                pieces.append(part.read(low, high))
            offset += part.num_rows
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else first.read(0, 0)

    shape = (sum(part.num_rows for part in parts), *first.shape[1:])
    return LazyTensor(shape=shape, dtype=first.dtype, rows=rows, source=", ".join(p.source for p in parts))


def row_range(tensor: LazyTensor, first: int, stop: int) -> LazyTensor:
    """Some rows as a tensor of their own."""
    return LazyTensor(
        shape=(stop - first, *tensor.shape[1:]),
        dtype=tensor.dtype,
        rows=lambda low, high: tensor.read(first + low, first + high),
        source=tensor.source,
    )


def computed(
    parts: Sequence[LazyTensor], shape: Sequence[int], function: Callable[..., Tensor], dtype: torch.dtype | None = None
) -> LazyTensor:
    """`function` of the whole parts, computed anew for every read: for tensors that fit in memory several times.

    Args:
        parts: arguments of `function`.
        shape: shape of its result.
        function: from whole tensors to one tensor.
        dtype: type of its result; None: that of the first part.
    """
    return LazyTensor(
        shape=tuple(shape),
        dtype=dtype or parts[0].dtype,
        rows=lambda first, stop: _rows_of(function(*(part.read() for part in parts)), first, stop),
        source=", ".join(part.source for part in parts),
    )


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The values in another type; as it is where the type is the same already."""
    if tensor.dtype == dtype:
        return tensor
    rows = tensor.rows
    return LazyTensor(
        shape=tensor.shape, dtype=dtype, rows=lambda low, high: rows(low, high).to(dtype), source=tensor.source
    )


def in_memory(tensor: Tensor, source: str) -> LazyTensor:
    """A tensor that exists already."""
    return LazyTensor(
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        rows=lambda first, stop: _rows_of(tensor, first, stop),
        source=source,
    )


def _rows_of(tensor: Tensor, first: int, stop: int) -> Tensor:
    """Rows of a tensor in memory; all of it where it has no dimension."""
    return tensor[first:stop].contiguous() if tensor.dim() else tensor
