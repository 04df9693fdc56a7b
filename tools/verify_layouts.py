r"""Hold parallel layouts of a recipe's model against one process: loss, every gradient, parameters after each step.

    torchrun --nproc-per-node 4 tools/verify_layouts.py RECIPE.py --layouts tp2,tp2pp2sp,pp2vpp2,pp2dist
    torchrun ... tools/verify_layouts.py RECIPE.py --layouts tp2 --stage.number 3 --parallel.device cpu

A layout is written without spaces: `tp2`, `pp2`, `vpp2` (sizes), `sp` (sequence parallel), `dist` (distributed
optimizer), `overlap` (gradient reduction), `gather` (parameter gathering), `vt` and `vm` (`parallel.vision`
`split_tensor` and `split_model`); data-parallel is what is left of the ranks.
Model, training stage and device are the recipe's, everything is computed in fp32, and the batches are made up (text,
image, images in some micro-batches only, packed), so no data is needed. Rank 0 must be able to hold the whole model
with its gradients and AdamW state; give smaller sizes with `--model.decoder.layers 4` and the like.

Each layout saves before its last step, and the next layout of the list (after the last one the first; a single one:
plain data parallelism) makes that step from the checkpoint. The table has the largest difference of each step and of
that resumed one, `resume`. Below it, for each layout that differs: the first tensor that does, and the likely cause.

Exit status: 0 if every difference is at most 1e-5 relative, 1 otherwise.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavl.config import ModelConfig, ParallelConfig, Recipe
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.parallel.validate import check_layout
from megavl.recipe import parse_command_line
from megavl.training.parity import TOLERANCE, Comparison, difference_table, run_layout
from megavl.training.reference_steps import Question, StepRecord, run_reference
from megavl.training.synthetic_batches import CASES, global_batch

_SIZES = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline"}
_SWITCHES: dict[str, dict[str, Any]] = {
    "sp": {"sequence": True},
    "dist": {"distributed_optimizer": True},
    "overlap": {"overlap_grad_reduce": True},
    "gather": {"overlap_param_gather": True},
    "vt": {"vision": "split_tensor"},
    "vm": {"vision": "split_model"},
}


def main(arguments: Sequence[str]) -> int:
    """Compare every layout; returns the exit status, the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", required=True, help="comma-separated, such as tp2,tp2pp2sp")
    parser.add_argument("--folder", type=Path, help="for the checkpoints, on every node the same; default: temporary")
    options, rest = parser.parse_known_args(arguments)
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    try:
        recipe = parse_command_line(rest)
        layouts = {name: parse_layout(name, recipe.parallel) for name in options.layouts.split(",")}
        micro_batches = -(-8 // world_size) * world_size  # at least 8, and a round number for every layout
        check(recipe, layouts, world_size, micro_batches)
        rows, faults = compare(question(recipe, micro_batches), layouts, rank, options.folder)
    except ValueError as error:
        print(f"verify_layouts: {error}", file=sys.stderr)
        return 1
    if rank == 0:
        print(difference_table(rows, (*CASES, "resume")))
        print("\n".join(faults) or f"all within {TOLERANCE:.0e}")
    return int(bool(faults))


def parse_layout(name: str, base: ParallelConfig) -> ParallelConfig:
    """The layout that `name` spells, with device and time limit of the recipe.

    Raises:
        ValueError: a part of the name means nothing.
    """
    parts = re.findall(rf"(tp|pp|vpp)(\d+)|({'|'.join(_SWITCHES)})", name)
    if "".join(f"{size}{number}{switch}" for size, number, switch in parts) != name or not parts:
        raise ValueError(f"layout {name!r} is not made of tpN, ppN, vppN, {', '.join(_SWITCHES)}")
    sizes = {_SIZES[size]: int(number) for size, number, _ in parts if size}
    switches: dict[str, Any] = {}
    for _, _, switch in parts:
        switches |= _SWITCHES.get(switch, {})
    return replace(ParallelConfig(device=base.device, timeout_s=base.timeout_s), **sizes, **switches)  # type: ignore[arg-type]


def check(recipe: Recipe, layouts: dict[str, ParallelConfig], world_size: int, micro_batches: int) -> None:
    """Refuse layouts that do not fit, all of them at once.

    Raises:
        ValueError: a sentence per problem.
    """
    stage = replace(recipe.stage, global_batch=micro_batches, micro_batch=1)
    problems = [
        f"{name}: {problem}"
        for name, parallel in layouts.items()
        for problem in check_layout(replace(recipe, parallel=parallel, stage=stage), world_size)
    ]
    if problems:
        raise ValueError("\n".join(problems))


def question(recipe: Recipe, micro_batches: int) -> Question:
    """One step of each case for the recipe's model."""
    tokens = _tokens(recipe.model)
    batches = [global_batch(recipe.model, case, micro_batches=micro_batches, tokens=tokens) for case in CASES]
    return Question(model=recipe.model, stage=recipe.stage.number, batches=batches, seed=recipe.stage.seed)


def compare(
    asked: Question, layouts: dict[str, ParallelConfig], rank: int, folder: Path | None
) -> tuple[dict[str, list[float]], list[str]]:
    """Run the reference on rank 0, then every layout on all ranks, and resume each under the next.

    Returns:
        Layout -> worst difference of each step and of the resumed one; what is wrong, in sentences.
    """
    base = next(iter(layouts.values()))
    reference = _reference(asked, base) if rank == 0 else []
    names = list(layouts)
    plain = ParallelConfig(device=base.device, timeout_s=base.timeout_s)
    following = layouts[names[0]] if len(names) > 1 else plain
    rows: dict[str, list[float]] = {}
    faults: list[str] = []
    for index, parallel in enumerate([*layouts.values(), following]):
        groups = init_groups(parallel)
        if index == 0:  # the first time that all ranks are together
            shared = [(reference, folder or (Path(tempfile.mkdtemp()) if rank == 0 else None))]
            dist.broadcast_object_list(shared, src=0, group=groups.gloo_world)
            reference, folder = shared[0]
        assert folder is not None
        if index < len(names):
            saved = folder / str(index)
            result = run_layout(asked, parallel, groups, reference, save_to=saved)
            rows[names[index]] = [step.worst() for step in result.steps]
            faults += sentences(names[index], result)
        if index > 0:
            before = names[index - 1]
            resumed = run_layout(asked, parallel, groups, reference, resume_from=folder / str(index - 1))
            rows[before].append(resumed.steps[0].worst())
            after = names[index % len(names)] if len(names) > 1 else "plain data parallelism"
            if max(rows[before][:-1]) <= TOLERANCE:  # otherwise a wrong state was saved
                faults += sentences(f"{before} resumed under {after}", resumed)
        destroy_groups(leave_world=index == len(names))
    if rank == 0 and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return rows, faults


def sentences(name: str, result: Comparison) -> list[str]:
    """What is wrong with a layout: the first tensor that differs, the likely cause, and names and copies at fault."""
    said = [f"{name}: {result.first}\n    likely cause: {result.cause}"] if result.first else []
    for what, parameters in (
        ("are not on both sides", result.missing),
        ("have copies that differ over the tensor group", result.drifted),
    ):
        if parameters:
            said.append(f"{name}: {len(parameters)} parameters {what}, first {parameters[0]}")
    return said


def _reference(asked: Question, base: ParallelConfig) -> list[StepRecord]:
    """The plain loop, in a world of this rank alone."""
    with _alone():
        groups = init_groups(ParallelConfig(device=base.device))
        reference = run_reference(asked, groups)
        destroy_groups()
    return reference


def _tokens(model: ModelConfig) -> int:
    """Tokens of a micro-batch: three images and some text, a multiple of 64 so that any tensor size cuts it."""
    return -(-(3 * model.tokens_per_image + 16) // 64) * 64


@contextmanager
def _alone() -> Iterator[None]:
    """Hide torchrun's environment, so that `init_groups` forms a world of one."""
    hidden = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
