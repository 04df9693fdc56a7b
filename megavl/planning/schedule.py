"""The order in which a pipeline rank works: megatron-core's 1F1B and interleaved schedules, as lists.

In: rank, pipeline size, chunks per rank, micro-batches. Out: the rank's forward and backward passes in order, and what
it holds between the two.
Shapes: m micro-batches, s stages; stage s lies on rank s % pipeline, chunk s // pipeline.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Task(NamedTuple):
    """One pass of one chunk."""

    backward: bool
    micro_batch: int
    chunk: int


def warmup_passes(rank: int, pipeline: int, virtual: int, micro_batches: int) -> int:
    """Forward passes of a rank before it alternates with backward passes."""
    if virtual == 1:
        return min(pipeline - rank - 1, micro_batches)
    return min(2 * (pipeline - rank - 1) + (virtual - 1) * pipeline, virtual * micro_batches)


def rank_tasks(rank: int, pipeline: int, virtual: int, micro_batches: int) -> list[Task]:
    """All passes of a rank in order.

    Args:
        rank: pipeline rank.
        pipeline: pipeline ranks.
        virtual: chunks per rank.
        micro_batches: of one step; with several chunks a multiple of `pipeline`.
    """
    passes = [
        (micro_batch, chunk)
        for start in range(0, micro_batches, pipeline if virtual > 1 else micro_batches)
        for chunk in range(virtual)
        for micro_batch in range(start, min(start + (pipeline if virtual > 1 else micro_batches), micro_batches))
    ]
    forward = [Task(False, m, c) for m, c in passes]
    backward = [Task(True, m, virtual - 1 - c) for m, c in passes]
    warmup = warmup_passes(rank, pipeline, virtual, micro_batches)
    steady = [task for pair in zip(forward[warmup:], backward, strict=False) for task in pair]
    return [*forward[:warmup], *steady, *backward[len(forward) - warmup :]]


def peak_held(rank: int, pipeline: int, virtual: int, sizes: Sequence[Sequence[float]]) -> float:
    """Most that a rank holds at one time for passes whose backward pass is to come; the order alone decides it.

    Args:
        rank: pipeline rank.
        pipeline: pipeline ranks.
        virtual: chunks per rank.
        sizes: [m][s] what stage s keeps of micro-batch m between its two passes, such as bytes of activations.
    """
    held, highest = 0.0, 0.0
    for task in rank_tasks(rank, pipeline, virtual, len(sizes)):
        size = sizes[task.micro_batch][task.chunk * pipeline + rank]
        held += -size if task.backward else size
        highest = max(highest, held)
    return highest
