"""What a step does besides computing gradients: skipping, steps without images, momentum, evaluation, bf16."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, MODEL, TOLERANCE
from torch import Tensor
from trainer import Trainer
from world import World

from megavl.config import ParallelConfig
from megavl.data.microbatch import IGNORE, MicroBatch, StepBatch
from megavl.model.shards import full_parameters
from megavl.model.vision.tower import VisionTowers
from megavl.parallel.gradients import replicas_differ, unwrap
from megavl.training.reference_steps import PARITY_OPTIM
from megavl.training.step import StepResult, forward_only, skip_reason, train_step
from megavl.training.synthetic_batches import Case, global_batch, share


def totals(parallel: ParallelConfig) -> list[StepResult]:
    """Results of an image and a mixed step."""
    trainer = Trainer(parallel)
    return [trainer.step("image"), trainer.step("mixed")]


@pytest.mark.parametrize("layout", ["tp2pp2sp", "pp2vpp2dp2 distributed overlap"])
def test_every_rank_reports_the_totals_of_the_global_batch(world: World, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    results = world.run(totals, parallel, ranks=ranks)
    assert all(r == results[0] for r in results)
    for result, case in zip(results[0], ("image", "mixed"), strict=True):
        batch = global_batch(MODEL, case, micro_batches=4)
        labels = {m: sum(int((b.labels != IGNORE).sum()) for b in batch if b.modality == m) for m in result.loss_tokens}
        assert result.loss_tokens == labels
        assert result.supervised_tokens == sum(labels.values())
        assert result.images == sum(b.num_images for b in batch)
        assert result.tokens == sum(b.tokens.numel() for b in batch)
        assert result.loss == pytest.approx(sum(result.loss_sums.values()) / result.supervised_tokens)
        assert result.grad_norms.keys() == {"sam_adaptor", "siglip", "aligner", "decoder"}  # what stage 3 trains
        assert result.skipped == ""


def spoil_and_recover(
    parallel: ParallelConfig, spoiled_rank: int, value: float, *, only_siglip: bool = False
) -> tuple[str, list[str], str]:
    """A step in which one rank computes `value`, then a sound one: (reason, parameters that moved, second reason)."""
    trainer = Trainer(parallel)
    trainer.step("image")
    before = trainer.parameters()
    handles = []
    if trainer.groups.rank == spoiled_rank and only_siglip:
        weight = trainer.stages[0].first_stage.towers.siglip.blocks[0].attn.qkv.weight
        handles.append(weight.register_hook(lambda gradient: gradient * value))
    elif trainer.groups.rank == spoiled_rank:
        decoder = trainer.stages[0].decoder
        handles.append(decoder.layers[0].register_forward_hook(lambda *a: (a[2][0] * value, *a[2][1:])))
    bad = trainer.step("image")
    for handle in handles:
        handle.remove()
    after = trainer.parameters()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return bad.skipped, moved, trainer.step("image").skipped


@pytest.mark.parametrize("layout", ["tp2pp2sp", "pp2dp2 overlap", "tp2dp2sp distributed overlap"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_on_one_rank_skips_the_update_on_all(
    world: World, layout: str, value: float
) -> None:
    ranks, parallel = LAYOUTS[layout]
    for reason, moved, second in world.run(spoil_and_recover, parallel, 1, value, ranks=ranks):
        assert reason == "the loss is nan (not finite: the gradient of sam_adaptor, siglip, aligner, decoder)"
        assert moved == []
        assert second == ""


def spoil_siglip(parallel: ParallelConfig) -> tuple[str, list[str], str]:
    """As above, where the gradient of one weight of SigLIP overflows on one rank."""
    return spoil_and_recover(parallel, 1, math.inf, only_siglip=True)


@pytest.mark.parametrize("layout", ["tp2pp2sp", "dp2 distributed overlap"])
def test_the_reason_names_the_component_whose_gradient_is_not_finite(world: World, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    for reason, moved, second in world.run(spoil_siglip, parallel, ranks=ranks):
        assert reason in [f"the gradient norm is {x} (not finite: the gradient of siglip)" for x in ("inf", "nan")]
        assert moved == []
        assert second == ""


@pytest.mark.parametrize(
    ("labels", "loss", "norms", "sentence"),
    [
        (0, math.nan, {"decoder": 0.0}, "no token of the global batch has a label"),
        (9, math.inf, {"siglip": 1.0, "decoder": 2.0}, "the loss is inf"),
        (9, math.nan, {"siglip": 1.0, "decoder": math.nan}, "the loss is nan (not finite: the gradient of decoder)"),
        (
            9,
            2.5,
            {"siglip": math.inf, "aligner": math.nan, "decoder": 2.0},
            "the gradient norm is inf (not finite: the gradient of siglip, aligner)",
        ),
    ],
    ids=["no labels", "loss", "both", "gradient"],
)
def test_the_reason_in_words(labels: int, loss: float, norms: dict[str, float], sentence: str) -> None:
    assert skip_reason(labels, loss, math.hypot(*norms.values()), norms) == sentence


def step_without_labels(parallel: ParallelConfig) -> tuple[StepResult, bool]:
    """A global batch in which nothing is to be learnt."""
    trainer = Trainer(parallel)
    before = trainer.parameters()
    batch = (global_batch(MODEL, "image")[1],)  # of the three kinds of micro-batch, the one without labels
    step = StepBatch(step=0, language_rows=0, micro_batches=batch)
    result = train_step(trainer.chunks, trainer.optimizer, step, trainer.groups, lr=1e-2)
    return result, all(torch.equal(before[n], p) for n, p in trainer.parameters().items())


def test_a_step_without_labels_is_skipped(world: World) -> None:
    for result, unmoved in world.run(step_without_labels, LAYOUTS["pp2"][1], ranks=2):
        assert (result.supervised_tokens, result.grad_norm, unmoved) == (0, 0, True)
        assert result.skipped == "no token of the global batch has a label"


def text_step_with_broken_towers(parallel: ParallelConfig) -> float:
    """A text step whose towers raise when they are run."""

    def explode(*_: Any) -> None:
        raise AssertionError("a step without images ran the towers")

    trainer, forward = Trainer(parallel), VisionTowers.forward
    VisionTowers.forward = explode  # type: ignore[method-assign]
    try:
        return trainer.step("text").loss
    finally:
        VisionTowers.forward = forward  # type: ignore[method-assign]


def test_a_step_without_images_does_not_touch_the_towers(world: World) -> None:
    assert len(set(world.run(text_step_with_broken_towers, LAYOUTS["pp2dp2 overlap"][1]))) == 1


def momentum(parallel: ParallelConfig) -> tuple[list[float], float]:
    """How far SigLIP and SAM's frozen part move in an image step and two text steps."""
    trainer = Trainer(parallel)
    moves, frozen = [], 0.0
    before = trainer.parameters()
    for case in ("image", "text", "text"):
        trainer.step(case)
        after = trainer.parameters()
        change = {name: (after[name] - before[name]).abs().max().item() for name in before}
        before = after
        moves.append(change["first_stage.towers.siglip.blocks.0.attn.qkv.weight"])
        frozen = max(frozen, change["first_stage.towers.sam.blocks.0.attn.qkv.weight"])
    return moves, frozen


def test_text_steps_move_siglip_by_momentum_and_leave_frozen_parts_alone(world: World) -> None:
    """As documented in training/optimizer.py. With AdamW's bias correction after 1, 2 and 3 updates and a large epsilon
    the moves shrink by 0.9 * (1 - 0.9) / (1 - 0.9^2) = 0.474 and then by 0.9 * (1 - 0.9^2) / (1 - 0.9^3) = 0.631."""
    ((image, first, second), frozen) = world.run(momentum, ParallelConfig(device="cpu"), ranks=1)[0]
    assert image > 0
    assert frozen == 0
    assert first / image == pytest.approx(0.474, rel=0.1)
    assert second / first == pytest.approx(0.631, rel=0.1)


def token_losses(parallel: ParallelConfig, count: int) -> list[Tensor]:
    """Token losses of `count` micro-batches after one step."""
    trainer = Trainer(parallel)
    trainer.step("image", vision_lr=0.0)
    return forward_only(trainer.chunks, global_batch(MODEL, "packed")[:count], trainer.groups)


@pytest.mark.parametrize("layout", ["pp2vpp2", "tp2pp2sp", "dp2 distributed overlap"])
def test_evaluation_gives_token_losses_on_the_last_stage(world: World, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    (expected,) = world.run(token_losses, ParallelConfig(device="cpu"), 3, ranks=1)
    results = world.run(token_losses, parallel, 3, ranks=ranks)
    on_last = ranks if parallel.pipeline == 1 else ranks // 2  # the later half of the ranks
    assert [len(r) for r in results] == [0] * (ranks - on_last) + [3] * on_last
    for losses in results[-on_last:]:
        for loss, wanted in zip(losses, expected, strict=True):
            torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


def joined(batch: list[MicroBatch], rows: int) -> list[MicroBatch]:
    """The same global batch in micro-batches of `rows` rows each."""
    return [_one_stream(batch[start : start + rows]) for start in range(0, len(batch), rows)]


def _one_stream(rows: list[MicroBatch]) -> MicroBatch:
    starts = list(itertools.accumulate((row.tokens.numel() for row in rows), initial=0))
    ends = [start + row.cu_seqlens[1:] for start, row in zip(starts, rows, strict=False)]
    pixels = [row.pixels for row in rows if row.pixels is not None]
    return replace(
        rows[0],
        tokens=torch.cat([row.tokens for row in rows]),
        labels=torch.cat([row.labels for row in rows]),
        positions=torch.cat([row.positions for row in rows]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), *ends]).int(),
        max_document=max(row.max_document for row in rows),
        pixels=torch.cat(pixels) if pixels else None,
        image_slots=torch.cat([start + row.image_slots for start, row in zip(starts, rows, strict=False)]),
        num_images=sum(row.num_images for row in rows),
        modality=None,
        sample_ids=(),
    )


def gradients_of_a_cut(case: Case, rows: int) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and every gradient of one step on `rows` rows at a time."""
    trainer = Trainer(ParallelConfig(device="cpu"))
    mine = share(joined(global_batch(MODEL, case), rows), trainer.groups.data_rank, trainer.groups.data_size)
    step = StepBatch(step=0, language_rows=0, micro_batches=mine)
    gradients: dict[str, Tensor] = {}
    finalize = trainer.stages[0].config.finalize_model_grads_func

    def finalize_and_record(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        gradients.update({n: p.main_grad.clone() for n, _, p in full_parameters(trainer.stages) if p.requires_grad})

    trainer.stages[0].config.finalize_model_grads_func = finalize_and_record
    result = train_step(trainer.chunks, trainer.optimizer, step, trainer.groups, lr=1e-2)
    return result.loss, result.grad_norm, gradients


@pytest.mark.parametrize("case", ["mixed", "packed"])
def test_it_does_not_matter_how_the_global_batch_is_cut(world: World, case: Case) -> None:
    """Eight rows of which some have 57 labels and some none, as 8x1, 4x2, 2x4, 1x8, and over two ranks."""
    (whole,) = world.run(gradients_of_a_cut, case, 8, ranks=1)
    largest = max(gradient.abs().max().item() for gradient in whole[2].values())
    for rows, ranks in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2)):
        for loss, norm, gradients in world.run(gradients_of_a_cut, case, rows, ranks=ranks):
            assert loss == pytest.approx(whole[0], rel=TOLERANCE)
            assert norm == pytest.approx(whole[1], rel=TOLERANCE)
            assert gradients.keys() == whole[2].keys()
            for name, gradient in gradients.items():
                least = 0.1 * largest if gradient.numel() == 1 else 0.01 * largest  # as training/parity.py says
                size = max(whole[2][name].abs().max().item(), least)
                assert (gradient - whole[2][name]).abs().max().item() <= TOLERANCE * size, (name, rows, ranks)


def twenty_steps(parallel: ParallelConfig) -> tuple[list[float], list[float], list[float], list[str]]:
    """Losses, gradient norms, megatron-core's norms of the clipped gradients, drifted copies of 20 bf16 steps."""
    trainer = Trainer(parallel, dtype=torch.bfloat16)
    count = 2 * trainer.groups.data_size
    results, clipped = [], []
    for n in range(20):
        results.append(trainer.step(("image", "mixed", "text", "packed")[n % 4], micro_batches=count))
        clipped.append(float(trainer.optimizer.get_grad_norm()))
    drifted = replicas_differ(unwrap(trainer.chunks), trainer.groups.pg.tp)
    return [r.loss for r in results], [r.grad_norm for r in results], clipped, drifted


@pytest.mark.parametrize("layout", ["tp2pp2sp", "tp2dp2sp distributed overlap"])
def test_twenty_bf16_steps_learn_stay_finite_and_keep_copies_equal(world: World, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    for losses, norms, clipped, drifted in world.run(twenty_steps, parallel, ranks=ranks):
        assert all(map(math.isfinite, losses + norms))
        assert clipped == pytest.approx([min(norm, PARITY_OPTIM.clip) for norm in norms], rel=1e-4)
        assert sum(losses[-4:]) < sum(losses[:4])
        assert drifted == []
