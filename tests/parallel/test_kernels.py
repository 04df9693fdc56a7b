"""Fused operators over several ranks equal one process in plain PyTorch: loss, every gradient, parameters.

Without a GPU they run in Triton's interpreter, so the batches are few and small.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import MODEL, TOLERANCE
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor
from torch.nn import functional
from world import World

from megavl.config import KernelsConfig, ParallelConfig
from megavl.data.microbatch import IGNORE
from megavl.model.build import transformer_config
from megavl.model.last_stage import LastStage
from megavl.ops import PLAIN, make_ops
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


RANKS, VOCABULARY = 2, 66


def cut_head(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor) -> dict[str, list[Tensor]]:
    """One rank's sum, losses, gradient of hidden and of its part of the weight, for four ways of calling."""
    from megavl.kernels.linear_cross_entropy.op import linear_cross_entropy

    start = dist.get_rank() * VOCABULARY // RANKS
    weight = weight[start : start + VOCABULARY // RANKS]

    def gradients(labels: Tensor, **options: Any) -> list[Tensor]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"group": dist.group.WORLD, "vocab_start": start, "chunk_rows": 4, **options}
        total, losses = linear_cross_entropy(x, w, labels, **options)
        total.backward()
        assert x.grad is not None
        assert w.grad is not None
        return [total.detach(), losses, x.grad, w.grad]

    return {
        "whole": gradients(targets),
        "rows": gradients(targets, rows=rows),
        "partial": gradients(targets, reduce_hidden_gradient=False),
        "none": gradients(torch.full_like(targets, IGNORE)),
    }


def test_loss_cut_over_ranks_equals_the_whole(world: World) -> None:
    """Targets on either rank, the last rows on one rank only; logits around 300, on one rank higher."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (10, VOCABULARY))
    weight /= 4
    targets = torch.randint(VOCABULARY, (10,), generator=generator)
    targets[3], targets[7] = IGNORE, IGNORE
    hidden[:, 0], weight[:, 0] = 30.0, 10.0  # overflow unless the maximum is that of all ranks
    weight[: VOCABULARY // RANKS, 0] = 9.5
    targets[-2:] = torch.tensor([0, 1])  # on the first rank, whose columns hardly count here
    rows = (targets != IGNORE).nonzero().squeeze(1)
    ranks = world.run(cut_head, hidden, weight, targets, rows, ranks=RANKS)

    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    losses = functional.cross_entropy(x @ w.t(), targets, reduction="none", ignore_index=IGNORE)
    losses.sum().backward()
    truth = [losses.sum(), losses, x.grad, w.grad]

    def distance(value: Tensor, index: int) -> float:
        expected = truth[index]
        assert expected is not None
        return ((value - expected).norm() / expected.norm()).item()

    bound = 1e-4  # fp32 rounds logits around 300 by up to 3e-5, and that is an error of the exponential
    for case in ("whole", "rows"):
        for index in range(3):  # sum, losses, gradient of hidden: the same bits on both ranks
            assert torch.equal(ranks[0][case][index], ranks[1][case][index])
            assert distance(ranks[0][case][index], index) < bound
        assert distance(torch.cat([r[case][3] for r in ranks]), 3) < bound
    parts = [r["partial"][2] for r in ranks]
    assert distance(parts[0] + parts[1], 2) < bound
    assert distance(parts[0], 2) > 0.1
    assert not any(x.any() for r in ranks for x in r["none"])


def head_gradient(dtype: torch.dtype, fused: bool, overlap: bool) -> tuple[Tensor, list[bool]]:
    """The second of two steps of two micro-batches: the head's gradient summed over the data-parallel ranks, and for
    each backward pass whether the gradient that the wrapper's hook met took no memory."""
    parallel = ParallelConfig(device="cpu")
    groups = init_groups(parallel)
    ops = make_ops(LOSS, groups.device, dtype) if fused else PLAIN
    config = transformer_config(MODEL, parallel, dtype=dtype, device=groups.device, ops=ops)
    stage = LastStage(config, MODEL.decoder.vocab, groups.pg, ops)
    weight = stage.head.weight
    torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(7))
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    wrapped = DistributedDataParallel(config, options, stage, pg_collection=groups.pg)
    without_memory: list[bool] = []
    weight.register_post_accumulate_grad_hook(lambda w: without_memory.append(w.grad.data_ptr() == w.data_ptr()))
    generator = torch.Generator().manual_seed(groups.rank)
    hidden = torch.randn(2, 12, 1, MODEL.decoder.hidden, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(MODEL.decoder.vocab, (2, 12), generator=generator)
    labels[0, 3:5] = IGNORE
    for _ in range(2):
        wrapped.zero_grad_buffer()
        with torch.no_grad():
            wrapped(hidden[0], labels[0])  # a measurement leaves no gradient
        with wrapped.no_sync():
            wrapped(hidden[0], labels[0]).sum().backward()
        wrapped(hidden[1], labels[1]).sum().backward()
        wrapped.finish_grad_sync()
    return weight.main_grad.clone(), without_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_head_adds_its_gradient_to_the_buffer_of_the_wrapper(world: World, dtype: torch.dtype) -> None:
    """fp16 stands for bf16, which the interpreter computes wrongly: parameters narrower than the buffer."""
    plain, unfused = world.run(head_gradient, dtype, False, False, ranks=2)[0]
    added, fused = world.run(head_gradient, dtype, True, False, ranks=2)[0]
    overlapped, _ = world.run(head_gradient, dtype, True, True, ranks=2)[0]
    assert added.dtype is torch.float32
    assert torch.equal(added, overlapped)
    assert ((added - plain).norm() / plain.norm()).item() <= max(2 * torch.finfo(dtype).eps, 1e-6)
    assert (unfused, fused) == ([False] * 4, [True] * 4)
