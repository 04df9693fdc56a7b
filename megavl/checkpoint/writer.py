"""Save the state of a run, in the background or not: complete or absent, and an error is everyone's error.

In: model chunks, optimizer, step and the caller's own values. Out: `checkpoints/step_.../` (see `folder.py`), in
megatron-core's `torch_dist` format, which loads under any layout.

A save has three parts. Planning and copying to the CPU happen while training waits; writing happens in a forked process
of each rank, which sees the memory as it was at the fork; completing (index, marker, rename, `latest`) happens in the
training process when all writers are done, on rank 0, and its outcome is told to all ranks.
"""

import io
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megavl.checkpoint import folder as folders
from megavl.checkpoint.agreement import attempt, on_rank_zero, raise_together
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.forked_write import Report, write_tensors
from megavl.checkpoint.optimizer_state import adam_step, optimizer_state
from megavl.checkpoint.side_files import add_side_files, keep_side_files
from megavl.checkpoint.state import RANDOM_KEY, layout_of, model_state, random_state_tensor
from megavl.parallel.gradients import synchronise_parameters
from megavl.parallel.groups import Groups
from megavl.parallel.random_state import capture_random_state

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves checkpoints of one run. Every method is called by all ranks, in the same order."""

    def __init__(
        self,
        checkpoints: Path,
        groups: Groups,
        keep: int,
        *,
        tokenizer: str = "",
        recipe: dict[str, Any] | None = None,
        init_from: str = "",
    ) -> None:
        """Open the folder, remove what a crash left in it, and keep what the checkpoints are to hand on.

        Args:
            checkpoints: the run's `checkpoints` folder; made by the first save.
            groups: this rank's groups.
            keep: complete checkpoints to keep.
            tokenizer: fingerprint of the run's tokenizer, kept with every checkpoint and compared on loading.
            recipe: the resolved recipe, kept with every checkpoint; values that JSON can hold.
            init_from: checkpoint whose side files are handed on while the run has none of its own.

        Raises:
            CheckpointError: the folder cannot be written to, or side files are damaged.
        """
        self.checkpoints, self.groups, self.keep = checkpoints, groups, keep
        self._about_run = {"tokenizer": tokenizer, "recipe": recipe or {}}
        self._queue = AsyncCallsQueue(persistent=False)
        for leftover in on_rank_zero(lambda: folders.remove_leftovers(checkpoints), groups):
            log.info("removed %s, left by an interrupted save", leftover)
        on_rank_zero(lambda: keep_side_files(checkpoints, init_from, tokenizer), groups)

    def save(
        self,
        step: int,
        chunks: Sequence[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        extra: dict[str, Any],
        *,
        background: bool,
    ) -> None:
        """Save the state after `step` steps; waits for the previous save first.

        Args:
            step: optimizer steps done.
            chunks: wrapped stages of this rank.
            optimizer: from `make_optimizer`.
            extra: what the caller wants back from `load`; values that JSON can hold.
            background: return as soon as the state is copied; `poll` or `finish` complete the save.

        Raises:
            CheckpointError: on all ranks, if the previous or this save failed; older checkpoints are untouched.
        """
        self.finish()
        if on_rank_zero(lambda: folders.is_complete(self.checkpoints / folders.step_name(step)), self.groups):
            return
        folder = on_rank_zero(lambda: folders.start_checkpoint(self.checkpoints, step), self.groups)
        try:
            request = self._plan(folder, step, chunks, optimizer, extra)
        except CheckpointError as error:
            raise self._abandon(folder, step, error) from None
        if background:
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def poll(self) -> None:
        """Complete a background save if all its writers are done; to be called in every step.

        Raises:
            CheckpointError: on all ranks, if the save failed.
        """
        self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background save and complete it.

        Raises:
            CheckpointError: on all ranks, if the save failed.
        """
        self._queue.maybe_finalize_async_calls(blocking=True)

    def _plan(
        self, folder: Path, step: int, chunks: Sequence[DistributedDataParallel], optimizer: Any, extra: dict[str, Any]
    ) -> AsyncRequest:
        """Decide who writes what, write the small files, and check that the disk can hold the rest."""
        groups = self.groups
        synchronise_parameters(chunks)
        model = model_state(chunks, groups)
        state = {
            "model": model,
            "optimizer": optimizer_state(optimizer, model, groups, loading=False),
            RANDOM_KEY: random_state_tensor(capture_random_state(), groups),
        }
        sharded, common = save_preprocess({k: v for k, v in state.items() if v}, validate_access_integrity=True)
        assert not list(nested_values(common)), f"nothing but tensors is saved, found {common}"
        strategy = _Strategy()
        request = strategy.async_save(sharded, str(folder))
        description = {
            "format": 1,
            "step": step,
            "adam_step": adam_step(optimizer, groups),
            "layout": layout_of(groups),
            "extra": extra,
            **self._about_run,
        }

        nothing = io.BytesIO()
        torch.save({}, nothing)  # megatron-core asks for the file; all that we save besides tensors is JSON

        def write_small_files() -> None:
            folders.check_space(folder, needed)
            folders.write_state(folder, description)
            add_side_files(self.checkpoints, folder)
            folders.write_durably(folder / COMMON_STATE_FNAME, nothing.getvalue())

        needed = _total_bytes(strategy.buckets, groups)
        on_rank_zero(write_small_files, groups)
        request.add_finalize_fn(partial(self._complete, folder, step, strategy))
        return request

    def _complete(self, folder: Path, step: int, strategy: "_Strategy") -> None:
        """Index, marker, rename and `latest`, if every rank has written its part; else remove all of it."""
        groups = self.groups
        answer = strategy.report.get() if strategy.buckets else []
        try:
            raise_together(answer if isinstance(answer, str) else None, groups)
            results: list[Any] = [None] * groups.world_size
            dist.gather_object(answer, results if groups.rank == 0 else None, group=groups.gloo_world)

            def complete() -> Path:
                strategy.write_index(results)
                return folders.complete_checkpoint(folder, step)

            saved = on_rank_zero(complete, groups)
        except CheckpointError as error:
            raise self._abandon(folder, step, error) from None
        if groups.rank == 0:
            log.info("saved %s", saved)
            _, problem = attempt(lambda: folders.remove_old(self.checkpoints, self.keep))
            if problem:
                log.warning("old checkpoints were not removed: %s", problem)

    def _abandon(self, folder: Path, step: int, error: CheckpointError) -> CheckpointError:
        """Give the space of a failed save back; returns the sentence about it."""
        if self.groups.rank == 0:
            folders.abandon_checkpoint(folder)
        return CheckpointError(f"{self.checkpoints}: saving step {step} failed, {error}")


def _total_bytes(buckets: Sequence[Any], groups: Groups) -> int:
    """Bytes that all ranks are going to write."""
    tensors = (tensor for _, _, (_, tensors) in buckets for _, tensor in tensors)
    total = torch.tensor([sum(tensor.numel() * tensor.element_size() for tensor in tensors)])
    dist.all_reduce(total, group=groups.gloo_world)
    return int(total)


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's way of saving with our own function for the writing and our own completion."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        # The stock writer starts a process here to hand back its results; ours uses a `Report`.
        filesystem_async._results_queue = filesystem_async._results_queue or object()

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        """The request that megatron-core schedules."""
        self._writer, self._metadata = writer, planned[1]
        self.buckets = writer.write_buckets
        self.report = Report(sum(len(tensors) for _, _, (_, tensors) in self.buckets))
        if not self.buckets:
            return AsyncRequest(None, (), [])
        to_cpu = partial(writer.preload_tensors, self.buckets, True)
        return AsyncRequest(write_tensors, (os.getpid(), self.buckets, self.report), [], preload_fn=to_cpu)

    def write_index(self, results: list[Any]) -> None:
        """Write torch's index of the checkpoint; on rank 0, which alone has the metadata."""
        self._metadata.all_local_plans = None  # only of use to plan a later save from it
        self._writer.finish(self._metadata, results)
