"""A few training steps on one process in plain PyTorch, which layouts are held against.

In: a `Question`: sizes, training stage, optimizer settings and a few global batches. Out: one `StepRecord` per step.
No schedule, no wrapper, `torch.optim.AdamW`, the mean over the global batch's labels.

Adam divides a gradient by its own size, so its first update is about a sign: it hides a wrong scale, and turns rounding
noise into whole steps. `PARITY_OPTIM` has an epsilon above the gradients of most entries, which makes the update about
proportional to the gradient: a wrong scale shows and noise stays noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megavl.config import ModelConfig, OptimConfig, ParallelConfig
from megavl.data.microbatch import IGNORE, MicroBatch
from megavl.model.build import build_stages
from megavl.model.shards import full_parameters
from megavl.model.stage import Stage
from megavl.ops import PLAIN, Ops
from megavl.parallel.groups import Groups
from megavl.parallel.random_state import seed_everything
from megavl.training.freeze import apply_freeze

SHIFTS = {"left": -1, "right": 1}
"""Where each label goes if it is shifted by one position: to the token before, or to the token after."""

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
    shifted_losses: dict[str, tuple[float, ...]]
    """First step: the loss with every label one position to the left or right, by which such a fault is recognised."""


def run_reference(question: Question, groups: Groups) -> list[StepRecord]:
    """The plain loop; `groups` must be those of one rank."""
    assert groups.world_size == 1, f"{groups.world_size} ranks"
    (stage,) = build_frozen(question, ParallelConfig(), groups)
    optimizer = _plain_adamw(stage, question.optim)
    parameters = {name: p for name, _, p in full_parameters([stage])}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    records: list[StepRecord] = []
    for batch in question.batches:
        optimizer.zero_grad()
        labels = sum(int((b.labels != IGNORE).sum()) for b in batch)
        shifted = {} if records else _shifted_losses(stage, batch, groups)
        losses = [stage(b.to(groups.device)).sum() for b in batch]
        loss = torch.stack(losses).sum() / labels
        loss.backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), question.optim.clip)
        optimizer.step()
        after = {name: p.detach().clone() for name, p in parameters.items()}
        records.append(
            StepRecord(
                loss=loss.item(),
                grad_norm=norm.item(),
                gradients=gradients,
                parameters=after,
                shifted_losses=shifted,
            )
        )
    return records


@torch.no_grad()
def _shifted_losses(stage: Stage, batch: Sequence[MicroBatch], groups: Groups) -> dict[str, tuple[float, ...]]:
    """The loss of a global batch if each label stood one position further to the left or right.

    Over the number of labels that are left, and over the number before: either may be what a faulty run divides by.
    """
    losses = {}
    for side, step in SHIFTS.items():
        shifted = [replace(b, labels=shift_labels(b.labels, step)) for b in batch]
        total = sum(float(stage(b.to(groups.device)).sum()) for b in shifted)
        counts = [sum(int((b.labels != IGNORE).sum()) for b in batches) for batches in (shifted, batch)]
        losses[side] = tuple(total / max(1, count) for count in counts)
    return losses


def shift_labels(labels: Tensor, step: int) -> Tensor:
    """Labels [t] moved by one position; what enters at the end is `IGNORE`."""
    moved = labels.roll(step)
    moved[0 if step > 0 else -1] = IGNORE
    return moved


def build_frozen(question: Question, parallel: ParallelConfig, groups: Groups, ops: Ops = PLAIN) -> list[Stage]:
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
