"""Bytes of a file into fresh memory, by `preadv`: unlike a memory map, what was read does not stay in memory.

In: a file, an offset, a number of bytes. Out: a tensor that owns its memory.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from megavl.checkpoint.folder import CheckpointError


def read_values(path: Path, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """Read `count` values of `dtype` from byte `offset` on, as a tensor of one dimension.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    values = torch.empty(count, dtype=dtype)
    buffer = bytes_of(values)
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(buffer):  # one call moves at most 2 GiB
                step = os.preadv(handle, [buffer[done:]], offset + done)
                if step == 0:
                    raise CheckpointError(f"{path}: ends after {offset + done:,} bytes, tensors reach further")
                done += step
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return values


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
