"""The steps of a run: batch, step, report, and now and then a held-out measurement or a checkpoint.

In: a built `Run` and the step to start from. Out: a trained model, checkpoints, metrics, and why the loop ended. All
ranks take the same way through this file: what differs between them (signals, clocks, bad images) is exchanged once a
step, and everything decided from the totals.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megavl.checkpoint.writer import CheckpointWriter
from megavl.config import Modality, Recipe
from megavl.data.microbatch import StepBatch
from megavl.parallel.gradients import unwrap
from megavl.parallel.groups import Groups
from megavl.parallel.vision_ahead import AheadEncoder
from megavl.training.freeze import trained_components
from megavl.training.metrics import Metrics, StepRecord
from megavl.training.rank_report import StepTotals, exchange, report
from megavl.training.schedule import learning_rate
from megavl.training.step import StepResult, train_step
from megavl.training.step_clock import StepClock
from megavl.training.stopping import RunStoppedError, StopRequest
from megavl.training.throughput import head_skips_unlabelled, step_counts, throughput


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the loop needs, as built by `train.py`."""

    recipe: Recipe
    """The settings."""
    groups: Groups
    """This rank's place."""
    chunks: Sequence[DistributedDataParallel]
    """Wrapped stages."""
    optimizer: Any
    """From `make_optimizer`."""
    saver: CheckpointWriter
    """Writes checkpoints."""
    metrics: Metrics | None
    """The reports; on rank 0 only."""
    measure: Callable[[], dict[str, dict[str, float]]] | None
    """Held-out loss, ppl and tokens by source; None without validation sources."""
    stop: StopRequest
    """Signals to this process."""
    encoder: AheadEncoder | None
    """Runs frozen towers before the schedule, where the placement says so."""
    peak: float | None
    """Peak operations per second of a device, where known."""


def run_steps(run: Run, batches: Iterator[StepBatch], start: int) -> int:
    """Train until the last step or until asked to stop; all ranks must call it. The state is saved at the end.

    Args:
        run: the run.
        batches: this rank's batches from `start` on.
        start: first step; what came before is in the loaded checkpoint.

    Returns:
        Steps done; fewer than `stage.steps` if the run was asked to stop.

    Raises:
        RunStoppedError: too many steps in a row without a finite loss, or too many undecodable samples; on all ranks.
    """
    recipe, steps = run.recipe, run.recipe.stage.steps
    validated, costs = _validated(run), _Costs(run)
    reader = _Reader(batches, early=run.encoder is not None)
    guard, saved_at, clock = _Guard(recipe), start, time.monotonic()
    step = start
    stop = False
    while step < steps and not stop:
        if _validation_due(recipe, step) and step not in validated:
            _validate(run, step)
            costs.clock.read()  # what the measurement took is not the next step's
        late = recipe.checkpoint.every_minutes > 0 and time.monotonic() - clock > 60 * recipe.checkpoint.every_minutes
        try:
            totals = _one_step(run, reader, step, guard, costs, save=late)
        except RunStoppedError:  # on every rank, so a checkpoint that is still being written can be completed
            run.saver.finish()
            raise
        step, stop, stepped = step + 1, totals.stop, time.monotonic()
        run.saver.poll()
        every = recipe.checkpoint.every_steps
        if totals.save or (every and step % every == 0):
            _save(run, step, background=recipe.checkpoint.background)
            saved_at, clock = step, time.monotonic()
        costs.saving = time.monotonic() - stepped
    if saved_at != step:
        _save(run, step, background=False)
    run.saver.finish()
    if step >= steps and run.measure is not None and step not in validated:
        _validate(run, step)
    return step


class _Costs:
    """What the loop knows of a step's cost beside its clock time."""

    def __init__(self, run: Run) -> None:
        self.clock = StepClock(run.groups.device)
        self.clock.attach(run.chunks)
        everyone: list[Any] = [None] * run.groups.world_size
        dist.all_gather_object(everyone, trained_components(unwrap(run.chunks)), group=run.groups.gloo_world)
        self.trained = set().union(*everyone)
        """Components of which something is trainable, on whichever rank."""
        dtype = next(run.chunks[0].parameters()).dtype
        self.head_skips = head_skips_unlabelled(run.recipe, run.groups.device, dtype)
        """Whether positions without a label are not computed by the head."""
        self.saving = 0.0
        """Seconds that saving held up training since the last step."""


class _Reader:
    """Batches in order, and that of the next step beside each where its images are begun early."""

    def __init__(self, batches: Iterator[StepBatch], *, early: bool) -> None:
        self._batches, self._early = batches, early
        self._upcoming: StepBatch | None = None

    def read(self) -> tuple[StepBatch, StepBatch | None]:
        """The batch of a step, and that of the next if `early` and there is one. Waits for both."""
        batch = next(self._batches) if self._upcoming is None else self._upcoming
        self._upcoming = next(self._batches, None) if self._early else None
        return batch, self._upcoming


def _one_step(run: Run, reader: _Reader, step: int, guard: "_Guard", costs: _Costs, *, save: bool) -> StepTotals:
    """Read, compute, update, report."""
    recipe, began = run.recipe, time.monotonic()
    batch, upcoming = reader.read()
    waited = time.monotonic() - began
    assert batch.step == step, f"batch of step {batch.step} in step {step}"
    optim, steps = recipe.optim, recipe.stage.steps
    lr = learning_rate(optim, steps, step)
    vision_lr = None if optim.vision_lr is None else learning_rate(optim, steps, step, optim.vision_lr)
    result = train_step(
        run.chunks,
        run.optimizer,
        batch,
        run.groups,
        lr=lr,
        vision_lr=vision_lr,
        encoder=run.encoder,
        upcoming=upcoming,
    )
    mine = report(
        batch,
        run.groups,
        stop=bool(run.stop.signal),
        save=save and run.groups.rank == 0,
        data_wait_s=waited,
        parts=costs.clock.read(),
        memory=costs.clock.peak_memory(),
    )
    totals = exchange(mine, run.groups)
    if totals.failed:
        _tell_failed(run, batch)
    guard.count(result, totals)
    if run.metrics is not None:
        run.metrics.step(_record(run, batch, result, totals, costs, lr, guard.failed, time.monotonic() - began))
        if result.skipped:
            run.metrics.note(f"step {step + 1}: the update was skipped, {result.skipped}")
    guard.check()
    return totals


class _Guard:
    """Counts what may go wrong a few times and must not go wrong for ever. The counts are equal on all ranks."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.failed = 0
        self._in_a_row = 0
        self._reason = ""

    def count(self, result: StepResult, totals: StepTotals) -> None:
        """Add one step."""
        self.failed += totals.failed
        bad = bool(result.skipped) and result.supervised_tokens > 0  # a step without labels is empty, not broken
        self._in_a_row = self._in_a_row + 1 if bad else 0
        self._reason = result.skipped

    def check(self) -> None:
        """Stop the run past a limit."""
        limit = self._recipe.stage.max_nonfinite
        if self._in_a_row >= limit:
            raise RunStoppedError(
                f"stopped after {self._in_a_row} steps in a row without a finite loss and gradient "
                f"(stage.max_nonfinite {limit}): {self._reason}; the last checkpoint is untouched"
            )
        allowed = self._recipe.data.max_failed_samples
        if self.failed > allowed:
            raise RunStoppedError(
                f"stopped: {self.failed} images could not be decoded, data.max_failed_samples allows {allowed}; "
                "log.txt names them"
            )


def _record(
    run: Run,
    batch: StepBatch,
    result: StepResult,
    totals: StepTotals,
    costs: _Costs,
    lr: float,
    failed: int,
    seconds: float,
) -> StepRecord:
    """The line of one step."""
    losses = {m: result.loss_sums[m] / n if n else None for m, n in result.loss_tokens.items()}
    counts, padded = step_counts(result, totals, head_skips=costs.head_skips)
    speed = throughput(
        run.recipe.model,
        run.recipe.parallel,
        costs.trained,
        counts=counts,
        padded=padded,
        seconds=seconds,
        ranks=run.groups.world_size,
        peak=run.peak,
    )
    return StepRecord(
        step=batch.step,
        modality=_modality(batch, run.recipe),
        loss=result.loss,
        loss_language=losses["language"],
        loss_multimodal=losses["multimodal"],
        tokens=result.tokens,
        supervised_tokens=result.supervised_tokens,
        images=result.images,
        images_spread=totals.images_spread,
        grad_norm=result.grad_norm,
        grad_norms=result.grad_norms,
        lr=lr,
        step_time_s=seconds,
        data_wait_s=totals.data_wait_s,
        skipped=bool(result.skipped),
        language_rows=batch.language_rows,
        rows=run.recipe.stage.global_batch,
        failed_samples=failed,
        parts={**totals.parts, "checkpoint": costs.saving},
        bubble=totals.bubble,
        memory_gib=totals.memory / 2**30,
        **asdict(speed),
    )


def _modality(batch: StepBatch, recipe: Recipe) -> Modality | None:
    """The one modality of a whole global step."""
    if batch.language_rows == recipe.stage.global_batch:
        return "language"
    return "multimodal" if batch.language_rows == 0 else None


def _tell_failed(run: Run, batch: StepBatch) -> None:
    """Name the samples of this step that could not be decoded, on the rank that writes the log."""
    everyone: list[Any] = [None] * run.groups.world_size
    dist.all_gather_object(everyone, batch.failed, group=run.groups.gloo_world)
    if run.metrics is not None:
        for sentence in (sentence for of_rank in everyone for sentence in of_rank):
            run.metrics.note(f"step {batch.step + 1}: {sentence}; the background colour takes its place")


def _save(run: Run, step: int, *, background: bool) -> None:
    run.saver.save(step, run.chunks, run.optimizer, {}, background=background)


def _validated(run: Run) -> frozenset[int]:
    """Steps whose held-out results are already in the metrics file, from the rank that reads it."""
    message = [run.metrics.validated if run.metrics is not None else None]
    dist.broadcast_object_list(message, src=0, group=run.groups.gloo_world)
    assert message[0] is not None
    return message[0]


def _validation_due(recipe: Recipe, step: int) -> bool:
    every = recipe.logging.validate_every
    return bool(recipe.data.validation and every and step and step % every == 0)


def _validate(run: Run, step: int) -> None:
    assert run.measure is not None
    results = run.measure()
    if run.metrics is not None:
        run.metrics.validation(step, results)
