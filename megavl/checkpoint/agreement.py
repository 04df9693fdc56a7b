"""Errors that every rank raises together: one rank that stops alone leaves the others waiting in a collective.

In: what went wrong on this rank, or nothing. Out: the same `CheckpointError` on every rank, or on none.
"""

import errno
import logging
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megavl.checkpoint.folder import CheckpointError
from megavl.parallel.groups import Groups

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Run `action`; returns its result and no problem, or no result and the problem in words.

    Everything is caught, as the other ranks wait; what no user can have caused is logged with its traceback.
    """
    try:
        return action(), None
    except Exception as error:
        if not isinstance(error, OSError | CheckpointError):
            log.exception("a fault in megavl")
        return None, describe(error)


def describe(error: BaseException) -> str:
    """The sentence that tells a user of `error`."""
    if isinstance(error.__context__, OSError):  # torch.save hides what the file system said behind "unexpected pos"
        error = error.__context__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error})"
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def raise_together(problem: str | None, groups: Groups) -> None:
    """Raise on all ranks if any of them has a problem; every rank must call this.

    Raises:
        CheckpointError: the problem of the lowest rank that has one.
    """
    problems: list[str | None] = [None] * groups.world_size
    dist.all_gather_object(problems, problem, group=groups.gloo_world)
    for rank, found in enumerate(problems):
        if found is not None:
            raise CheckpointError(found if rank == 0 else f"{found} (rank {rank})")


def on_rank_zero(action: Callable[[], Result], groups: Groups) -> Result:
    """Run `action` on rank 0 and give its result to all; every rank must call this.

    Raises:
        CheckpointError: on all ranks, if the action failed.
    """
    result, problem = attempt(action) if groups.rank == 0 else (None, None)
    message = [result, problem]
    dist.broadcast_object_list(message, src=0, group=groups.gloo_world)
    if message[1] is not None:
        raise CheckpointError(message[1])
    return message[0]  # type: ignore[return-value]
