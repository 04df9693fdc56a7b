"""Load a checkpoint under any layout: the whole state to resume, or model weights alone to start another stage.

In: a run folder, a `checkpoints` folder or one checkpoint, and freshly built chunks. Out: the chunks and the optimizer
filled in place, the step, and the values that the caller of `CheckpointWriter.save` gave.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import nn

from megavl.checkpoint import folder as folders
from megavl.checkpoint.agreement import attempt, on_rank_zero, raise_together
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.index import check_files, check_tensors, read_index
from megavl.checkpoint.optimizer_state import MASTER_PREFIX, load_optimizer_state, optimizer_state
from megavl.checkpoint.state import (
    RANDOM_KEY,
    layout_of,
    load_model_state,
    model_state,
    random_state_request,
    read_random_state,
    sharded_tensors,
)
from megavl.parallel.groups import Groups
from megavl.parallel.random_state import restore_random_state, seed_everything

Shapes = dict[str, tuple[int, ...]]
"""Full shape of each tensor of a checkpoint, by name."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What came out of a checkpoint besides tensors."""

    folder: Path
    """The checkpoint."""
    step: int
    """Optimizer steps done."""
    extra: dict[str, Any]
    """The values given to `save`."""
    same_layout: bool
    """Whether it was saved under this layout; then the random state is the saved one, otherwise a new seed."""
    recipe: dict[str, Any]
    """The recipe of the run that saved it, as JSON has it; empty where it was saved without."""


def load(
    path: Path, chunks: Sequence[nn.Module], optimizer: Any, groups: Groups, *, seed: int, tokenizer: str = ""
) -> Loaded:
    """Load everything: weights, optimizer state, step, random state. All ranks call this.

    Args:
        path: run folder, `checkpoints` folder or checkpoint.
        chunks: model chunks of this rank, filled in place.
        optimizer: the run's optimizer, filled in place.
        groups: this rank's groups.
        seed: the recipe's seed; with the step it seeds the random state under another layout.
        tokenizer: fingerprint of the run's tokenizer; empty: not compared.

    Returns:
        Step, extra values, and where they come from.

    Raises:
        CheckpointError: on all ranks: none there, incomplete, unreadable, or of another model or tokenizer.
    """
    folder, description = on_rank_zero(lambda: _open(path, tokenizer), groups)
    shapes = _read_shapes(folder, groups)
    step, same_layout = int(description["step"]), description["layout"] == layout_of(groups)
    _load_model(folder, shapes, chunks, groups)
    wanted = optimizer_state(optimizer, model_state(chunks, groups), groups, loading=True)
    _take_weights_for_masters(wanted, shapes)
    load_optimizer_state(optimizer, _load_tensors(wanted, folder, shapes, groups), int(description["adam_step"]))
    if same_layout:
        request = {RANDOM_KEY: random_state_request(shapes[RANDOM_KEY], groups)}
        restore_random_state(read_random_state(_load_tensors(request, folder, shapes, groups)[RANDOM_KEY]))
    else:
        seed_everything(seed + step, groups)
    return Loaded(
        folder=folder,
        step=step,
        extra=description["extra"],
        same_layout=same_layout,
        recipe=description.get("recipe", {}),
    )


def load_model(path: Path, chunks: Sequence[nn.Module], groups: Groups, *, tokenizer: str = "") -> Path:
    """Load model weights only, frozen components included: the start of another stage. All ranks call this.

    Args:
        path: run folder, `checkpoints` folder or checkpoint, of any stage; a converted one without training state too.
        chunks: model chunks of this rank, filled in place. An optimizer made before must be told
            (`reload_model_params`), as it may hold fp32 copies.
        groups: this rank's groups.
        tokenizer: fingerprint of the run's tokenizer; empty: not compared.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on all ranks: none there, incomplete, unreadable, or of another model or tokenizer.
    """
    folder = on_rank_zero(lambda: _find_weights(path, tokenizer), groups)
    _load_model(folder, _read_shapes(folder, groups), chunks, groups)
    return folder


def _open(path: Path, tokenizer: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `path` means and its description."""
    folder = folders.find_checkpoint(path)
    description = folders.read_state(folder)
    missing = [name for name in ("step", "adam_step", "layout", "extra") if name not in description]
    if missing:
        raise CheckpointError(f"{folder / folders.STATE}: it lacks {', '.join(missing)}")
    check_files(folder)
    _check_tokenizer(folder, description, tokenizer)
    return folder, description


def _find_weights(path: Path, tokenizer: str) -> Path:
    """The checkpoint that `path` means; a converted one has no description."""
    folder = folders.find_checkpoint(path)
    if (folder / folders.STATE).exists():
        _check_tokenizer(folder, folders.read_state(folder), tokenizer)
    check_files(folder)
    return folder


def _check_tokenizer(folder: Path, description: dict[str, Any], tokenizer: str) -> None:
    saved = description.get("tokenizer", "")
    if saved and tokenizer and saved != tokenizer:
        raise CheckpointError(f"{folder}: trained with tokenizer {saved[:12]}, the run's tokenizer is {tokenizer[:12]}")


def _read_shapes(folder: Path, groups: Groups) -> Shapes:
    """Read the index on every rank: each of them is about to let torch read the same file."""
    shapes, problem = attempt(lambda: read_index(folder))
    raise_together(problem, groups)
    assert shapes is not None
    return shapes


def _load_model(folder: Path, shapes: Shapes, chunks: Sequence[nn.Module], groups: Groups) -> None:
    load_model_state(chunks, _load_tensors(model_state(chunks, groups), folder, shapes, groups))


def _take_weights_for_masters(wanted: ShardedStateDict, shapes: Shapes) -> None:
    """Where a checkpoint has no fp32 copy of a parameter, its weights were fp32 themselves: ask for those."""
    for tensor in nested_values(wanted):
        if tensor.key.startswith(MASTER_PREFIX) and tensor.key not in shapes:
            tensor.key = tensor.key.removeprefix(MASTER_PREFIX)


def _load_tensors(wanted: ShardedStateDict, folder: Path, shapes: Shapes, groups: Groups) -> dict[str, Any]:
    """Fill `wanted` from the checkpoint, after a check on every rank that all of it is there."""
    _, problem = attempt(lambda: check_tensors(sharded_tensors(wanted), shapes, folder))
    raise_together(problem, groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # megatron-core calls torch's `load_state_dict`
        return dist_checkpointing.load(wanted, str(folder))
