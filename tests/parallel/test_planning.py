"""The planner against what is really built and run: bytes of a rank's state, activations, and the schedule itself.

The schedule test lets megatron-core run its real schedules over real messages with stages that only sleep. A sleep is
never too short and may be too long on a busy machine, so the simulated time is a strict lower bound and the upper bound
is generous; `tools/check_simulator.py` prints the figures.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import MODEL
from world import World

from megavl.config import KernelsConfig, OptimConfig, ParallelConfig
from megavl.data.microbatch import StepBatch
from megavl.model.build import build_stages
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import SAM_ADAPTOR_PREFIXES, VisionTowers
from megavl.parallel.gradients import wrap_stages
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.parallel.random_state import seed_everything
from megavl.planning.calibrate import calibrate
from megavl.planning.costs import Case, part_costs
from megavl.planning.dilated_steps import IMAGES, planned_s, run_steps, time_device
from megavl.planning.dilated_steps import LAYOUTS as DILATED
from megavl.planning.emulate import KINDS, LAYOUTS, emulate_step, example_seconds
from megavl.planning.hardware import HARDWARE, read_calibration
from megavl.planning.memory import head_bytes, layer_bytes, rank_memory, vision_bytes
from megavl.planning.simulate import simulate
from megavl.training.flops import StepCounts
from megavl.training.freeze import TRAINED, apply_freeze
from megavl.training.optimizer import make_optimizer
from megavl.training.step import train_step
from megavl.training.synthetic_batches import global_batch, share

PLAIN = KernelsConfig(**{f.name: "reference" for f in dataclasses.fields(KernelsConfig)})
COUNTS = StepCounts(images=0, tokens=64, squared_lengths=64 * 64, logits=64)


def case(parallel: ParallelConfig, stage: int, dtype: str) -> Case:
    return Case(model=MODEL, stage=stage, parallel=parallel, hardware=HARDWARE["cpu"], dtype=dtype, kernels=PLAIN)


def state_bytes(parallel: ParallelConfig, stage: int, dtype: str) -> tuple[int, int, int, int]:
    """(pipeline rank, bytes of parameters, of gradient buffers, of optimizer state) of this rank after one step."""
    groups = init_groups(parallel)
    seed_everything(1, groups)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    stages = build_stages(MODEL, parallel, dtype=kind, seed=1, pg=groups.pg, device=groups.device)
    apply_freeze(stages, stage)
    chunks = wrap_stages(stages, parallel, groups)
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(chunks, optim, parallel, groups)
    mine = share(global_batch(MODEL, "image", micro_batches=4, tokens=64), groups.data_rank, groups.data_size)
    train_step(chunks, optimizer, StepBatch(step=0, language_rows=0, micro_batches=mine), groups, lr=1e-3)
    parameters = sum(p.numel() * p.element_size() for s in stages for p in s.parameters())
    gradients = sum(b.grad_data.nbytes for chunk in chunks for b in chunk.buffers)
    return groups.pipeline_rank, parameters, gradients, optimizer_bytes(optimizer, stages)


def optimizer_bytes(optimizer: Any, stages: Any) -> int:
    """fp32 tensors that the optimizer holds: moments, and masters that are not the parameters themselves."""
    held: dict[int, int] = {}
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if inner is None:
            continue
        for group in inner.param_groups:
            for p in group["params"]:
                for tensor in (p, *inner.state.get(p, {}).values()):
                    if torch.is_tensor(tensor) and tensor.dim() and tensor.dtype is torch.float32:
                        held[tensor.data_ptr()] = tensor.numel() * 4
    own = {p.data_ptr() for stage in stages for p in stage.parameters()}
    return sum(size for at, size in held.items() if at not in own)


STATES: list[tuple[int, dict[str, Any], int, str]] = [
    (2, {"pipeline": 2, "layout": "1,3"}, 2, "fp32"),
    (4, {"tensor": 2, "pipeline": 2, "layout": "3,1", "sequence": True}, 3, "bf16"),
    (2, {"pipeline": 2, "virtual_pipeline": 2, "layout": "1,1,1,1"}, 1, "fp32"),
    (4, {"pipeline": 2, "layout": "1,3", "distributed_optimizer": True}, 2, "bf16"),
]


@pytest.mark.parametrize(("ranks", "fields", "stage", "dtype"), STATES)
def test_state_of_a_rank(world: World, ranks: int, fields: dict[str, Any], stage: int, dtype: str) -> None:
    """Parameters, gradients and optimizer of an uneven plan, byte for byte; sharding pads every parameter."""
    parallel = ParallelConfig(device="cpu", **fields)
    data = ranks // (parallel.tensor * parallel.pipeline)
    expected = rank_memory(case(parallel, stage, dtype), COUNTS, micro_batches=4, data=data)
    slack = 0.1 if parallel.distributed_optimizer else 0.0
    for rank, parameters, gradients, optimizer in world.run(state_bytes, parallel, stage, dtype, ranks=ranks):
        estimate = expected[rank]
        assert parameters == estimate.parameters
        assert gradients == pytest.approx(estimate.gradients, rel=slack, abs=0)
        assert optimizer == pytest.approx(estimate.optimizer, rel=slack, abs=0)


VOCAB = 2048
"""So many that the logits are nearly all of what is kept behind the layers."""


def saved_bytes(recompute: str) -> tuple[int, int]:
    """Bytes kept for the backward pass: by a decoder layer, which is what two more layers add, and by all the rest."""
    found = []
    for layers in (2, 4):
        parallel = ParallelConfig(device="cpu", recompute=recompute)  # type: ignore[arg-type]
        groups = init_groups(parallel)
        model = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, layers=layers, vocab=VOCAB))
        (stage,) = build_stages(model, parallel, dtype=torch.bfloat16, seed=1, pg=groups.pg, device=groups.device)
        apply_freeze([stage], 2)
        parameters = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:  # noqa: B023
                storages[storage.data_ptr()] = storage.nbytes()  # noqa: B023
            return tensor

        (batch,) = global_batch(model, "text", micro_batches=1, tokens=64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = stage(batch.to(groups.device)).sum()
        del loss
        found.append(sum(storages.values()))
        destroy_groups(leave_world=False)
    layer = (found[1] - found[0]) // 2
    return layer, found[0] - 2 * layer


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_of_a_layer_and_of_the_head(world: World, recompute: str) -> None:
    """What they really save, plain PyTorch, bf16, against the estimate."""
    ((layer, rest),) = world.run(saved_bytes, recompute, ranks=1)
    parallel = ParallelConfig(device="cpu", recompute=recompute)  # type: ignore[arg-type]
    setting = case(parallel, 2, "bf16")
    assert layer_bytes(setting, 64) == pytest.approx(layer, rel=0.05)
    wide = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, vocab=VOCAB))
    assert head_bytes(dataclasses.replace(setting, model=wide), COUNTS) == pytest.approx(rest, rel=0.05)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", [1, 3])
def test_activations_of_the_towers(stage: int, recompute: bool) -> None:
    """What towers and adaptor of two images really save, against an estimate that may be half as much again."""
    towers = VisionTowers(MODEL, recompute=recompute)
    vision = torch.nn.ModuleDict({"towers": towers, "adaptor": make_adaptor(MODEL)}).to(torch.bfloat16)
    for name, parameter in vision.named_parameters():
        parameter.requires_grad_(TRAINED[stage][component_of(name)])
    own = {p.untyped_storage().data_ptr() for p in vision.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    pixels = torch.rand(2, 3, MODEL.image_size, MODEL.image_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = vision["adaptor"](*towers(pixels))
    real = sum(storage.nbytes() for storage in saved.values())
    estimate = vision_bytes(case(ParallelConfig(device="cpu", recompute_vision=recompute), stage, "bf16"), 2)
    assert features.requires_grad
    assert 0.9 * real <= estimate <= 1.5 * real


def component_of(name: str) -> str:
    """Of a parameter of towers and adaptor, as in the freeze table."""
    if name.startswith("adaptor."):
        return "aligner"
    if name.startswith("towers.siglip."):
        return "siglip"
    return "sam_adaptor" if name.removeprefix("towers.sam.").startswith(SAM_ADAPTOR_PREFIXES) else "sam"


UNIT_S = 0.003
"""Seconds of one decoder layer, forward and backward."""


def simulated_and_real(parallel: ParallelConfig) -> list[tuple[float, float]]:
    """Seconds of each kind of step; of the real ones the shortest of up to six runs, fewer once they come close."""
    groups = init_groups(parallel)
    model = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, layers=30))
    pairs = []
    for kind in KINDS:
        times = example_seconds(parallel.layout, kind, unit_s=UNIT_S)
        simulated = simulate(*times, pipeline=parallel.pipeline, virtual=parallel.virtual_pipeline).step_s
        real = float("inf")
        for _ in range(6):
            real = min(real, emulate_step(*times, model, parallel, groups))  # the same on every rank
            if real < 1.2 * simulated:
                break
        pairs.append((simulated, real))
    return pairs


@pytest.mark.parametrize(("pipeline", "virtual", "layout"), [LAYOUTS[1], LAYOUTS[4], LAYOUTS[5]])
def test_schedule_against_the_real_one(world: World, pipeline: int, virtual: int, layout: str) -> None:
    parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual, layout=layout, device="cpu")
    for kind, (simulated, real) in zip(KINDS, world.run(simulated_and_real, parallel, ranks=pipeline)[0], strict=True):
        assert simulated <= real <= 3 * simulated, (layout, kind)


def test_training_steps_against_their_passes(world: World) -> None:
    """On paper, passes as long as they really were never take longer than the real step, whatever the load."""
    timing = world.run(time_device, 1.2, ranks=2)[0]
    planned = {kind: planned_s(DILATED[5], kind, [timing], 1.2, 2) for kind in IMAGES}
    assert 0 < planned["text"] < planned["mixed"] < planned["image"]
    for steps in world.run(run_steps, DILATED[5], 1.2, 1, ranks=2):
        assert all(0 < step.scheduled <= step.real for step in steps.values()), steps


def calibrated(path: str) -> dict[str, Any]:
    return calibrate(MODEL, Path(path), tokens=64, device="cpu")


def test_calibration_gives_back_what_was_timed(world: World, tmp_path: Path) -> None:
    """Rates from the file, applied to the work that was timed, are the seconds that were timed."""
    path = tmp_path / "rates.json"
    (written,) = world.run(calibrated, str(path), ranks=1)
    hardware = read_calibration(path, HARDWARE["cpu"])
    assert hardware.origin.startswith("measured on cpu, fp32")
    setting = dataclasses.replace(case(ParallelConfig(), 3, "fp32"), hardware=hardware)
    costs = part_costs(setting, dataclasses.replace(COUNTS, images=1))
    timed = {name: part["seconds"] for name, part in written["parts"].items()}
    assert set(timed) == {"siglip", "sam", "sam_adaptor", "aligner", "embedding", "layer", "head"}
    for name in ("siglip", "aligner", "embedding", "layer", "head"):
        assert costs[name].forward_s == pytest.approx(timed[name]["forward"], rel=1e-9), name
        assert costs[name].backward_s == pytest.approx(timed[name]["backward"], rel=1e-9), name
    both = costs["sam"].forward_s + costs["sam_adaptor"].forward_s
    assert both == pytest.approx(timed["sam"]["forward"], rel=1e-9)
    assert costs["sam_adaptor"].backward_s == pytest.approx(timed["sam"]["backward"], rel=1e-9)
    assert costs["loss"].forward_s == 0
