"""Write this rank's tensors to its file, in a forked process or in this one, and report where each of them lies.

In: megatron-core's write buckets (tensors on the CPU with their place in the checkpoint). Out: a file and a `Report`.
megatron-core's own function for this is not used: it starts two more processes per rank, hangs if one of them is
killed, needs a manager process per rank for its results (seconds, and the memory of another import of the program),
and an undeclared package. Planning, forking and waiting remain megatron-core's.
"""

import gc
import mmap
import os
import pickle
import signal
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megavl.checkpoint.agreement import describe

_LENGTH_BYTES = 8
_BYTES_PER_TENSOR = 2048
"""Room for the report on one tensor; one takes some 300 bytes."""


class Report:
    """What a writer says to its trainer: places of tensors, or a problem; in memory that a fork shares."""

    def __init__(self, tensors: int) -> None:
        self._memory = mmap.mmap(-1, 65536 + _BYTES_PER_TENSOR * tensors)

    def put(self, results: list[WriteResult] | str) -> None:
        """Store the writer's answer."""
        content = pickle.dumps(results)
        assert _LENGTH_BYTES + len(content) <= len(self._memory), f"a report of {len(content)} bytes"
        self._memory[_LENGTH_BYTES : _LENGTH_BYTES + len(content)] = content
        self._memory[:_LENGTH_BYTES] = len(content).to_bytes(_LENGTH_BYTES, "little")  # last: whole or none

    def get(self) -> list[WriteResult] | str:
        """The answer: results, or what went wrong; a writer that was killed has left none."""
        length = int.from_bytes(self._memory[:_LENGTH_BYTES], "little")
        if not length:
            return "the process that wrote the checkpoint in the background was killed"
        return pickle.loads(self._memory[_LENGTH_BYTES : _LENGTH_BYTES + length])  # our own memory, no file


def write_tensors(trainer: int, buckets: Sequence[Any], report: Report) -> None:
    """Write every bucket to its file and report; never raises.

    Args:
        trainer: process id of the trainer; if this is another process it was forked, and ends when the trainer ends.
        buckets: (path, file name, (objects, tensors)) for each file, from megatron-core's planning.
        report: receives the results.
    """
    forked = os.getpid() != trainer
    collecting = gc.isenabled()
    gc.disable()  # in a forked process, collecting tensors of the trainer's GPU would touch CUDA
    try:
        if forked:  # Ctrl-C and Slurm signal the whole process group: the trainer decides, the writer finishes
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report.put([result for bucket in buckets for result in _write_file(bucket, trainer if forked else None)])
    except BaseException as error:  # whatever it is, the trainer must hear of it
        report.put(describe(error))
    finally:
        if collecting:
            gc.enable()


def _write_file(bucket: Any, trainer: int | None) -> list[WriteResult]:
    """Write one bucket; `trainer` is the process without which there is no point in going on."""
    path, name, (objects, tensors) = bucket
    assert not objects, "we save no pickled objects"
    results = []
    with open(path, "wb") as stream:
        for item, tensor in tensors:
            if trainer is not None and os.getppid() != trainer:
                raise InterruptedError("the trainer has ended")
            start = stream.tell()
            torch.save(tensor, stream)
            length = stream.tell() - start
            results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        stream.flush()
        os.fsync(stream.fileno())
    return results
