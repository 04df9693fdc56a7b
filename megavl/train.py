"""Train: torchrun ... -m megavl.train RECIPE.py [--section.field value ...]

The stations of a run, in order. Started again with the same command, a run continues from the newest complete
checkpoint of its folder; SIGTERM or Ctrl-C ends it after the current step, saved, with exit code 0.

    python -m megavl.train RECIPE.py --dry-run --gpus N    what the run would be, and every problem, without starting it
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megavl.checkpoint.agreement import on_rank_zero
from megavl.checkpoint.folder import find_newest
from megavl.checkpoint.reader import load, load_model
from megavl.checkpoint.writer import CheckpointWriter
from megavl.config import Recipe
from megavl.data.loader import make_loader
from megavl.data.mixture import order_changes
from megavl.data.tokenizer import Tokenizer
from megavl.evaluate.perplexity import held_out_perplexities, length_multiple
from megavl.model.build import build_stages
from megavl.ops import make_ops
from megavl.parallel.gradients import unwrap, wrap_stages
from megavl.parallel.groups import Groups, destroy_groups, init_groups
from megavl.parallel.random_state import seed_everything
from megavl.parallel.validate import check_layout
from megavl.parallel.vision_ahead import AheadEncoder, make_ahead_encoder
from megavl.parallel.vision_placement import pixel_rule
from megavl.planning.from_recipe import resolve_layout
from megavl.planning.preflight import dry_run
from megavl.planning.report import plan_lines
from megavl.recipe import parse_command_line, save_recipe
from megavl.training import start_report
from megavl.training.flops import peak_flops
from megavl.training.freeze import apply_freeze, compile_frozen_towers, frozen_components
from megavl.training.loop import Run, run_steps
from megavl.training.metrics import Metrics, start_logging
from megavl.training.optimizer import make_optimizer
from megavl.training.stopping import StopRequest, fail
from megavl.validate import validate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(args: Sequence[str]) -> int:
    """Train as the command line says; returns the exit code, 0 also for a run that was asked to stop."""
    if "--dry-run" in args:
        return dry_run(args)
    stop = StopRequest()
    start_logging(int(os.environ.get("RANK", "0")))
    try:
        recipe = plan(parse_command_line(args))
        check(recipe)
        train(recipe, stop)
    except Exception as error:
        return fail(error, stop)
    return 0


def plan(recipe: Recipe) -> Recipe:
    """Write out `parallel.layout = "auto"` and tell what was chosen."""
    on_gpu = recipe.parallel.device != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    recipe, chosen = resolve_layout(recipe, int(os.environ.get("WORLD_SIZE", "1")), device)
    if chosen is not None:
        logging.getLogger("megavl").info("\n".join(plan_lines(chosen)))
    return recipe


def check(recipe: Recipe) -> None:
    """Find every problem that shows before anything is built.

    Raises:
        ValueError: a sentence per problem.
    """
    problems = [*validate(recipe), *check_layout(recipe, int(os.environ.get("WORLD_SIZE", "1")))]
    if problems:
        raise ValueError("\nmegavl: ".join(problems))


def train(recipe: Recipe, stop: StopRequest) -> None:
    """Build what the recipe describes, run its steps, take everything down again."""
    groups = init_groups(recipe.parallel)
    seed_everything(recipe.stage.seed, groups)
    tokenizer = Tokenizer(recipe.data.tokenizer)
    chunks = build_model(recipe, groups)
    saver = make_saver(recipe, tokenizer, groups)
    optimizer, step, origin = start_state(recipe, tokenizer, chunks, groups)
    metrics = open_reports(recipe, tokenizer, chunks, groups, step, origin)
    batches = make_loader(
        recipe,
        tokenizer,
        dp_rank=groups.data_rank,
        dp_size=groups.data_size,
        pixels=pixel_rule(
            recipe.model,
            recipe.parallel,
            groups,
            frozen=frozen_components(recipe.stage.number),
            dtype=DTYPES[recipe.stage.dtype],
        ),
        last_stage=groups.is_last_stage,
        length_multiple=length_multiple(recipe),
        equal_lengths=groups.pipeline_size > 1,
        start=step,
        pin_memory=groups.device.type == "cuda",
    )
    measure = partial(held_out_perplexities, chunks, recipe, tokenizer, groups) if recipe.data.validation else None
    run = Run(
        recipe=recipe,
        groups=groups,
        chunks=chunks,
        optimizer=optimizer,
        saver=saver,
        metrics=metrics,
        measure=measure,
        stop=stop,
        encoder=make_encoder(recipe, chunks, groups),
        peak=device_peak(recipe, groups),
    )
    done = run_steps(run, batches, step)
    if metrics is not None:
        ended = "finished" if done >= recipe.stage.steps else f"asked to stop ({stop.signal or 'on another rank'})"
        metrics.note(f"{ended}: {done} of {recipe.stage.steps} steps are saved in {saver.checkpoints}")
        metrics.close()
    destroy_groups()


def build_model(recipe: Recipe, groups: Groups) -> list[DistributedDataParallel]:
    """This rank's stages, frozen as the training stage asks, wrapped for data parallelism."""
    dtype = DTYPES[recipe.stage.dtype]
    stages = build_stages(
        recipe.model,
        recipe.parallel,
        dtype=dtype,
        seed=recipe.stage.seed,
        pg=groups.pg,
        device=groups.device,
        ops=make_ops(recipe.kernels, groups.device, dtype),
    )
    apply_freeze(stages, recipe.stage.number)
    if recipe.parallel.compile_vision:
        compile_frozen_towers(stages)
    return wrap_stages(stages, recipe.parallel, groups)


def make_encoder(recipe: Recipe, chunks: Sequence[DistributedDataParallel], groups: Groups) -> AheadEncoder | None:
    """What runs frozen towers before the schedule, with the weights that the model has by now."""
    dtype = DTYPES[recipe.stage.dtype]
    return make_ahead_encoder(
        unwrap(chunks),
        recipe.model,
        recipe.parallel,
        groups,
        frozen=frozen_components(recipe.stage.number),
        ops=make_ops(recipe.kernels, groups.device, dtype),
    )


def make_saver(recipe: Recipe, tokenizer: Tokenizer, groups: Groups) -> CheckpointWriter:
    """The writer of this run's checkpoints; clears away what an interrupted save left."""
    return CheckpointWriter(
        Path(recipe.run_dir) / "checkpoints",
        groups,
        recipe.checkpoint.keep,
        tokenizer=tokenizer.fingerprint,
        recipe=asdict(recipe),
        init_from=recipe.checkpoint.init_from,
    )


def start_state(
    recipe: Recipe, tokenizer: Tokenizer, chunks: Sequence[DistributedDataParallel], groups: Groups
) -> tuple[ChainedOptimizer, int, str]:
    """Weights and optimizer before the first step: the newest checkpoint of this run, or weights of another.

    Returns:
        Optimizer, first step, and where the weights come from, in words.
    """
    newest = on_rank_zero(lambda: find_newest(Path(recipe.run_dir)), groups)
    origin = "initial weights"
    if newest is None and recipe.checkpoint.init_from:  # before the optimizer, which copies the weights
        start = Path(recipe.checkpoint.init_from)
        origin = f"weights of {load_model(start, chunks, groups, tokenizer=tokenizer.fingerprint)}"
    optimizer = make_optimizer(chunks, recipe.optim, recipe.parallel, groups)
    if newest is None:
        return optimizer, 0, origin
    loaded = load(newest, chunks, optimizer, groups, seed=recipe.stage.seed, tokenizer=tokenizer.fingerprint)
    changes = "".join(
        f"\n{change}: from here on rows come in another order, some twice, others not at all"
        for change in order_changes(recipe, loaded.recipe)
    )
    return optimizer, loaded.step, f"checkpoint {newest}{changes}"


def open_reports(
    recipe: Recipe,
    tokenizer: Tokenizer,
    chunks: Sequence[DistributedDataParallel],
    groups: Groups,
    step: int,
    origin: str,
) -> Metrics | None:
    """Tell what was chosen and save it; the one writer of reports, on rank 0 only. All ranks call this."""
    layout = start_report.layout_lines(recipe, unwrap(chunks), groups)
    if groups.rank != 0:
        return None
    run_dir = Path(recipe.run_dir)
    metrics = Metrics(run_dir, recipe.stage.steps, recipe.logging, step)
    save_recipe(recipe, run_dir / "recipe.json")
    lines = [*start_report.recipe_lines(recipe), start_report.device_line(recipe, groups)]
    lines += [*start_report.kernel_lines(recipe, groups), *layout, start_report.vision_line(recipe)]
    lines += [*start_report.component_lines(recipe), *start_report.data_lines(recipe, tokenizer)]
    metrics.note("\n".join([*lines, f"starts at step {step} of {recipe.stage.steps} from {origin}"]))
    return metrics


def device_peak(recipe: Recipe, groups: Groups) -> float | None:
    """Peak operations per second of a device, None where the table does not know it (or for fp32)."""
    if groups.device.type != "cuda" or recipe.stage.dtype != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name(groups.device))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # no farewell to ranks that may not answer
