"""Where images are encoded: who computes what, steps whose images most ranks do not have, budgets, copies, cache.

That every placement equals one process is in `test_layouts.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import MODEL
from torch import Tensor
from world import World

from megavl.config import ParallelConfig, VisionPlacement
from megavl.data.microbatch import MicroBatch, StepBatch
from megavl.model.build import build_stages
from megavl.model.vision.sam import SamTower
from megavl.model.vision.siglip import SiglipTower
from megavl.model.vision.tower import VisionTowers
from megavl.parallel.gradients import wrap_stages
from megavl.parallel.groups import Groups, destroy_groups, init_groups
from megavl.parallel.random_state import seed_everything
from megavl.parallel.vision_ahead import AheadEncoder, make_ahead_encoder
from megavl.parallel.vision_placement import TensorGroupImages
from megavl.training.freeze import apply_freeze, frozen_components
from megavl.training.optimizer import make_optimizer
from megavl.training.reference_steps import PARITY_OPTIM
from megavl.training.step import forward_only, train_step
from megavl.training.synthetic_batches import global_batch, share

MODEL_PARALLEL = ParallelConfig(device="cpu", tensor=2, pipeline=2, sequence=True, vision_batch=2)
PLACEMENTS: tuple[VisionPlacement, ...] = ("replicate", "split_tensor", "split_model")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank saw of a step."""

    loss: float
    grad_norm: float
    encoded: int
    """Images that went through SAM here."""
    hits: int
    """Features that the cache had."""


def one_image(at: int) -> tuple[MicroBatch, ...]:
    """Four micro-batches with one image in all, in micro-batch `at`."""
    text, images = global_batch(MODEL, "text", micro_batches=4), global_batch(MODEL, "image", micro_batches=4)
    assert images[0].num_images == 1
    return share([images[0] if index == at else text[index] for index in range(4)], 0, 1)


def many_images() -> tuple[MicroBatch, ...]:
    """Eight micro-batches of 1 to 3 images."""
    return share(global_batch(MODEL, "image"), 0, 1)


def measure(
    parallel: ParallelConfig,
    batches: Sequence[tuple[MicroBatch, ...]],
    stage: int = 2,
    limit: int | None = None,
    ahead: int = 0,
) -> list[Measured]:
    """A step of each batch, from weights of which some frozen ones were changed after they were made.

    With `ahead` = 1 each step is told which comes next, with 2 of the one after; then there is an evaluation between.
    """
    groups = init_groups(parallel)
    seed_everything(1, groups)
    stages = build_stages(MODEL, parallel, dtype=torch.float32, seed=1, pg=groups.pg, device=groups.device)
    if stages[0].first_stage is not None:  # as loading a checkpoint does
        stages[0].first_stage.towers.sam.blocks[0].attn.qkv.weight.data.mul_(3)
    apply_freeze(stages, stage)
    chunks = wrap_stages(stages, parallel, groups)
    optimizer = make_optimizer(chunks, PARITY_OPTIM, parallel, groups)
    encoder = make_ahead_encoder(stages, MODEL, parallel, groups, frozen=frozen_components(stage))
    if encoder is not None and limit is not None:
        encoder.limit = limit
    measured = []
    steps = [StepBatch(step=s, language_rows=0, micro_batches=batch) for s, batch in enumerate(batches)]
    for index, step in enumerate(steps):
        told = steps[index + ahead] if ahead and index + ahead < len(steps) else None
        with images_through_sam() as counts:
            result = train_step(chunks, optimizer, step, groups, lr=1e-3, encoder=encoder, upcoming=told)
        if ahead:
            forward_only(chunks, batches[0], groups)
        hits = encoder.cache.hits if encoder is not None and encoder.cache is not None else 0
        measured.append(Measured(loss=result.loss, grad_norm=result.grad_norm, encoded=sum(counts), hits=hits))
    forward_only(chunks, batches[0], groups)
    destroy_groups(leave_world=False)
    return measured


@contextmanager
def images_through_sam() -> Iterator[list[int]]:
    """While open, the number of images of each call of SAM's trunk."""
    counts: list[int] = []
    trunk = SamTower.trunk

    def counting(self: SamTower, images: Tensor) -> tuple[Tensor, Tensor]:
        counts.append(len(images))
        return trunk(self, images)

    SamTower.trunk = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        SamTower.trunk = trunk  # type: ignore[method-assign]


def no_images() -> tuple[MicroBatch, ...]:
    """Four micro-batches of text."""
    return share(global_batch(MODEL, "text", micro_batches=4), 0, 1)


def lonely_images() -> dict[str, list[Measured]]:
    """Steps with one image, in the first, an inner and the last micro-batch, then none, then many."""
    batches = [one_image(0), one_image(2), one_image(3), no_images(), many_images()]
    found = {vision: measure(replace(MODEL_PARALLEL, vision=vision), batches) for vision in PLACEMENTS}
    parallel = replace(MODEL_PARALLEL, vision="split_model")
    return found | {"next": measure(parallel, batches, ahead=1), "other": measure(parallel, batches, ahead=2)}


def test_each_placement_computes_its_share_and_the_same_step(world: World) -> None:
    ranks = world.run(lonely_images)
    images = sum(b.num_images for b in many_images())
    for vision in PLACEMENTS:
        for step, expected in enumerate(ranks[0]["replicate"]):
            for rank in ranks:
                assert rank[vision][step].loss == pytest.approx(expected.loss, rel=2e-6)
                assert rank[vision][step].grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    encoded = {v: [[m.encoded for m in rank[v]] for rank in ranks] for v in PLACEMENTS}  # ranks: tensor, then pipeline
    assert encoded["replicate"] == [[1, 1, 1, 0, images]] * 2 + [[0] * 5] * 2
    for vision, sharing in (("split_tensor", 2), ("split_model", 4)):
        last = [of_rank[4] for of_rank in encoded[vision]]
        assert [sum(step) for step in zip(*encoded[vision], strict=True)] == [1, 1, 1, 0, images]
        assert max(last[:sharing]) - min(last[:sharing]) <= 1
        assert last[sharing:] == [0] * (4 - sharing)
    check_early_starts(ranks, images)


def check_early_starts(ranks: list[dict[str, list[Measured]]], images: int) -> None:
    """What was begun a step early is bit for bit what a step makes for itself, and used for that step alone."""
    encoded = {}
    for told in ("next", "other"):
        for rank in ranks:
            for step, late in zip(rank[told], rank["split_model"], strict=True):
                assert (step.loss, step.grad_norm) == (late.loss, late.grad_norm)
        encoded[told] = [sum(rank[told][step].encoded for rank in ranks) for step in range(5)]
    assert encoded["next"] == [2, 1, 0, images, 0]
    assert encoded["other"] == [2, 1, 1 + images, 0, images]


def budgets() -> list[list[Measured]]:
    """The same step with room for none, three and all of its images, SigLIP trained or not."""
    parallel = replace(MODEL_PARALLEL, vision="split_model")
    return [measure(parallel, [many_images()], stage, limit) for stage in (2, 3) for limit in (0, 3, 100)]


def test_images_beyond_the_budget_are_encoded_in_the_schedule(world: World) -> None:
    ranks = world.run(budgets)
    images = sum(b.num_images for b in many_images())
    for first in (0, 3):
        of_stage = [[rank[i][0] for rank in ranks] for i in range(first, first + 3)]
        assert all(sum(m.encoded for m in ms) == images for ms in of_stage)
        later_ranks = [sum(m.encoded for m in ms[2:]) for ms in of_stage]
        assert 0 == later_ranks[0] < later_ranks[1] < later_ranks[2]
        for ms in of_stage:
            assert ms[0].loss == pytest.approx(of_stage[0][0].loss, rel=2e-6)
            assert ms[0].grad_norm == pytest.approx(of_stage[0][0].grad_norm, rel=1e-5)


def cached(folder: str) -> list[list[Measured]]:
    """Two runs that share a cache."""
    parallel = replace(MODEL_PARALLEL, vision="split_model", vision_cache=folder)
    return [measure(parallel, [many_images()]) for _ in range(2)]


def test_cached_features_change_nothing(world: World, tmp_path: Path) -> None:
    first, second = zip(*world.run(cached, str(tmp_path / "cache")), strict=True)
    images = sum(b.num_images for b in many_images())
    assert sum(run[0].encoded for run in first) == images == sum(run[0].hits for run in second)
    assert sum(run[0].encoded for run in second) == 0
    assert [run[0].loss for run in first] == [run[0].loss for run in second]


def joined(groups_of: ParallelConfig) -> None:
    """Every offset and number of images over four tensor ranks: features and their gradients beside plain ones."""
    groups: Groups = init_groups(groups_of)
    placed = TensorGroupImages(groups.pg.tp)
    template = one_image(0)[0]
    for before in range(5):
        for count in range(1, 10):
            batch = replace(template, num_images=count, images_before=before)
            features = torch.arange(count * 6.0).view(count, 2, 3)
            weights = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(count))
            own = features[list(placed.share.of(batch))].requires_grad_()
            result = placed.join(own, batch)
            assert torch.equal(result, features)
            (result * weights).sum().backward()
            assert own.grad is not None
            assert torch.equal(own.grad, 4 * weights[list(placed.share.of(batch))])


def test_features_are_joined_in_reading_order(world: World) -> None:
    world.run(joined, ParallelConfig(device="cpu", tensor=4))


def incomplete_step() -> list[Any]:
    """An encoder is given a part of a step, whose images it would deal to the wrong ranks."""
    groups = init_groups(ParallelConfig(device="cpu"))
    parallel = ParallelConfig(device="cpu", vision="split_model")
    stages = build_stages(MODEL, parallel, dtype=torch.float32, seed=1, pg=groups.pg, device=groups.device)
    encoder = make_ahead_encoder(stages, MODEL, parallel, groups, frozen=frozen_components(2))
    assert isinstance(encoder, AheadEncoder)
    with pytest.raises(AssertionError, match="not a whole step"):
        encoder(many_images()[2:])
    return []


def test_a_part_of_a_step_is_refused(world: World) -> None:
    world.run(incomplete_step, ranks=1)


def compiled() -> int:
    """Blocks that an encoder has had compiled, by a compiler that does nothing."""
    parallel = ParallelConfig(device="cpu", pipeline=2, vision="split_model", compile_vision=True)
    groups, blocks = init_groups(parallel), 0

    def compile_frozen(self: VisionTowers) -> None:
        nonlocal blocks
        blocks += sum(len(tower.blocks) for tower in self.children() if isinstance(tower, SamTower | SiglipTower))

    stages = build_stages(MODEL, parallel, dtype=torch.float32, seed=1, pg=groups.pg, device=groups.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTowers, "compile_frozen", compile_frozen)
        make_ahead_encoder(stages, MODEL, parallel, groups, frozen=frozen_components(3))
    return blocks


def test_copies_of_towers_are_compiled(world: World) -> None:
    """Those of later ranks, in stage 3 SAM's alone; `compile_frozen_towers` has seen to the first rank's own."""
    assert MODEL.sam is not None
    assert world.run(compiled, ranks=2) == [0, MODEL.sam.layers]
