r"""Step time of each vision placement under several layouts, on made-up images, in one run.

    torchrun --nproc-per-node 4 tools/bench_vision_placement.py --layouts tp4,tp2pp2,pp4
    torchrun ... tools/bench_vision_placement.py --towers 2 --stage 3          # twice the tower blocks; SigLIP trained

The model is of CPU size, with both towers. `split_model` encodes the images of a step at the tail of the one before, as
training does; `split_model late` when the step itself begins. A row gives the median step, the fastest, and the
processor time of the busiest rank, which is what a step would take with a processor per rank and no waiting; then the
gain over `replicate` in both. Steps go round over the placements, so that another load on the machine meets all of
them. `towers` is the time in the towers' forward pass over the step on the first rank under `replicate`: with a share s
of the step, no placement over n ranks can gain more than 1 / (1 - s * (1 - 1/n)).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megavl.config import DecoderConfig, ModelConfig, ParallelConfig, VisionPlacement
from megavl.data.microbatch import StepBatch
from megavl.model.build import build_stages
from megavl.parallel.gradients import wrap_stages
from megavl.parallel.groups import Groups, destroy_groups, init_groups
from megavl.parallel.random_state import seed_everything
from megavl.parallel.vision_ahead import make_ahead_encoder
from megavl.planning.dilated_steps import MODEL
from megavl.training.freeze import apply_freeze, frozen_components
from megavl.training.optimizer import make_optimizer
from megavl.training.reference_steps import PARITY_OPTIM
from megavl.training.step import train_step
from megavl.training.synthetic_batches import global_batch, share

LAYOUTS = {
    "tp4": ParallelConfig(tensor=4, sequence=True),
    "tp2pp2": ParallelConfig(tensor=2, sequence=True, pipeline=2),
    "pp4": ParallelConfig(pipeline=4),
}
PLACEMENTS: dict[str, VisionPlacement] = {
    "replicate": "replicate",
    "split_tensor": "split_tensor",
    "split_model": "split_model",
    "split_model late": "split_model",
}
"""Row -> `parallel.vision`."""
TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One step on all ranks, in seconds."""

    step: float
    busiest: float
    """Processor time of the rank that computed most."""
    towers: float
    """Wall time in the towers on the rank where that was most."""


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the table comes from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of " + ", ".join(LAYOUTS))
    parser.add_argument("--towers", type=int, default=1, help="multiplies the blocks of both towers")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3), help="training stage")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each placement")
    options = parser.parse_args(arguments)
    wrong = [name for name in options.layouts.split(",") if name not in LAYOUTS]
    if wrong:
        print(f"bench_vision_placement: no layout {wrong[0]!r}; there are {', '.join(LAYOUTS)}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    model = cpu_model(options.towers)
    for name in options.layouts.split(","):
        groups = init_groups(LAYOUTS[name])
        rows = measure(model, LAYOUTS[name], groups, options.stage, options.steps)
        if groups.rank == 0:
            print("\n".join(table(name, rows)), flush=True)
        destroy_groups(leave_world=name == options.layouts.split(",")[-1])
    return 0


def cpu_model(towers: int) -> ModelConfig:
    """A small model whose towers take a large part of a step: the simulator check's, `towers` times deeper."""
    sam = MODEL.sam
    assert sam is not None
    return replace(
        MODEL,
        decoder=DecoderConfig(layers=4, hidden=256, heads=8, kv_heads=8, ffn=704, vocab=1024),
        siglip=replace(MODEL.siglip, layers=towers * MODEL.siglip.layers),
        sam=replace(sam, layers=towers * sam.layers),
    )


def measure(
    model: ModelConfig, layout: ParallelConfig, groups: Groups, stage: int, steps: int
) -> dict[str, list[Timed]]:
    """Steps of every placement in turn, after one of each that is not counted; all ranks must call it."""
    seed_everything(1, groups)
    turns = {
        name: make_turn(model, replace(layout, vision=vision), groups, stage, early=not name.endswith("late"))
        for name, vision in PLACEMENTS.items()
    }
    for turn in turns.values():
        turn()
    rows: dict[str, list[Timed]] = {name: [] for name in PLACEMENTS}
    order = list(PLACEMENTS)
    for number in range(steps):
        first = number % len(order)  # nobody always comes first
        for name in order[first:] + order[:first]:
            rows[name].append(turns[name]())
    return rows


def make_turn(
    model: ModelConfig, parallel: ParallelConfig, groups: Groups, stage: int, *, early: bool
) -> Callable[[], Timed]:
    """A function that runs and times one step of a placement; `early`: with the images of the next, the same ones."""
    stages = build_stages(model, parallel, dtype=torch.float32, seed=1, pg=groups.pg, device=groups.device)
    apply_freeze(stages, stage)
    chunks = wrap_stages(stages, parallel, groups)
    optimizer = make_optimizer(chunks, PARITY_OPTIM, parallel, groups)
    encoder = make_ahead_encoder(stages, model, parallel, groups, frozen=frozen_components(stage))
    batch = share(
        global_batch(model, "image", micro_batches=4 * groups.data_size, tokens=TOKENS),
        groups.data_rank,
        groups.data_size,
    )
    step = StepBatch(step=0, language_rows=0, micro_batches=batch)
    clock = TowerClock()
    if stages[0].first_stage is not None:
        stages[0].first_stage.towers.register_forward_pre_hook(lambda *_: clock.start())
        stages[0].first_stage.towers.register_forward_hook(lambda *_: clock.stop())

    def turn() -> Timed:
        clock.total = 0.0
        dist.barrier(group=groups.gloo_world)
        wall, computed = time.perf_counter(), time.process_time()
        train_step(chunks, optimizer, step, groups, lr=1e-4, encoder=encoder, upcoming=step if early else None)
        wall, computed = time.perf_counter() - wall, time.process_time() - computed
        worst = torch.tensor([wall, computed, clock.total], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=groups.gloo_world)
        return Timed(step=float(worst[0]), busiest=float(worst[1]), towers=float(worst[2]))

    return turn


class TowerClock:
    """Adds up the time between `start` and `stop`."""

    def __init__(self) -> None:
        self.total, self._began = 0.0, 0.0

    def start(self) -> None:
        """The towers begin."""
        self._began = time.perf_counter()

    def stop(self) -> None:
        """The towers are done."""
        self.total += time.perf_counter() - self._began


def table(layout: str, rows: dict[str, list[Timed]]) -> list[str]:
    """A line per placement."""
    base = [statistics.median(getattr(t, what) for t in rows["replicate"]) for what in ("step", "busiest")]
    towers = statistics.median(t.towers / t.step for t in rows["replicate"])
    lines = [f"{layout}: towers {100 * towers:.0f}% of the step under replicate, {len(rows['replicate'])} steps each"]
    for name, timed in rows.items():
        step, busiest = (statistics.median(getattr(t, what) for t in timed) for what in ("step", "busiest"))
        lines.append(
            f"  {name:16}  step {step:6.3f} s (fastest {min(t.step for t in timed):6.3f}), {base[0] / step:4.2f}x;  "
            f"busiest rank {busiest:6.3f} s, {base[1] / busiest:4.2f}x"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
