"""Every layout against one process in plain PyTorch: loss, every gradient, gradient norm, parameters after each step.

Each comparison runs five consecutive steps (text, image, images in some micro-batches only, packed, text again), so
that buckets of overlapped reduction and Adam's moments carry over; `megavl/training/parity.py` says what a difference
is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from layouts import (
    LAYOUTS,
    MESSAGES,
    MODEL,
    RECOMPUTE,
    STEP_NAMES,
    TOLERANCE,
    VISION_LAYOUTS,
    compare,
    micro_batches,
    save_reference,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from world import World, WorldError

from megavl.config import ParallelConfig
from megavl.data.microbatch import MicroBatch
from megavl.model import first_stage
from megavl.model.stage import Stage
from megavl.parallel import gradients, vision_placement
from megavl.parallel.vision_ahead import AheadEncoder
from megavl.parallel.vision_placement import TensorGroupImages
from megavl.training import optimizer
from megavl.training.parity import Comparison

Reference = Callable[[int, tuple[int, ParallelConfig]], str]
"""Training stage and layout -> file with the plain loop's records of the same batches."""


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Runs the plain loop where it has not run before."""
    folder: Path = tmp_path_factory.mktemp("references")

    def records(stage: int, layout: tuple[int, ParallelConfig]) -> str:
        count = micro_batches(*layout)
        path = folder / f"stage{stage}_{count}.pt"
        if not path.exists():
            world.run(save_reference, stage, count, str(path), ranks=1)
        return str(path)

    return records


def check(comparison: Comparison) -> list[float]:
    """Assert equality up to the tolerance; returns the worst difference of each step."""
    assert comparison.missing == []
    assert comparison.drifted == []
    for name, step in zip(STEP_NAMES, comparison.steps, strict=True):
        off = {n: d for kind in (step.gradients, step.parameters) for n, d in kind.items() if d > TOLERANCE}
        assert step.worst() <= TOLERANCE, f"{name}: loss {step.loss}, norm {step.grad_norm} {step.grad_norms}, {off}"
    return [step.worst() for step in comparison.steps]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(
    world: World, reference: Reference, differences: dict[str, list[float]], layout: str, stage: int
) -> None:
    ranks, parallel = LAYOUTS[layout]
    comparison = world.run(compare, stage, parallel, reference(stage, (ranks, parallel)), ranks=ranks)[0]
    differences[f"{layout}, stage {stage}"] = [step.worst() for step in comparison.steps]
    check(comparison)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("layout", VISION_LAYOUTS)
def test_vision_placement_equals_one_process(
    world: World, reference: Reference, differences: dict[str, list[float]], layout: str, stage: int
) -> None:
    """With SigLIP frozen, which then may run ahead, and trained; stage 2 treats the towers as stage 1 does."""
    ranks, parallel = VISION_LAYOUTS[layout]
    comparison = world.run(compare, stage, parallel, reference(stage, (ranks, parallel)), ranks=ranks)[0]
    differences[f"{layout}, stage {stage}"] = [step.worst() for step in comparison.steps]
    check(comparison)


@pytest.mark.parametrize("layout", ["tp2pp2sp", "dp2 overlap"])
def test_language_pretraining_leaves_the_towers_alone(world: World, reference: Reference, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    check(world.run(compare, 0, parallel, reference(0, (ranks, parallel)), ranks=ranks)[0])


@pytest.mark.parametrize("layout", RECOMPUTE)
def test_recomputing_activations_changes_nothing(
    world: World, reference: Reference, differences: dict[str, list[float]], layout: str
) -> None:
    ranks, parallel = RECOMPUTE[layout]
    comparison = world.run(compare, 3, parallel, reference(3, (ranks, parallel)), ranks=ranks)[0]
    differences[f"{layout}, stage 3"] = check(comparison)


@pytest.mark.parametrize("layout", MESSAGES)
def test_how_messages_travel_changes_nothing(
    world: World, reference: Reference, differences: dict[str, list[float]], layout: str
) -> None:
    ranks, parallel = MESSAGES[layout]
    comparison = world.run(compare, 3, parallel, reference(3, (ranks, parallel)), ranks=ranks)[0]
    differences[f"{layout}, stage 3"] = check(comparison)


def mark_summed(module: Stage) -> None:
    """A planted fault: tower gradients are summed over the tensor group instead of averaged."""
    for name, parameter in module.named_parameters():
        if module.component_of(name) in gradients.REPLICATED_COMPONENTS:
            parameter.sequence_parallel = True  # type: ignore[attr-defined]


def compare_with_summed_towers(stage: int, parallel: ParallelConfig, path: str) -> Comparison:
    return _with(gradients, "_mark_replicated", mark_summed, stage, parallel, path)


def compare_without_zero_gradients(stage: int, parallel: ParallelConfig, path: str) -> Comparison:
    """A planted fault: micro-batches without images leave the towers' gradients absent."""
    return _with(first_stage.FirstStage, "_without_images", lambda self, embedded: embedded, stage, parallel, path)


def _with(owner: object, name: str, fault: object, stage: int, parallel: ParallelConfig, path: str) -> Comparison:
    with patched(owner, name, fault):
        return compare(stage, parallel, path)


@contextmanager
def patched(owner: object, name: str, fault: object) -> Iterator[None]:
    """While open, `owner.name` is `fault`."""
    sound = getattr(owner, name)
    setattr(owner, name, fault)
    try:
        yield
    finally:
        setattr(owner, name, sound)


def test_the_comparison_sees_gradients_that_are_a_group_size_too_large(world: World, reference: Reference) -> None:
    ranks, parallel = LAYOUTS["tp2sp"]
    comparison = world.run(compare_with_summed_towers, 3, parallel, reference(3, (ranks, parallel)), ranks=ranks)[0]
    image = comparison.steps[STEP_NAMES.index("image")]
    doubled = {name for name, difference in image.gradients.items() if difference == pytest.approx(1, abs=0.01)}
    assert any(name.startswith("first_stage.towers.siglip") for name in doubled)
    assert any(name.startswith("first_stage.adaptor") for name in doubled)
    assert not any(name.startswith(("decoder", "last_stage")) for name in doubled)
    assert MODEL.sam is not None


def leave_unmarked(stage: Stage) -> None:
    """A planted fault: nobody sums the gradients of a rank's images over the tensor group."""


def join_without_sum(self: TensorGroupImages, features: Tensor, batch: MicroBatch) -> Tensor:
    """A planted fault: the backward pass cuts the gradient of the features without summing equal copies."""
    with patched(vision_placement, "gather_from_sequence_parallel_region", gather_cutting_backward):
        return SOUND_JOIN(self, features, batch)


def gather_cutting_backward(features: Tensor, group: ProcessGroup) -> Tensor:
    return gather_from_sequence_parallel_region(features, tensor_parallel_output_grad=False, group=group)


def join_without_last_share(self: TensorGroupImages, features: Tensor, batch: MicroBatch) -> Tensor:
    """A planted fault: the features of the last tensor rank are lost."""
    return SOUND_JOIN(self, features * (self.share.first < self.share.every - 1), batch)


SOUND_JOIN = TensorGroupImages.join


def compare_with(fault: str, stage: int, parallel: ParallelConfig, path: str) -> Comparison:
    owner, name, fault_function = {
        "unmarked": (gradients, "_mark_replicated", leave_unmarked),
        "no sum": (TensorGroupImages, "join", join_without_sum),
        "lost share": (TensorGroupImages, "join", join_without_last_share),
        "doubled": (gradients, "_mark_replicated", mark_summed),
        "turned": (AheadEncoder, "_gather", gather_turned),
        "counted by all": (optimizer, "param_is_not_tensor_parallel_duplicate", lambda parameter, group: True),
        "stale": (AheadEncoder, "_take", take_stale),
    }[fault]
    return _with(owner, name, fault_function, stage, parallel, path)


SOUND_GATHER, SOUND_TAKE = AheadEncoder._gather, AheadEncoder._take


def gather_turned(self: AheadEncoder, features: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """A planted fault: features that ran ahead come to the wrong images."""
    return {kind: of_all.flip(0) for kind, of_all in SOUND_GATHER(self, features, size).items()}


def take_stale(self: AheadEncoder, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """A planted fault: the features of the first step with images are taken in all steps after it."""
    own = SOUND_TAKE(self, micro_batches)
    most = len(own["siglip"])
    if most and not hasattr(self, "kept"):
        self.kept = own  # type: ignore[attr-defined]
    return {kind: self.kept[kind][:most] for kind in own} if most else own  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fault", "layout", "factor"),
    [
        ("unmarked", "tp2 split_tensor", None),
        ("no sum", "tp2 split_tensor", 0.5),
        ("doubled", "tp2pp2sp split_model", 2.0),
        ("lost share", "tp2 split_model", None),
        ("turned", "pp2 split_model", None),
    ],
)
def test_the_comparison_sees_faults_of_placement(
    world: World, reference: Reference, fault: str, layout: str, factor: float | None
) -> None:
    ranks, parallel = VISION_LAYOUTS[layout]
    comparison = world.run(compare_with, fault, 2, parallel, reference(2, (ranks, parallel)), ranks=ranks)[0]
    text, image = comparison.steps[0], comparison.steps[STEP_NAMES.index("image")]
    assert text.worst() <= TOLERANCE
    wrong = {n: d for n, d in image.gradients.items() if n.startswith("first_stage.") and "embedding" not in n}
    if factor is not None:  # a clean factor names the group
        assert wrong["first_stage.adaptor.layers.1.weight"] == pytest.approx(abs(factor - 1), abs=0.01)
        assert not any(d > TOLERANCE for n, d in image.gradients.items() if n not in wrong)
    assert max(wrong.values()) > 0.02
    assert (image.loss > 1e-4) == (fault in ("lost share", "turned"))
    assert bool(comparison.drifted) == (fault == "unmarked")


def test_the_comparison_sees_a_norm_that_counts_copies(world: World, reference: Reference) -> None:
    """Two tensor ranks hold copies of the towers and of the decoder's norms."""
    ranks, parallel = LAYOUTS["tp2sp"]
    path = reference(3, (ranks, parallel))
    comparison = world.run(compare_with, "counted by all", 3, parallel, path, ranks=ranks)[0]
    text, image = comparison.steps[0], comparison.steps[STEP_NAMES.index("image")]
    assert max(text.gradients.values()) <= TOLERANCE < min(text.grad_norms["decoder"], text.grad_norm)
    assert image.grad_norms["siglip"] == pytest.approx(2**0.5 - 1, abs=0.01)


def test_the_comparison_sees_features_of_an_earlier_step(world: World, reference: Reference) -> None:
    ranks, parallel = VISION_LAYOUTS["pp2 split_model"]
    path = reference(2, (ranks, parallel))
    steps = world.run(compare_with, "stale", 2, parallel, path, ranks=ranks)[0].steps
    at = STEP_NAMES.index("image")
    assert max(step.worst() for step in steps[: at + 1]) <= TOLERANCE
    assert max(step.loss for step in steps[at + 1 :]) > 1e-4


def test_overlapped_reduction_needs_the_zero_gradients(world: World, reference: Reference) -> None:
    ranks, parallel = LAYOUTS["dp2 overlap"]
    with pytest.raises(WorldError):
        world.run(
            compare_without_zero_gradients, 3, parallel, reference(3, (ranks, parallel)), ranks=ranks, timeout_s=60
        )
