"""The format `megatron-dist`: what training saves and loads under any layout.

In: a run folder, a `checkpoints` folder or one checkpoint; or `Contents`. Out: `Contents`; or a complete checkpoint.

    .metadata, *.distcp, metadata.json, common.pt    the tensors (megatron-core's `torch_dist`)
    state.json                                       training state besides tensors, where there is one
    model.json                                       the sizes, where no run's recipe tells them
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megavl.checkpoint import folder as folders
from megavl.checkpoint.convert.contents import Contents, Training
from megavl.checkpoint.convert.dist_read import read_tensors
from megavl.checkpoint.convert.dist_write import write_tensors
from megavl.checkpoint.convert.formats import Format, Progress, Slice, WriteOptions
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.shapes import check_shapes
from megavl.checkpoint.convert.sizes import MODEL_FILE, read_sizes, sizes_from
from megavl.checkpoint.convert.training import description_of, training_from
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.index import INDEX
from megavl.checkpoint.optimizer_state import PREFIX as OPTIMIZER_PREFIX
from megavl.checkpoint.state import RANDOM_KEY
from megavl.config import ModelConfig


def detect(path: Path) -> bool:
    """Whether the path is a checkpoint of training, a folder of them, or looks like a damaged one."""
    if any((path / name).is_file() for name in (INDEX, folders.MARKER)) or any(path.glob("*.distcp")):
        return True
    return folders.find_newest(path) is not None


def read(path: Path) -> Contents:
    """Tensors, sizes and training state of a checkpoint.

    Args:
        path: run folder, `checkpoints` folder or checkpoint.

    Raises:
        CheckpointError: none there, incomplete, damaged, or of unknown sizes.
    """
    folder = folders.find_checkpoint(path)
    tensors = read_tensors(folder)
    tensors.pop(RANDOM_KEY, None)  # of the ranks of one layout; under another they are seeded anew
    optimizer = {
        n.removeprefix(OPTIMIZER_PREFIX): tensors.pop(n) for n in list(tensors) if n.startswith(OPTIMIZER_PREFIX)
    }
    training = None
    if (folder / folders.STATE).exists():
        training = training_from(folders.read_state(folder), optimizer, folder / folders.STATE)
    elif optimizer:
        raise CheckpointError(f"{folder}: {len(optimizer)} optimizer tensors but no {folders.STATE}")
    model = _sizes(folder, training)
    check_shapes(tensors, model)
    return Contents(model=model, tensors=tensors, training=training)


def write(contents: Contents, folder: Path, options: WriteOptions, progress: Progress) -> None:
    """Write a complete checkpoint into an existing empty folder.

    Raises:
        CheckpointError: a tensor cannot be read.
        OSError: the file system refused.
    """
    folders.write_durably(folder / MODEL_FILE, json.dumps(asdict(contents.model), indent=1))
    if contents.training:
        folders.write_state(folder, description_of(contents.training))
    write_tensors(folder, stored_tensors(contents), progress)


def plan(contents: Contents, options: WriteOptions) -> Iterator[Slice]:
    """What `write` writes: every tensor whole, in the files of its threads."""
    for name, tensor in stored_tensors(contents).items():
        yield Slice(name=name, shape=tensor.shape, dtype=tensor.dtype, file="__*_0.distcp")


def describe(path: Path) -> str:
    """Which layout saved it."""
    folder = folders.find_checkpoint(path)
    if not (folder / folders.STATE).exists():
        return "any layout, weights only"
    saved = folders.read_state(folder).get("layout")
    return "any layout" + (f", saved at {', '.join(f'{k} {v}' for k, v in saved.items())}" if saved else "")


def stored_tensors(contents: Contents) -> dict[str, LazyTensor]:
    """Weights and optimizer state by the names of the checkpoint."""
    optimizer = contents.training.optimizer if contents.training else {}
    return {**contents.tensors, **{OPTIMIZER_PREFIX + name: tensor for name, tensor in optimizer.items()}}


def _sizes(folder: Path, training: Training | None) -> ModelConfig:
    """The sizes, from the folder's own file or the run's recipe."""
    if (folder / MODEL_FILE).exists():
        return read_sizes(folder / MODEL_FILE)
    recipe = training.description.get("recipe") if training else None
    if not isinstance(recipe, dict) or not recipe:
        raise CheckpointError(f"{folder}: neither {MODEL_FILE} nor a recipe in {folders.STATE} tells the model's sizes")
    return sizes_from(recipe.get("model"), f"{folder / folders.STATE}: recipe.model")


FORMAT = Format(
    name="megatron-dist",
    detect=detect,
    read=read,
    write=write,
    plan=plan,
    describe=describe,
    folder=folders.find_checkpoint,
)
