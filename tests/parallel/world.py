"""A world of CPU processes that many tests share: importing megatron-core costs seconds, so it happens once.

In: a function (defined at the top level of an importable module) and its arguments. Out: what it returned on each rank.

    def sizes(parallel):                      # runs on every rank; forms its own groups, as a training process does
        groups = init_groups(parallel)
        return groups.data_size

    with World(4) as world:
        assert world.run(sizes, ParallelConfig(tensor=2)) == [2, 2, 2, 2]
        assert world.run(sizes, ParallelConfig(tensor=2), ranks=2) == [1, 1]

Before each call the ranks join a fresh `torch.distributed` world (gloo over a file, so no port can be taken), after it
they leave it again: calls share nothing but the imported modules. Arguments and results travel by pickle.
A rank that raises, dies or hangs fails the call with every traceback that is known; no call waits beyond its limit.
Workers that might be stuck are killed and started anew by the next call.
"""

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

COLLECTIVE_TIMEOUT_S = 180
"""A collective that waits longer than this raises on its rank: far beyond what a busy machine makes ranks wait."""

START_S = 600
"""Limit for starting the workers."""

GRACE_S = 5.0
"""After the first failure, how long the other ranks have to report theirs."""


class WorldError(RuntimeError):
    """A call failed on at least one rank; `errors` maps rank to traceback text."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())))


class World:
    """`size` worker processes, started by the first call; a context manager that ends them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int | None = None, timeout_s: float = 600
    ) -> list[Any]:
        """Call `function(*args)` on ranks 0 to ranks-1 of a fresh world of that size.

        Args:
            function: a module-level function; the tests' folder is importable in the workers.
            args: pickled once per rank.
            ranks: size of this call's world; all workers by default.
            timeout_s: limit for the whole call, in seconds.

        Returns:
            The results, by rank.

        Raises:
            WorldError: a rank raised, died, or did not answer in time.
        """
        ranks = self.size if ranks is None else ranks
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, connection) in enumerate(self._workers[:ranks]):
                connection.send_bytes(pickle.dumps((function, args, rank, ranks, str(Path(folder) / "store"))))
            results, errors, stuck = self._gather(ranks, timeout_s)
        if stuck:
            self.close()
        if errors:
            raise WorldError(errors)
        return [results[rank] for rank in range(ranks)]

    def close(self) -> None:
        """End the workers; a later call starts new ones."""
        for process, connection in self._workers:
            connection.close()  # an idle worker ends by itself when its pipe closes
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        """Spawn the workers, unless they run."""
        if self._workers:
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited: ranks share few cores
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name need not resolve
        for _ in range(self.size):
            ours, theirs = multiprocessing.Pipe()
            process = _context().Process(target=_work, args=(theirs,))  # no daemon: checkpoint tests fork writers
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for process, connection in self._workers:  # imports take a minute on a busy machine; not on the calls' account
            assert connection.poll(START_S), f"worker {process.pid} did not start within {START_S} s"
            connection.recv_bytes()

    def _gather(self, ranks: int, timeout_s: float) -> tuple[dict[int, Any], dict[int, str], bool]:
        """Collect answers: results by rank, tracebacks by rank, and whether some rank never answered."""
        pending = {connection: rank for rank, (_, connection) in enumerate(self._workers[:ranks])}
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        died = False
        deadline = time.monotonic() + timeout_s
        while pending and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(pending), timeout=left):
                assert isinstance(ready, Connection)
                rank = pending.pop(ready)
                try:
                    succeeded, answer = pickle.loads(ready.recv_bytes())
                except EOFError:
                    succeeded, answer, died = False, "the process died", True
                (results if succeeded else errors)[rank] = answer
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in pending.values():
            errors[rank] = "no answer in time" if not errors else "still running when another rank had failed"
        return results, errors, died or bool(pending)


def _context() -> Any:
    """How workers start: forked from a server that has imported megatron-core once, 8 s of computing for all worlds.

    With a GPU each starts anew, as a device that an import has touched does not survive a fork.
    """
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megavl.training.step"])
    with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):  # as in end_to_end/small_run.py
        forkserver.ensure_running()
    return context


def _work(connection: Connection) -> None:
    """A worker: serve calls until the pipe closes."""
    import torch
    import torch.distributed as dist

    import megavl.training.step  # noqa: F401  imports megatron-core, which takes seconds

    torch.set_num_threads(1)
    gc.freeze()  # what was imported need not be looked through when a call's groups are collected
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args, rank, ranks, store = pickle.loads(request)
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            )
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        _leave()
        connection.send_bytes(pickle.dumps(answer))


def _leave() -> None:
    """Take groups and world down, whatever state the call left them in."""
    from megavl.parallel.groups import destroy_groups

    try:
        destroy_groups()
    except Exception:  # the call's own answer says more than a failed farewell
        traceback.print_exc()
