"""Hold a layout against one process: loss, every gradient, gradient norm, parameters after each step.

In: sizes, training stage, optimizer settings and a few global batches. Out: by how much a layout differs from a plain
PyTorch loop on one rank: no schedule, no wrapper, `torch.optim.AdamW`, the mean over the global batch's labels.

A difference is relative and taken per tensor: max |a - b| / max |b|. Two things need care near zero:

- A tensor whose gradient is zero (a tower in a step without images) must be zero exactly; anything else counts as 1.
- A gradient that is small because large terms cancel carries the rounding of those terms. So the denominator is at
  least 1% of the largest gradient entry of the model; a factor of 2 on a tensor a thousand times smaller still shows,
  as 0.1. A single number (SAM's `hd_alpha`) is all one sum, with no larger entry beside it to set the scale, and was
  seen to be off by 1.03e-5 at 1%: for such tensors it is 10%.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megavl.checkpoint.reader import load
from megavl.checkpoint.writer import CheckpointWriter
from megavl.config import ParallelConfig
from megavl.data.microbatch import StepBatch
from megavl.model.shards import full_parameters, join_shards
from megavl.model.stage import Stage
from megavl.ops import PLAIN, Ops
from megavl.parallel.gradients import replicas_differ, synchronise_parameters, wrap_stages
from megavl.parallel.groups import Groups
from megavl.parallel.vision_ahead import AheadEncoder, make_ahead_encoder
from megavl.training.diagnosis import Scene, collect_clues, diagnose, gather_objects, layer_order
from megavl.training.freeze import frozen_components
from megavl.training.optimizer import make_optimizer
from megavl.training.reference_steps import Question, StepRecord, build_frozen
from megavl.training.step import StepResult, train_step
from megavl.training.synthetic_batches import share

TOLERANCE = 1e-5
"""Relative, fp32."""


@dataclass(frozen=True, kw_only=True)
class StepDifference:
    """A layout's step beside the reference's, as relative differences."""

    loss: float
    grad_norm: float
    grad_norms: dict[str, float]
    """By component of the model."""
    gradients: dict[str, float]
    """By full name."""
    parameters: dict[str, float]
    """After the update, by full name; empty where overlapped gathering has not brought them up to date."""

    def worst(self) -> float:
        """The largest of all."""
        by_name = (self.grad_norms, self.gradients, self.parameters)
        return max(self.loss, self.grad_norm, *(value for kind in by_name for value in kind.values()))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All steps of a layout."""

    steps: list[StepDifference]
    missing: list[str]
    """Trainable parameters of the reference that no rank of the layout has, and the reverse."""
    drifted: list[str]
    """Replicated parameters that are not bit-equal over the tensor group after the last step."""
    first: str
    """The first tensor that differs, in the order of the model, and by how much; empty where all agree."""
    cause: str
    """The likely cause of that; empty where all agree."""


def run_layout(
    question: Question,
    parallel: ParallelConfig,
    groups: Groups,
    reference: Sequence[StepRecord],
    *,
    bucket_size: int | None = None,
    ops: Ops = PLAIN,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """The same steps under a layout, as a training run makes them; all ranks must call it.

    Args:
        question: what `reference` was run on.
        parallel: the layout that `groups` was formed for.
        groups: this rank's groups.
        reference: from `run_reference`.
        bucket_size: parameters per bucket of overlapped reduction.
        ops: fused operators of the layout; the reference has none.
        save_to: folder that gets a checkpoint before the last step.
        resume_from: such a folder, of any layout: start from there instead of the initial weights.
        tolerance: differences above it are looked into.

    Returns:
        The comparison, the same on every rank.
    """
    run = _start(question, parallel, groups, ops, bucket_size, resume_from)
    mine = [share(batch, groups.data_rank, groups.data_size) for batch in question.batches]
    batches = [StepBatch(step=s, language_rows=0, micro_batches=own) for s, own in enumerate(mine)]
    differences: list[StepDifference] = []
    first = cause = ""
    for step in range(run.step, len(reference)):
        expected = reference[step]
        if save_to is not None and step == len(reference) - 1:
            CheckpointWriter(save_to, groups, 1).save(step, run.chunks, run.optimizer, {}, background=False)
        lr, vision_lr = question.optim.lr, question.optim.vision_lr
        result = train_step(
            run.chunks,
            run.optimizer,
            batches[step],
            groups,
            lr=lr,
            vision_lr=vision_lr,
            encoder=run.encoder,
            upcoming=batches[step + 1] if step + 1 < len(reference) else None,
            force_all_reduce=True,
        )
        # Collecting parameters early would hide what overlapped gathering does; there the last step's are compared, and
        # the gradients of each step show whether it started from the right ones.
        parameters: dict[str, Tensor] = {}
        if not parallel.overlap_param_gather or step == len(reference) - 1:
            synchronise_parameters(run.chunks)
            parameters = {name: p.detach() for name, _, p in full_parameters(run.stages)}
        differences.append(_difference(run, result, parameters, expected, groups))
        if not first and differences[-1].worst() > tolerance:
            scene = _scene(run, result, parameters, expected, differences, question, groups, tolerance)
            first, cause = _first(scene, step), diagnose(scene)
    wanted = set(reference[0].gradients), set(reference[0].parameters)
    missing = (wanted[0] ^ set(differences[0].gradients)) | (wanted[1] ^ set(differences[-1].parameters))
    drifted = gather_objects(replicas_differ(run.stages, groups.pg.tp), groups)
    return Comparison(
        steps=differences,
        missing=sorted(missing),
        drifted=sorted({n for d in drifted for n in d}),
        first=first,
        cause=cause,
    )


@dataclass(frozen=True, kw_only=True)
class _LayoutRun:
    """What a layout trains with."""

    stages: list[Stage]
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    gradients: dict[str, Tensor]
    """This rank's gradients of the last step, by full name."""
    encoder: AheadEncoder | None
    """What runs frozen towers before the schedule."""
    step: int
    """The first step."""


def _start(
    question: Question,
    parallel: ParallelConfig,
    groups: Groups,
    ops: Ops,
    bucket_size: int | None,
    resume_from: Path | None,
) -> _LayoutRun:
    """Build a layout with initial weights, or with those of a checkpoint (over others, so that all must be loaded)."""
    if resume_from is not None:
        question = replace(question, seed=question.seed + 1)
    stages = build_frozen(question, parallel, groups, ops)
    chunks = wrap_stages(stages, parallel, groups, bucket_size=bucket_size)
    optimizer = make_optimizer(chunks, question.optim, parallel, groups)
    step = 0 if resume_from is None else load(resume_from, chunks, optimizer, groups, seed=question.seed).step
    frozen = frozen_components(question.stage)
    return _LayoutRun(
        stages=stages,
        chunks=chunks,
        optimizer=optimizer,
        gradients=_record_gradients(stages),
        encoder=make_ahead_encoder(stages, question.model, parallel, groups, frozen=frozen, ops=ops),
        step=step,
    )


def _difference(
    run: _LayoutRun, result: StepResult, parameters: dict[str, Tensor], expected: StepRecord, groups: Groups
) -> StepDifference:
    return StepDifference(
        loss=_relative(torch.tensor(result.loss), torch.tensor(expected.loss)),
        grad_norm=_relative(torch.tensor(result.grad_norm), torch.tensor(expected.grad_norm)),
        grad_norms=_compare_norms(result.grad_norms, expected.gradients),
        gradients=_compare(run.stages, run.gradients, expected.gradients, groups, is_gradient=True),
        parameters=_compare(run.stages, parameters, expected.parameters, groups),
    )


def _scene(
    run: _LayoutRun,
    result: StepResult,
    parameters: dict[str, Tensor],
    expected: StepRecord,
    differences: Sequence[StepDifference],
    question: Question,
    groups: Groups,
    tolerance: float,
) -> Scene:
    """What there is to see of the step that was compared last; all ranks must call it."""
    off = differences[-1]
    micro_batches = len(question.batches[run.step + len(differences) - 1])
    sizes = {"tensor": groups.tensor_size, "data-parallel": groups.data_size, "micro-batches": micro_batches}
    gradients = collect_clues(run.stages, run.gradients, expected.gradients, off.gradients, groups, tolerance)
    return Scene(
        sizes=sizes,
        first_step=len(differences) == 1 and run.step == 0,
        loss=result.loss,
        expected_loss=expected.loss,
        loss_differs=off.loss > tolerance,
        norm_factor=result.grad_norm / max(expected.grad_norm, 1e-30) if off.grad_norm > tolerance else None,
        shifted_losses=expected.shifted_losses,
        layers=layer_order(run.stages, groups),
        gradients=gradients,
        parameters=collect_clues(run.stages, parameters, expected.parameters, off.parameters, groups, tolerance),
    )


def _first(scene: Scene, step: int) -> str:
    """Where the difference shows first, in words."""
    for what, clues in (("gradient", scene.gradients), ("parameter", scene.parameters)):
        if clues:
            more = f" (the first of {len(clues)})" if len(clues) > 1 else ""
            return f"step {step + 1}: {what} of {clues[0].name}, {clues[0].difference:.1e}{more}"
    return f"step {step + 1}: loss {scene.loss:.6g} for {scene.expected_loss:.6g}; no tensor differs"


def difference_table(rows: dict[str, list[float]], cases: Sequence[str]) -> str:
    """Worst relative difference, layouts by cases, as text.

    Args:
        rows: layout -> one number per case.
        cases: headings.
    """
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{case:>12}" for case in cases)]
    lines += [f"{name:{width}}" + "".join(f"{value:12.1e}" for value in values) for name, values in rows.items()]
    return "\n".join(lines)


def _record_gradients(stages: Sequence[Stage]) -> dict[str, Tensor]:
    """A dictionary that each step fills with this rank's gradients (shards, by full name), before they are clipped."""
    recorded: dict[str, Tensor] = {}
    config = stages[0].config
    finalize = config.finalize_model_grads_func
    assert finalize is not None

    def finalize_and_record(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        for name, _, parameter in full_parameters(stages):
            if parameter.requires_grad:
                recorded[name] = parameter.main_grad.clone()  # type: ignore[attr-defined]

    config.finalize_model_grads_func = finalize_and_record
    return recorded


def _compare(
    stages: Sequence[Stage],
    mine: dict[str, Tensor],
    expected: dict[str, Tensor],
    groups: Groups,
    is_gradient: bool = False,
) -> dict[str, float]:
    """Relative difference of every tensor of the whole model, by full name; the worst over data-parallel copies.

    The denominator of a gradient is at least 1% of the largest entry of all expected tensors, 10% for a single number.
    """
    own: dict[str, float] = {}
    largest = max(t.abs().max().item() for t in expected.values()) if is_gradient else 0.0
    for name, _, parameter in full_parameters(stages):
        if name not in mine:
            continue
        shards = [torch.empty_like(mine[name]) for _ in range(groups.tensor_size)]
        dist.all_gather(shards, mine[name].contiguous(), group=groups.pg.tp)
        full = join_shards(shards, parameter)
        least = largest * (0.01 if full.numel() > 1 else 0.1)
        own[name] = _relative(full, expected[name].to(full.device), least) if name in expected else 1.0
    merged: dict[str, float] = {}
    for part in gather_objects(own, groups):
        for name, value in part.items():
            merged[name] = max(value, merged.get(name, 0.0))
    return merged


def _compare_norms(norms: dict[str, float], gradients: dict[str, Tensor]) -> dict[str, float]:
    """Relative difference of each component's gradient norm to that of whole gradients, by full name."""
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        component = Stage.component_of(name)
        squares[component] = squares.get(component, torch.zeros(())) + gradient.cpu().double().square().sum()
    return {
        component: _relative(torch.tensor(norms.get(component, math.nan)), squares[component].sqrt())
        if component in squares
        else 1.0
        for component in squares.keys() | norms.keys()
    }


def _relative(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """max |a - b| / max |b|, the denominator at least `least`; where b is zero, 0 if a is zero too and 1 otherwise."""
    difference, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
    if size == 0 or math.isnan(difference):
        return float(difference != 0)
    return difference / max(size, least)
