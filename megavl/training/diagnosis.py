"""Why a layout differs from one process, as far as the differing tensors tell.

In: for each tensor that differs, how it differs (`Clue`), and what else was seen (`Scene`). Out: one sentence.

What a clue can tell apart. A *factor* (the tensor is c times the reference, entry by entry) is a sum over a group that
is missing, doubled or averaged: c is that group's size, or one over it. *Partial* copies (the copies of a group add up
to the reference) are a sum that nobody makes. A *twin* (it equals the same tensor of another decoder layer) is a layer
in the wrong place. None of these: the computation itself differs. Tensor and data-parallel groups of one size give the
same factor; then it matters whether only tensors are off of which every tensor rank has a whole copy.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.model.shards import full_name, full_parameters, is_sharded, join_shards
from megavl.model.stage import Stage
from megavl.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Clue:
    """How one tensor differs from the reference."""

    name: str
    """Full name."""
    difference: float
    """Relative, see parity.py."""
    copied: bool
    """Every tensor rank has a whole copy."""
    factor: float | None = None
    """It is this many times the reference, entry by entry; infinite where the reference is zero."""
    partial: str = ""
    """The group (`tensor` or `data-parallel`) over which its copies add up to the reference; else empty."""
    twin: str = ""
    """The tensor of another layer whose reference it equals; else empty."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What was seen of a layout in the first step that differs."""

    sizes: Mapping[str, int]
    """Group -> ranks: `tensor`, `data-parallel`; and `micro-batches` of the global batch."""
    first_step: bool
    """No update came before this step."""
    loss: float
    """Of the layout."""
    expected_loss: float
    """Of the reference."""
    loss_differs: bool
    """By more than the tolerance."""
    norm_factor: float | None
    """Gradient norm over the reference's, or None where they agree."""
    shifted_losses: Mapping[str, Sequence[float]]
    """The reference's loss with labels one position to the left or right (first step only)."""
    layers: Sequence[int]
    """Decoder layers in the order in which they run."""
    gradients: Sequence[Clue] = field(default=())
    """Gradients that differ, in the order of the model."""
    parameters: Sequence[Clue] = field(default=())
    """Parameters after the update that differ, in the order of the model."""


def diagnose(scene: Scene) -> str:
    """The likely cause of the difference, in one sentence."""
    if list(scene.layers) != sorted(scene.layers):
        return f"the decoder layers run in the order {','.join(map(str, scene.layers))}"
    swapped = [clue for clue in (*scene.parameters, *scene.gradients) if clue.twin]
    if swapped:
        what = "weights" if swapped[0] in scene.parameters else "gradients"
        pairs = ", ".join(sorted({f"{_layer(c.name)} has the {what} of {_layer(c.twin)}" for c in swapped}))
        return f"decoder layers are swapped: {pairs}"
    if scene.loss_differs:
        return _about_the_loss(scene)
    if scene.gradients:
        return _about_gradients(scene)
    if scene.norm_factor is not None:
        return (
            f"every gradient agrees, but their norm is {scene.norm_factor:.4g} times the reference's: some ranks' "
            "parts are left out of it or counted twice"
        )
    return "loss, gradients and norm agree, the update does not: learning rate, weight decay, or the optimizer's state"


def _about_the_loss(scene: Scene) -> str:
    for side, losses in scene.shifted_losses.items():
        if min(abs(scene.loss - loss) for loss in losses) < 0.01 * abs(scene.loss - scene.expected_loss):
            return f"the labels are shifted by one position to the {side}: the reference with such labels has this loss"
    source = _source(scene.loss / scene.expected_loss if scene.expected_loss else None, scene.sizes)
    if source:
        return f"the loss is a clean factor off ({source}): it is summed or averaged over the wrong set"
    if not scene.first_step:
        return "the loss differs after an update whose result agreed: the weights used in this step were out of date"
    return "the forward pass differs before any update: inputs, initial weights or the layers' arithmetic"


def _about_gradients(scene: Scene) -> str:
    """The cause that most of the differing gradients share."""
    only_copied = all(clue.copied for clue in scene.gradients)
    causes = Counter(_cause(clue, scene.sizes, only_copied) for clue in scene.gradients)
    cause, count = causes.most_common(1)[0]
    parts = sorted({Stage.component_of(clue.name) for clue in scene.gradients})
    others = f", {len(scene.gradients) - count} others differ otherwise" if count < len(scene.gradients) else ""
    return f"{count} gradients of {', '.join(parts)} {cause}{others}"


def _cause(clue: Clue, sizes: Mapping[str, int], only_copied: bool) -> str:
    """What is wrong with one gradient, as the end of a sentence."""
    if clue.partial:
        return f"are partial: the sum over the {clue.partial} group ({sizes[clue.partial]} ranks) is missing"
    if clue.factor is None:
        return "differ without a clean factor: the backward pass itself, or which micro-batches reach it"
    if clue.factor == 0:
        return "are zero: the backward pass does not reach them, or they are cleared"
    if math.isinf(clue.factor):
        return "are not zero although the step gives them none: left from the step before, or of another sample"
    likely = {"tensor": sizes["tensor"]} if only_copied and sizes["tensor"] > 1 else sizes
    source = _source(clue.factor, likely) or _source(clue.factor, sizes)
    if not source:
        return f"are {clue.factor:.4g} times the reference, which is no group's size"
    fault = "summed although each rank has the whole" if clue.factor > 1 else "averaged or divided where a sum is due"
    return f"are {clue.factor:.4g} times the reference ({source}): {fault}"


def _source(factor: float | None, sizes: Mapping[str, int]) -> str:
    """The groups whose size, or one over it, `factor` is."""
    if factor is None or factor <= 0 or math.isinf(factor):
        return ""
    found = [n for n, size in sizes.items() if size > 1 and min(abs(factor / size - 1), abs(factor * size - 1)) < 1e-3]
    return " or ".join(f"the size of the {name} group" if name != "micro-batches" else name for name in found)


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:3])


def collect_clues(
    stages: Sequence[Stage],
    mine: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    differences: Mapping[str, float],
    groups: Groups,
    tolerance: float,
) -> list[Clue]:
    """Look at every tensor that differs; all ranks must call it.

    Args:
        stages: this rank's stages.
        mine: this rank's gradients or parameters (shards) by full name.
        expected: the reference's, in full, in the order of the model.
        differences: relative differences by full name, the same on every rank.
        groups: this rank's groups.
        tolerance: relative; what is above differs.

    Returns:
        Clues in the order of the model, the same on every rank.
    """
    own = []
    for name, _, parameter in full_parameters(stages):
        if name not in mine or name not in expected or differences.get(name, 0.0) <= tolerance:
            continue
        shards = _copies(mine[name], groups.pg.tp)
        copied = not is_sharded(parameter)
        copies = {
            "tensor": shards if copied else shards[:1],
            "data-parallel": _copies(join_shards(shards, parameter), groups.pg.dp),
        }
        own.append(make_clue(name, copies, expected, copied=copied, difference=differences[name], tolerance=tolerance))
    found = {clue.name: clue for part in gather_objects(own, groups) for clue in part}
    return [found[name] for name in expected if name in found]


def layer_order(stages: Sequence[Stage], groups: Groups) -> list[int]:
    """Numbers of the decoder layers in the order in which the pipeline runs them; all ranks must call it."""
    own = {}
    for stage in stages:
        place = (stage.vp_stage or 0) * groups.pipeline_size + groups.pipeline_rank
        names = [full_name(stage, f"decoder.layers.{index}.") for index in range(len(stage.decoder.layers))]
        own[place] = [int(name.split(".")[2]) for name in names]
    places: dict[int, list[int]] = {}
    for part in gather_objects(own, groups):
        places.update(part)
    return [layer for place in sorted(places) for layer in places[place]]


def gather_objects(value: Any, groups: Groups) -> list[Any]:
    """`value` of every rank."""
    values: list[Any] = [None] * groups.world_size
    dist.all_gather_object(values, value, group=groups.gloo_world)
    return values


def _copies(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """`tensor` of every rank of `group`."""
    copies = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(copies, tensor.contiguous(), group=group)
    return copies


def make_clue(
    name: str,
    copies: Mapping[str, Sequence[Tensor]],
    expected: Mapping[str, Tensor],
    *,
    copied: bool,
    difference: float,
    tolerance: float,
) -> Clue:
    """Look at one tensor that differs.

    Args:
        name: its full name.
        copies: `tensor` and `data-parallel` -> the full tensor as each rank of that group has it, this rank's
            among them; one entry where the group shares the tensor.
        expected: the reference's tensors by full name.
        copied: every tensor rank has a whole copy.
        difference: relative, for the record.
        tolerance: relative, for equality here.
    """
    mine, wanted = copies["data-parallel"][0].double(), expected[name].double().to(copies["data-parallel"][0].device)

    def equal(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= 100 * tolerance * b.abs().max().clamp_min(1e-30))

    square = float((wanted * wanted).sum())
    factor = float((mine * wanted).sum()) / square if square else math.inf
    clean = math.isinf(factor) or equal(mine, factor * wanted) or float(mine.abs().max()) == 0
    partial = [
        group
        for group, tensors in copies.items()
        if len(tensors) > 1 and square and equal(torch.stack([t.double() for t in tensors]).sum(0), wanted)
        if not equal(mine * len(tensors), wanted)  # equal copies of one part: a factor
    ]
    own_distance = float((mine - wanted).abs().max())
    twins = [
        other
        for other, tensor in expected.items()
        if other != name and _suffix(other) == _suffix(name) != "" and tensor.shape == mine.shape
        # Norm weights of all layers are much alike, and an update has moved what was swapped: far closer is the rule.
        if float((mine - tensor.double().to(mine.device)).abs().max()) < 0.05 * own_distance
    ]
    return Clue(
        name=name,
        difference=difference,
        copied=copied,
        factor=factor if clean else None,
        partial=partial[0] if partial else "",
        twin=twins[0] if twins else "",
    )


def _suffix(name: str) -> str:
    """What a layer's tensor is called within its layer; empty outside the decoder's layers."""
    return name.split(".", 3)[3] if name.startswith("decoder.layers.") else ""
