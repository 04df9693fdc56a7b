"""What was chosen, told once before the first step: layout, who holds what, what is trained, what is read.

In: a recipe and this rank's built stages. Out: lines of text, the same however the run was started.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megavl.config import Recipe
from megavl.data.mixture import StepPlan
from megavl.data.plan_report import describe_plan
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer
from megavl.model.attention import attention_backend
from megavl.model.sizes import count_parameters
from megavl.model.stage import Stage
from megavl.ops import operator_lines
from megavl.parallel.groups import Groups
from megavl.parallel.stage_plan import StagePlace, stage_plan
from megavl.parallel.vision_ahead import images_ahead
from megavl.training.freeze import TRAINED, frozen_components


def recipe_lines(recipe: Recipe) -> list[str]:
    """The resolved recipe, a line per section."""
    lines = [f"run_dir    {recipe.run_dir}"]
    for section in dataclasses.fields(recipe):
        value = getattr(recipe, section.name)
        if dataclasses.is_dataclass(value):
            fields = " ".join(f"{f.name}={_short(getattr(value, f.name))}" for f in dataclasses.fields(value))
            lines.append(f"{section.name:10} {fields}")
    return lines


def _short(value: Any) -> str:
    """A field in one line; sources are told by the data lines."""
    if dataclasses.is_dataclass(value):
        inner = " ".join(f"{f.name}={_short(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"[{inner}]"
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return f"[{len(value)}]"
    return repr(value)


def device_line(recipe: Recipe, groups: Groups) -> str:
    """Device, compute type, attention."""
    dtype = torch.bfloat16 if recipe.stage.dtype == "bf16" else torch.float32
    device = torch.cuda.get_device_name(groups.device) if groups.device.type == "cuda" else "CPU"
    attention = attention_backend(groups.device, dtype)
    return f"device {device}, {recipe.stage.dtype}, attention {attention}, torch {torch.__version__}"


def kernel_lines(recipe: Recipe, groups: Groups) -> list[str]:
    """What computes each operator that the model has."""
    dtype = torch.bfloat16 if recipe.stage.dtype == "bf16" else torch.float32
    absent = {"sam_attention", "interpolate", "strided_conv", "interpolate_conv"} if recipe.model.sam is None else set()
    if recipe.model.adaptor not in ("hybrid", "mlp_gelu"):
        absent.add("adaptor")
    lines = operator_lines(recipe.kernels, groups.device, dtype)
    return [line for line in lines if line.split()[0] not in absent]


def layout_lines(recipe: Recipe, stages: Sequence[Stage], groups: Groups) -> list[str]:
    """Which part of the model lies on which pipeline rank; all ranks must call this.

    Args:
        recipe: the run.
        stages: this rank's chunks with `requires_grad` set.
        groups: this rank's groups.
    """
    parameters = [p for stage in stages for p in stage.parameters()]
    mine = (
        groups.pipeline_rank,
        groups.tensor_rank + groups.data_rank,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
    everyone: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everyone, mine, group=groups.gloo_world)
    places = stage_plan(recipe.model, recipe.parallel)
    lines = ["pipeline rank      parameters         trained   holds (parameters per tensor rank)"]
    for rank, other, total, trained in sorted(everyone):
        if other == 0:
            holds = "; ".join(_holds(place) for place in places if place.rank == rank)
            lines.append(f"{rank:13}   {total:13,}   {trained:13,}   {holds}")
    return lines


def _holds(place: StagePlace) -> str:
    """The parts of one pipeline stage."""
    first, last = place.layers[0], place.layers[-1]
    layers = f"layers {first} to {last}" if last > first else f"layer {first}"
    before = "towers + adaptor + embedding + " if place.first else ""
    return f"{before}{layers}{' + norm + head + loss' if place.last else ''}"


def vision_line(recipe: Recipe) -> str:
    """Who encodes the images."""
    parallel, vision = recipe.parallel, recipe.parallel.vision
    if vision == "replicate":
        return f"vision replicate: {parallel.tensor} tensor rank(s) of the first stage encode every image each"
    line = f"vision {vision}: {parallel.tensor} tensor ranks of the first stage share the images"
    if parallel.tensor == 1:
        line = (
            f"vision {vision}: the first stage has one tensor rank, which shares its images with none, as in replicate"
        )
    if vision == "split_tensor":
        return line
    frozen = frozen_components(recipe.stage.number)
    ahead = {n: c for n, c in count_parameters(recipe.model).items() if c and n in frozen and n in ("sam", "siglip")}
    if not ahead:
        return f"{line}; no tower is frozen, so none runs ahead of the schedule"
    ranks = parallel.tensor * parallel.pipeline
    who = f"all {ranks} ranks of a copy" if ranks > 1 else "the one rank of a copy"
    limit = images_ahead(recipe.model, parallel, frozen, 2 if recipe.stage.dtype == "bf16" else 4)
    cache = f", features kept in {parallel.vision_cache}" if parallel.vision_cache else ""
    return (
        f"{line}; {' and '.join(ahead)} ({sum(ahead.values()):,} parameters) run ahead of the schedule on {who}, for "
        f"up to {limit} images of a step{cache}"
    )


def component_lines(recipe: Recipe) -> list[str]:
    """Parameters of the whole model by component, and whether this stage trains them."""
    trained = TRAINED[recipe.stage.number]
    lines = [f"training stage {recipe.stage.number}"]
    for name, count in count_parameters(recipe.model).items():
        if count:
            lines.append(f"{name:13}   {count:15,}   {'trained' if trained[name] else 'frozen'}")
    return lines


def data_lines(recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """The mixture: what each source holds and how much of it the run reads. Plans an epoch, so for one rank only."""
    sources = [source for source in recipe.data.sources if source.share > 0]
    stores = {s.name: Store(s.path, tokenizer.fingerprint, recipe.model.decoder.vocab) for s in sources}
    plan = StepPlan(recipe.data, recipe.stage, stores, recipe.model.tokens_per_image)
    lines = ["source                           share     samples      tokens    images"]
    for source in sources:
        store = stores[source.name]
        lines.append(
            f"{source.name:30} {100 * source.share:6.2f}%  {store.num_samples:10,}  {int(store.lengths.sum()):10,}  "
            f"{int(store.image_counts.sum()):8,}"
        )
    return [*lines, *describe_plan(plan)]
