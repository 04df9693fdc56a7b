"""From a recipe and a number of ranks to what the planner asks: setting, kinds of step, how the batch is cut.

In: a recipe, its opened stores or none. Out: a `Case`, the mix of text and image steps with what a mean row of each
holds, the `Batch`; and for `parallel.layout = "auto"` the recipe with what was chosen written out.

A measured calibration is used where the run folder has `calibration.json` (`tools/plan_pipeline.py --calibrate`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megavl.config import Modality, ParallelConfig, Recipe, SourceConfig
from megavl.data.rows import SampleStore, counted_lengths, reads_as_stream
from megavl.data.store import Store
from megavl.parallel.validate import check_layout
from megavl.planning.costs import Case
from megavl.planning.estimate import Batch, Workload
from megavl.planning.hardware import HARDWARE, Hardware, read_calibration
from megavl.planning.search import Plan, plan_sizes
from megavl.training.flops import StepCounts

CALIBRATION = "calibration.json"
"""File of the run folder that is used if it is there."""
PLANNED = ("vision", "recompute", "recompute_vision")
"""Fields of `parallel` that `layout = "auto"` chooses where they stand at their defaults."""


def resolve_layout(recipe: Recipe, world_size: int, device: str) -> tuple[Recipe, Plan | None]:
    """Write out `parallel.layout = "auto"`; other recipes come back as they are.

    Tensor, pipeline and virtual sizes and the micro-batch are the recipe's. The split is chosen, and with it what
    stands at its default of `PLANNED`. Every rank comes to the same answer, as all of them read the same recipe, stores
    and calibration.

    Args:
        recipe: the run.
        world_size: its ranks.
        device: name of the device, such as `NVIDIA H200`, or `cpu`.

    Returns:
        The recipe to run and the plan behind it, None where nothing was planned.

    Raises:
        ValueError: there are more stages than layers, or a store cannot be read.
    """
    if recipe.parallel.layout != "auto":
        return recipe, None
    parallel, plain = recipe.parallel, with_layout(recipe, "")
    stages = parallel.pipeline * parallel.virtual_pipeline
    if stages > recipe.model.decoder.layers:
        raise ValueError(
            f"parallel.layout auto: {stages} pipeline stages, but the model has {recipe.model.decoder.layers} layers"
        )
    if check_layout(plain, world_size) or not recipe.data.sources:  # mistakes that are named when the recipe is checked
        return plain, None
    mix = recipe_mix(recipe, {source.name: Store(source.path) for source in recipe.data.sources})
    plan = plan_auto(recipe, find_hardware(recipe, device), mix, world_size)
    return dataclasses.replace(recipe, parallel=plan.case.parallel), plan


def plan_auto(recipe: Recipe, hardware: Hardware, mix: Sequence[Workload], gpus: int) -> Plan:
    """What `parallel.layout = "auto"` comes to for a recipe whose sizes divide."""
    default, given = ParallelConfig(), recipe.parallel
    fixed = [name for name in PLANNED if getattr(given, name) != getattr(default, name)]
    fixed += ["vision"] if given.vision_cache else []  # which belongs to one placement
    plan = plan_sizes(recipe_case(recipe, hardware), mix, recipe_batch(recipe, gpus), fixed)
    assert plan is not None, f"{given.pipeline} * {given.virtual_pipeline} stages"
    return plan


def with_layout(recipe: Recipe, layout: str) -> Recipe:
    """The recipe with another `parallel.layout`."""
    return dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, layout=layout))


def find_hardware(recipe: Recipe, device: str) -> Hardware:
    """Assumed rates for a device's name, measured ones where the run folder has them.

    Raises:
        ValueError: the calibration cannot be read.
    """
    named = next((name for name in HARDWARE if name in device.lower()), "h200")
    measured = Path(recipe.run_dir) / CALIBRATION
    return read_calibration(measured, HARDWARE[named]) if measured.exists() else HARDWARE[named]


def recipe_case(recipe: Recipe, hardware: Hardware) -> Case:
    """The recipe's setting on a machine."""
    return Case(
        model=recipe.model,
        stage=recipe.stage.number,
        parallel=recipe.parallel,
        hardware=hardware,
        dtype=recipe.stage.dtype,
        kernels=recipe.kernels,
    )


def recipe_batch(recipe: Recipe, gpus: int) -> Batch:
    """How the global batch falls onto the ranks; at least one micro-batch, also where it does not divide."""
    data = max(1, gpus // (recipe.parallel.tensor * recipe.parallel.pipeline))
    count = max(1, recipe.stage.global_batch // (recipe.stage.micro_batch * data))
    return Batch(micro_batch=recipe.stage.micro_batch, micro_batches=count, data=data)


def recipe_mix(recipe: Recipe, stores: Mapping[str, SampleStore]) -> list[Workload]:
    """Text steps and image steps with their shares and the mean row of each.

    Args:
        recipe: the run; with another grouping than `step` the kinds still stand for what its micro-batches hold.
        stores: opened stores by source; a source without one counts as full rows, with as many images as fit.
    """
    mix = []
    modalities: tuple[Modality, ...] = ("language", "multimodal")
    for modality in modalities:
        sources = [s for s in recipe.data.sources if s.modality == modality and s.share > 0]
        total = sum(source.share for source in sources)
        if total:
            rows = [_mean_row(recipe, source, stores.get(source.name)) for source in sources]
            mix.append(Workload(name=modality, share=total, row=_mean(rows, [s.share / total for s in sources])))
    return mix


def _mean(rows: Sequence[StepCounts], weights: Sequence[float]) -> StepCounts:
    """Rounded mean; a row of a source with images keeps at least one."""

    def mean(name: str) -> float:
        return sum(weight * getattr(row, name) for weight, row in zip(weights, rows, strict=True))

    images = mean("images")
    return StepCounts(
        images=max(round(images), 1) if images else 0,
        tokens=round(mean("tokens")),
        squared_lengths=round(mean("squared_lengths")),
        logits=round(mean("logits")),
    )


def _mean_row(recipe: Recipe, source: SourceConfig, store: SampleStore | None) -> StepCounts:
    """What a mean row of one source holds."""
    full, per_image = recipe.data.seq_length, recipe.model.tokens_per_image
    if store is None:
        images = full // per_image if source.modality == "multimodal" else 0
        return StepCounts(images=images, tokens=full, squared_lengths=full**2, logits=full)
    if reads_as_stream(store):  # documents attend within themselves
        lengths = np.asarray(store.lengths, dtype=np.float64)
        lengths = np.minimum(lengths[lengths > 0], full) if recipe.data.separate_documents else np.array([full])
        squared = full * float((lengths**2).sum() / max(lengths.sum(), 1.0))
        return StepCounts(images=0, tokens=full, squared_lengths=round(squared), logits=full)
    lengths = counted_lengths(store, per_image, text_only=False).astype(np.float64)
    mean_images = float(np.asarray(store.image_counts).mean())
    samples = max(1.0, full / lengths.mean()) if recipe.data.packing else 1.0
    tokens = samples * lengths.mean()
    squared = samples * (lengths**2).mean() if recipe.data.separate_documents else tokens**2
    return StepCounts(
        images=round(samples * mean_images), tokens=round(tokens), squared_lengths=round(squared), logits=round(tokens)
    )
