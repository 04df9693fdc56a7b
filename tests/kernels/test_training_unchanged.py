"""Training is the same with kernels and without: losses of 20 steps, and every gradient of one.

Here: a hybrid model of 2 layers on one process. Without a GPU the kernels run in Triton's interpreter.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megavl.config import DecoderConfig, KernelsConfig, ModelConfig, ParallelConfig, SamConfig, SiglipConfig
from megavl.data.microbatch import IGNORE, MicroBatch
from megavl.model.build import build_stages
from megavl.model.stage import Stage
from megavl.ops import PLAIN, Ops, make_ops
from megavl.parallel.groups import Groups, destroy_groups, init_groups
from megavl.training.freeze import apply_freeze
from megavl.training.synthetic_batches import Case, global_batch
from tests.kernels.compare import relative_error

MODEL = ModelConfig(
    decoder=DecoderConfig(layers=2, hidden=16, heads=2, kv_heads=1, ffn=24, vocab=32, init_std=0.2),
    siglip=SiglipConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp=24),
    sam=SamConfig(
        image_size=32,
        patch_size=8,
        width=16,
        layers=2,
        heads=2,
        mlp=24,
        window=3,  # of a grid of 4: windows stick out
        global_layers=(1,),
        neck=8,
        upsample=8,
        downsample=(8, 16),
    ),
    adaptor="hybrid",
    background=(122, 116, 104),
)
SHALLOW = replace(MODEL, decoder=replace(MODEL.decoder, layers=1))
"""For many steps: the interpreter costs milliseconds a token and layer."""
STEPS = 20


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    yield init_groups(ParallelConfig())
    destroy_groups()


@pytest.fixture
def ops(groups: Groups) -> Ops:
    """Every kernel but the one in place of two others, which has the same test in test_interpolate_conv.py."""
    kernels = KernelsConfig(**dict.fromkeys(KernelsConfig.__dataclass_fields__, "triton"))
    return make_ops(replace(kernels, interpolate_conv="reference"), groups.device, torch.float32)


def build(groups: Groups, ops: Ops, dtype: torch.dtype = torch.float32, model: ModelConfig = MODEL) -> Stage:
    """The same weights whatever `ops` and `dtype`; trained as in stage 3, with the side branch of SAM awake."""
    arguments = {"dtype": torch.float32, "seed": 3, "pg": groups.pg, "device": groups.device}
    (stage,) = build_stages(model, ParallelConfig(), ops=ops, **arguments)
    stage.first_stage.towers.sam.hd_alpha_downsamples.data.fill_(0.5)
    apply_freeze([stage], 3)
    return stage.to(dtype)


def batch_of(case: Case, tokens: int, seed: int, device: torch.device) -> MicroBatch:
    (batch,) = global_batch(MODEL, case, micro_batches=1, tokens=tokens, seed=seed)
    return batch.to(device)


def mean_loss(stage: Stage, batch: MicroBatch) -> Tensor:
    return stage(batch).sum() / (batch.labels != IGNORE).sum()


def train(stage: Stage, device: torch.device) -> Tensor:
    """Loss of each step, in float64; an image in every fourth step, the batches repeat after 8."""
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = mean_loss(stage, batch_of("text" if step % 4 else "image", 8, step % 8, device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def hold(what: str, ours: Tensor, truth: Tensor, own: float) -> None:
    """At most twice PyTorch's own error, and never asked to be better than a few roundings."""
    error = relative_error(ours, truth)
    assert error <= max(2 * own, 16 * torch.finfo(torch.float32).eps), f"{what}: {error:.2e}, PyTorch's own {own:.2e}"


def in_three_ways(
    groups: Groups, ops: Ops, measure: Callable[[Stage], Tensor], model: ModelConfig = MODEL
) -> tuple[Tensor, Tensor, Tensor]:
    """With kernels, without, and without in float64 (interpolation and rotary tables are fp32 there too)."""
    return (
        measure(build(groups, ops, model=model)),
        measure(build(groups, PLAIN, model=model)),
        measure(build(groups, PLAIN, torch.float64, model)),
    )


@pytest.mark.slow
def test_losses_of_20_steps(groups: Groups, ops: Ops) -> None:
    ours, plain, truth = in_three_ways(groups, ops, lambda stage: train(stage, groups.device), SHALLOW)
    assert truth[-8:].mean() < 0.8 * truth[:8].mean()  # it does train
    hold("losses", ours, truth, relative_error(plain, truth))


@pytest.mark.parametrize("case", ["packed", "text"])  # three documents with 2 images; none
def test_every_gradient(groups: Groups, ops: Ops, case: Case) -> None:
    def gradients(stage: Stage) -> dict[str, Tensor]:
        mean_loss(stage, batch_of(case, 24, 0, groups.device)).backward()
        return {name: p.grad for name, p in stage.named_parameters() if p.requires_grad}

    ours, plain, truth = in_three_ways(groups, ops, gradients)
    assert ours.keys() == plain.keys() == truth.keys()
    # PyTorch's own error is that of its worst tensor: a single tensor's, most of all a single number's, is luck.
    own = max(relative_error(plain[name], truth[name]) for name in truth)
    for name, gradient in truth.items():
        hold(name, ours[name], gradient, own)


def test_only_positions_with_a_label_pass_the_head(groups: Groups, ops: Ops) -> None:
    assert ops.linear_cross_entropy is not None
    given = []

    def watched(*args: Tensor, rows: Tensor, **options: object) -> Tensor:
        given.append(rows)
        return ops.linear_cross_entropy(*args, rows=rows, **options)

    batch = batch_of("packed", 24, 0, groups.device)
    build(groups, Ops(linear_cross_entropy=watched))(batch)
    assert torch.equal(given[0], (batch.labels != IGNORE).nonzero().squeeze(1))
    assert len(given[0]) < len(batch.labels)


def test_checkpoints_do_not_depend_on_the_choice(groups: Groups, ops: Ops) -> None:
    with_kernels, without = build(groups, ops), build(groups, PLAIN)
    assert with_kernels.state_dict().keys() == without.state_dict().keys()
    assert with_kernels.sharded_state_dict().keys() == without.sharded_state_dict().keys()
