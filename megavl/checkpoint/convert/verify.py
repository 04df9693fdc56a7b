"""Whether two checkpoints hold the same: names, shapes, types, and a hash of every tensor.

In: two `Contents`, in whatever formats they lie. Out: hashes and counts of NaN, or the first difference.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.file_ranges import bytes_of
from megavl.checkpoint.convert.formats import Progress
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.safetensors_file import pieces
from megavl.checkpoint.folder import CheckpointError

_THREADS = 2
_NAN_BLOCK = 1 << 16
"""Values looked at together, so that what is made of them stays in the cache."""


@dataclass(frozen=True)
class Digest:
    """What one pass over a tensor tells."""

    sha256: str
    """Of its values, row after row."""
    nan: int
    """Values that are not a number."""


def all_tensors(contents: Contents) -> Iterator[tuple[str, LazyTensor]]:
    """Weights, unused tensors and optimizer state, under names that do not collide."""
    yield from contents.tensors.items()
    for name, tensor in contents.unused.items():
        yield f"unused {name}", tensor
    for name, tensor in (contents.training.optimizer if contents.training else {}).items():
        yield f"optimizer {name}", tensor


def digest(tensor: LazyTensor, progress: Progress = lambda _: None) -> Digest:
    """Read a tensor once."""
    hashed, nan = hashlib.sha256(), 0
    for _, first, stop in pieces({"": tensor}):
        values = tensor.read(first, stop)
        hashed.update(bytes_of(values))
        if values.is_floating_point():
            nan += sum(int(torch.isnan(block).sum()) for block in values.flatten().split(_NAN_BLOCK))
        progress(values.nbytes)
    return Digest(hashed.hexdigest(), nan)


def first_difference(ours: Contents, theirs: Contents) -> str | None:
    """The first tensor that differs by name, shape or type, in words; None: none does. Reads no value."""
    left, right = dict(all_tensors(ours)), dict(all_tensors(theirs))
    for name in [*left, *(name for name in right if name not in left)]:
        if name not in right or name not in left:
            return f"{name} is on one side only"
        if (left[name].shape, left[name].dtype) != (right[name].shape, right[name].dtype):
            mine, other = (f"{side[name].dtype} {side[name].shape}" for side in (left, right))
            return f"{name} is {mine} on one side and {other} on the other"
    return None


def compare(source: Contents, target: Contents, progress: Progress) -> dict[str, Any]:
    """Hold what was written against what it was made of.

    Returns:
        `sha256` by name, and `nan`, the tensors that hold values that are not a number, with how many.

    Raises:
        CheckpointError: they differ; the first tensor is named.
    """
    difference = first_difference(source, target)
    if difference is None and _steps(source) != _steps(target):
        difference = f"the step is {_steps(source)} on one side and {_steps(target)} on the other"
    if difference:
        raise CheckpointError(f"what was written is not the source: {difference}")
    written = dict(all_tensors(target))

    def check(item: tuple[str, LazyTensor]) -> tuple[str, Digest]:
        name, tensor = item
        found, expected = digest(written[name]), digest(tensor, progress)
        if found != expected:
            raise CheckpointError(f"what was written is not the source: {name} has other values ({tensor.source})")
        return name, expected

    pool = ThreadPoolExecutor(_THREADS)
    try:
        digests = dict(pool.map(check, all_tensors(source)))
    finally:
        pool.shutdown(cancel_futures=True)
    return {
        "sha256": {name: found.sha256 for name, found in digests.items()},
        "nan": {name: found.nan for name, found in digests.items() if found.nan},
    }


def _steps(contents: Contents) -> tuple[int, int] | None:
    return (contents.training.step, contents.training.adam_step) if contents.training else None
