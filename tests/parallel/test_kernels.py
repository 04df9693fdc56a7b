"""Fused operators over several ranks equal one process in plain PyTorch: loss, every gradient, parameters.

Without a GPU they run in Triton's interpreter, so the batches are few and small.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import MODEL, TOLERANCE
from world import World

from megavl.config import KernelsConfig, ParallelConfig
from megavl.ops import make_ops
from megavl.parallel.groups import init_groups
from megavl.training.parity import Comparison, run_layout
from megavl.training.reference_steps import Question, run_reference
from megavl.training.synthetic_batches import global_batch

ALL = replace(
    KernelsConfig(**dict.fromkeys(KernelsConfig.__dataclass_fields__, "triton")), interpolate_conv="reference"
)
LOSS = KernelsConfig(linear_cross_entropy="triton")
VISION = KernelsConfig(adaptor="triton", image_scatter="triton")
BUCKET_SIZE = 3000
"""Parameters; about 10 buckets."""


def question(kernels: KernelsConfig, stage: int) -> Question:
    """One micro-batch with an image, two steps with images, or two of text in which a micro-batch has no label."""
    if kernels == ALL:
        return Question(model=MODEL, stage=stage, batches=[global_batch(MODEL, "image", micro_batches=1, tokens=32)])
    if kernels == VISION:
        batches = [global_batch(MODEL, "image", micro_batches=2, tokens=40, seed=step) for step in range(2)]
        return Question(model=MODEL, stage=stage, batches=batches)
    batches = [global_batch(MODEL, "text", micro_batches=4, tokens=16, seed=step) for step in range(2)]
    return Question(model=MODEL, stage=stage, batches=batches)


def save_reference(asked: Question, path: str) -> None:
    """In a world of one."""
    torch.save(run_reference(asked, init_groups(ParallelConfig(device="cpu"))), path)


def compare(asked: Question, parallel: ParallelConfig, kernels: KernelsConfig, path: str) -> Comparison:
    """In any world."""
    groups = init_groups(parallel)
    records = torch.load(path, weights_only=False)  # written by this test
    ops = make_ops(kernels, groups.device, asked.dtype)
    return run_layout(asked, parallel, groups, records, bucket_size=BUCKET_SIZE, ops=ops)


_SP = {"tensor": 2, "sequence": True}
_OVERLAP = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    ("ranks", "fields", "kernels", "stage"),
    [
        pytest.param(2, {"tensor": 2}, LOSS, 3, id="loss, tp2"),
        pytest.param(2, _SP, LOSS, 3, id="loss, tp2sp"),
        pytest.param(2, _SP, LOSS, 1, id="loss, tp2sp, frozen head"),
        pytest.param(4, {**_SP, "pipeline": 2}, LOSS, 3, id="loss, tp2pp2sp"),
        pytest.param(2, _OVERLAP, LOSS, 3, id="loss, dp2 distributed overlap"),
        pytest.param(2, _OVERLAP, VISION, 2, id="adaptor and scatter, dp2 distributed overlap"),
        pytest.param(2, _SP, ALL, 3, id="all, tp2sp"),
    ],
)
def test_fused_layout_equals_plain_process(
    world: World, tmp_path: Path, ranks: int, fields: dict, kernels: KernelsConfig, stage: int
) -> None:
    asked, path = question(kernels, stage), str(tmp_path / "reference.pt")
    world.run(save_reference, asked, path, ranks=1)
    comparison = world.run(compare, asked, ParallelConfig(device="cpu", **fields), kernels, path, ranks=ranks)[0]
    assert comparison.missing == []
    assert comparison.drifted == []
    for step in comparison.steps:
        off = {n: d for kind in (step.gradients, step.parameters) for n, d in kind.items() if d > TOLERANCE}
        assert step.worst() <= TOLERANCE, f"loss {step.loss}, norm {step.grad_norm}, {off}"
