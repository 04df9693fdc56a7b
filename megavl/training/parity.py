"""Hold a layout against one process: loss, every gradient, gradient norm, parameters after each step.

In: sizes, training stage, optimizer settings and a few global batches. Out: by how much a layout differs from a plain
PyTorch loop on one rank: no schedule, no wrapper, `torch.optim.AdamW`, the mean over the global batch's labels.

A difference is relative and taken per tensor: max |a - b| / max |b|. Three things need care near zero:

- A tensor whose gradient is zero (a tower in a step without images) must be zero exactly; anything else counts as 1.
- A gradient that is small because large terms cancel carries the rounding of those terms. So the denominator is at
  least 1% of the largest gradient entry of the model; a factor of 2 on a tensor a thousand times smaller still shows,
  as 0.1. A single number (SAM's `hd_alpha`) is all one sum, with no larger entry beside it to set the scale, and was
  seen to be off by 1.03e-5 at 1%: for such tensors it is 10%.
- Adam divides a gradient by its own size, so its first update is about a sign: it hides a wrong scale, and turns
  rounding noise into whole steps. `PARITY_OPTIM` has an epsilon above the gradients of most entries, which makes the
  update about proportional to the gradient: a wrong scale shows and noise stays noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.config import ModelConfig, OptimConfig, ParallelConfig
from megavl.data.microbatch import IGNORE, MicroBatch, StepBatch
from megavl.model.build import build_stages
from megavl.model.shards import full_parameters, join_shards
from megavl.model.stage import Stage
from megavl.ops import PLAIN, Ops
from megavl.parallel.gradients import replicas_differ, synchronise_parameters, wrap_stages
from megavl.parallel.groups import Groups
from megavl.parallel.random_state import seed_everything
from megavl.parallel.vision_ahead import make_ahead_encoder
from megavl.training.freeze import apply_freeze, frozen_components
from megavl.training.optimizer import make_optimizer
from megavl.training.step import train_step
from megavl.training.synthetic_batches import share

PARITY_OPTIM = OptimConfig(
    lr=1e-3, vision_lr=5e-4, schedule="constant", warmup_steps=0, eps=1e-2, weight_decay=0.1, clip=0.5
)
"""Settings under which a wrong gradient shows in the parameters; the clip is active."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is trained in a comparison."""

    model: ModelConfig
    """Sizes."""
    stage: int
    """Training stage, for the freeze table."""
    batches: list[list[MicroBatch]]
    """One global batch per step."""
    optim: OptimConfig = PARITY_OPTIM
    """AdamW."""
    dtype: torch.dtype = torch.float32
    """Type of parameters and activations."""
    seed: int = 1
    """Of the initial weights."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step: loss, gradient norm, and full tensors by full name."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepDifference:
    """A layout's step beside the reference's, as relative differences."""

    loss: float
    grad_norm: float
    gradients: dict[str, float]
    """By full name."""
    parameters: dict[str, float]
    """After the update, by full name; empty where overlapped gathering has not brought them up to date."""

    def worst(self) -> float:
        """The largest of all."""
        return max(self.loss, self.grad_norm, *self.gradients.values(), *self.parameters.values())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All steps of a layout."""

    steps: list[StepDifference]
    missing: list[str]
    """Trainable parameters of the reference that no rank of the layout has, and the reverse."""
    drifted: list[str]
    """Replicated parameters that are not bit-equal over the tensor group after the last step."""


def run_reference(question: Question, groups: Groups) -> list[StepRecord]:
    """The plain loop; `groups` must be those of one rank."""
    assert groups.world_size == 1, f"{groups.world_size} ranks"
    (stage,) = _build(question, ParallelConfig(), groups)
    optimizer = _plain_adamw(stage, question.optim)
    parameters = {name: p for name, _, p in full_parameters([stage])}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    records = []
    for batch in question.batches:
        optimizer.zero_grad()
        labels = sum(int((b.labels != IGNORE).sum()) for b in batch)
        losses = [stage(b.to(groups.device)).sum() for b in batch]
        loss = torch.stack(losses).sum() / labels
        loss.backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), question.optim.clip)
        optimizer.step()
        after = {name: p.detach().clone() for name, p in parameters.items()}
        records.append(StepRecord(loss=loss.item(), grad_norm=norm.item(), gradients=gradients, parameters=after))
    return records


def run_layout(
    question: Question,
    parallel: ParallelConfig,
    groups: Groups,
    reference: Sequence[StepRecord],
    *,
    bucket_size: int | None = None,
    ops: Ops = PLAIN,
) -> Comparison:
    """The same steps under a layout, as a training run makes them; all ranks must call it.

    Args:
        question: what `reference` was run on.
        parallel: the layout that `groups` was formed for.
        groups: this rank's groups.
        reference: from `run_reference`.
        bucket_size: parameters per bucket of overlapped reduction.
        ops: fused operators of the layout; the reference has none.

    Returns:
        The comparison, the same on every rank.
    """
    stages = _build(question, parallel, groups, ops)
    chunks = wrap_stages(stages, parallel, groups, bucket_size=bucket_size)
    optimizer = make_optimizer(chunks, question.optim, parallel, groups)
    frozen = frozen_components(question.stage)
    encoder = make_ahead_encoder(stages, question.model, parallel, groups, frozen=frozen, ops=ops)
    gradients = _record_gradients(stages)
    differences = []
    for step, (batch, expected) in enumerate(zip(question.batches, reference, strict=True)):
        mine = StepBatch(step=step, language_rows=0, micro_batches=share(batch, groups.data_rank, groups.data_size))
        lr, vision_lr = question.optim.lr, question.optim.vision_lr
        result = train_step(
            chunks, optimizer, mine, groups, lr=lr, vision_lr=vision_lr, encoder=encoder, force_all_reduce=True
        )
        # Collecting parameters early would hide what overlapped gathering does; there the last step's are compared, and
        # the gradients of each step show whether it started from the right ones.
        parameters: dict[str, Tensor] = {}
        if not parallel.overlap_param_gather or step == len(reference) - 1:
            synchronise_parameters(chunks)
            parameters = {name: p.detach() for name, _, p in full_parameters(stages)}
        differences.append(
            StepDifference(
                loss=_relative(torch.tensor(result.loss), torch.tensor(expected.loss)),
                grad_norm=_relative(torch.tensor(result.grad_norm), torch.tensor(expected.grad_norm)),
                gradients=_compare(stages, gradients, expected.gradients, groups, is_gradient=True),
                parameters=_compare(stages, parameters, expected.parameters, groups),
            )
        )
    wanted = set(reference[0].gradients), set(reference[0].parameters)
    missing = (wanted[0] ^ set(differences[0].gradients)) | (wanted[1] ^ set(differences[-1].parameters))
    drifted = _gather(replicas_differ(stages, groups.pg.tp), groups)
    return Comparison(steps=differences, missing=sorted(missing), drifted=sorted({n for d in drifted for n in d}))


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


def _build(question: Question, parallel: ParallelConfig, groups: Groups, ops: Ops = PLAIN) -> list[Stage]:
    """This rank's stages with their initial weights, frozen as the stage asks."""
    seed_everything(question.seed, groups)
    stages = build_stages(
        question.model, parallel, dtype=question.dtype, seed=question.seed, pg=groups.pg, device=groups.device, ops=ops
    )
    for name, _, parameter in full_parameters(stages):
        if name.endswith("hd_alpha_downsamples"):  # at its initial zero, the branch behind it would have no gradient
            parameter.data.fill_(0.5)
    apply_freeze(stages, question.stage)
    return stages


def _plain_adamw(stage: Stage, optim: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW with the groups of `make_optimizer`: own rate for SigLIP, no decay for vectors."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((stage.component_of(name) == "siglip", parameter.ndim == 1), []).append(parameter)
    vision_lr = optim.lr if optim.vision_lr is None else optim.vision_lr
    settings: list[dict[str, Any]] = [
        {"params": p, "lr": vision_lr if siglip else optim.lr, "weight_decay": 0.0 if vector else optim.weight_decay}
        for (siglip, vector), p in groups.items()
    ]
    return torch.optim.AdamW(settings, betas=(optim.beta1, optim.beta2), eps=optim.eps)


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
    for part in _gather(own, groups):
        for name, value in part.items():
            merged[name] = max(value, merged.get(name, 0.0))
    return merged


def _relative(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """max |a - b| / max |b|, the denominator at least `least`; where b is zero, 0 if a is zero too and 1 otherwise."""
    difference, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
    if size == 0 or math.isnan(difference):
        return float(difference != 0)
    return difference / max(size, least)


def _gather(value: Any, groups: Groups) -> list[Any]:
    """`value` of every rank."""
    values: list[Any] = [None] * groups.world_size
    dist.all_gather_object(values, value, group=groups.gloo_world)
    return values
