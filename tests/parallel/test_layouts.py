"""Every layout against one process in plain PyTorch: loss, every gradient, gradient norm, parameters after each step.

Each comparison runs five consecutive steps (text, image, images in some micro-batches only, packed, text again), so
that buckets of overlapped reduction and Adam's moments carry over; `megavl/training/parity.py` says what a difference
is.
"""

from pathlib import Path

import pytest
from layouts import LAYOUTS, MESSAGES, MODEL, RECOMPUTE, STEP_NAMES, TOLERANCE, compare, save_reference
from world import World, WorldError

from megavl.config import ParallelConfig
from megavl.model import first_stage
from megavl.parallel import gradients
from megavl.training.freeze import TRAINED
from megavl.training.parity import Comparison


@pytest.fixture(scope="module")
def references(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Training stage -> file with the plain loop's records."""
    folder: Path = tmp_path_factory.mktemp("references")
    paths = {stage: str(folder / f"stage{stage}.pt") for stage in TRAINED}
    for stage, path in paths.items():
        world.run(save_reference, stage, path, ranks=1)
    return paths


def check(comparison: Comparison) -> list[float]:
    """Assert equality up to the tolerance; returns the worst difference of each step."""
    assert comparison.missing == []
    assert comparison.drifted == []
    for name, step in zip(STEP_NAMES, comparison.steps, strict=True):
        off = {n: d for kind in (step.gradients, step.parameters) for n, d in kind.items() if d > TOLERANCE}
        assert step.worst() <= TOLERANCE, f"{name}: loss {step.loss}, norm {step.grad_norm}, {off}"
    return [step.worst() for step in comparison.steps]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(
    world: World, references: dict[int, str], differences: dict[str, list[float]], layout: str, stage: int
) -> None:
    ranks, parallel = LAYOUTS[layout]
    comparison = world.run(compare, stage, parallel, references[stage], ranks=ranks)[0]
    differences[f"{layout}, stage {stage}"] = [step.worst() for step in comparison.steps]
    check(comparison)


@pytest.mark.parametrize("layout", ["tp2pp2sp", "dp2 overlap"])
def test_language_pretraining_leaves_the_towers_alone(world: World, references: dict[int, str], layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    check(world.run(compare, 0, parallel, references[0], ranks=ranks)[0])


@pytest.mark.parametrize("layout", RECOMPUTE)
def test_recomputing_activations_changes_nothing(
    world: World, references: dict[int, str], differences: dict[str, list[float]], layout: str
) -> None:
    ranks, parallel = RECOMPUTE[layout]
    comparison = world.run(compare, 3, parallel, references[3], ranks=ranks)[0]
    differences[f"{layout}, stage 3"] = check(comparison)


@pytest.mark.parametrize("layout", MESSAGES)
def test_how_messages_travel_changes_nothing(
    world: World, references: dict[int, str], differences: dict[str, list[float]], layout: str
) -> None:
    ranks, parallel = MESSAGES[layout]
    comparison = world.run(compare, 3, parallel, references[3], ranks=ranks)[0]
    differences[f"{layout}, stage 3"] = check(comparison)


def compare_with_summed_towers(stage: int, parallel: ParallelConfig, path: str) -> Comparison:
    """A planted fault: tower gradients are summed over the tensor group instead of averaged."""

    def mark(module):
        for name, parameter in module.named_parameters():
            if module.component_of(name) in gradients.REPLICATED_COMPONENTS:
                parameter.sequence_parallel = True

    return _with(gradients, "_mark_replicated", mark, stage, parallel, path)


def compare_without_zero_gradients(stage: int, parallel: ParallelConfig, path: str) -> Comparison:
    """A planted fault: micro-batches without images leave the towers' gradients absent."""
    return _with(first_stage.FirstStage, "_without_images", lambda self, embedded: embedded, stage, parallel, path)


def _with(owner: object, name: str, fault: object, stage: int, parallel: ParallelConfig, path: str) -> Comparison:
    sound = getattr(owner, name)
    setattr(owner, name, fault)
    try:
        return compare(stage, parallel, path)
    finally:
        setattr(owner, name, sound)


def test_the_comparison_sees_gradients_that_are_a_group_size_too_large(
    world: World, references: dict[int, str]
) -> None:
    ranks, parallel = LAYOUTS["tp2sp"]
    comparison = world.run(compare_with_summed_towers, 3, parallel, references[3], ranks=ranks)[0]
    image = comparison.steps[STEP_NAMES.index("image")]
    doubled = {name for name, difference in image.gradients.items() if difference == pytest.approx(1, abs=0.01)}
    assert any(name.startswith("first_stage.towers.siglip") for name in doubled)
    assert any(name.startswith("first_stage.adaptor") for name in doubled)
    assert not any(name.startswith(("decoder", "last_stage")) for name in doubled)
    assert MODEL.sam is not None


def test_overlapped_reduction_needs_the_zero_gradients(world: World, references: dict[int, str]) -> None:
    ranks, parallel = LAYOUTS["dp2 overlap"]
    with pytest.raises(WorldError):
        world.run(compare_without_zero_gradients, 3, parallel, references[3], ranks=ranks, timeout_s=60)
