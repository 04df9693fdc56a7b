"""What tensors a checkpoint holds, read without executing anything that the checkpoint brings along.

In: a checkpoint folder. Out: name -> shape. The index, `.metadata`, is a pickle, and both torch and megatron-core read
it with `pickle.load`, which runs whatever code it names. So it is first read here by an unpickler that knows the
handful of classes an index is made of and refuses the rest; torch reads a file only after it has passed. The other
files are safe by themselves: tensors and `common.pt` are read by torch with `weights_only`, `state.json` is JSON. We
save no pickled objects (megatron-core's `ShardedObject`) and never ask for those of a foreign checkpoint.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megavl.checkpoint.folder import CheckpointError

INDEX = ".metadata"
"""torch's name for the index."""

_ALLOWED = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path"},
    "pathlib._local": {"PosixPath", "Path"},  # where Python 3.13 keeps them
}
"""Module -> names that an index may refer to: plain records, types of numbers, paths."""


class _Unpickler(pickle.Unpickler):
    """An unpickler that refuses every name outside `_ALLOWED`."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name not in _ALLOWED.get(module_name, ()):
            raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def read_index(folder: Path) -> dict[str, tuple[int, ...]]:
    """The full shape of every tensor in a checkpoint, by name.

    Raises:
        CheckpointError: there is no index, it is damaged, or it contains something that an index never does.
    """
    return {name: tuple(entry.size) for name, entry in tensor_entries(read_metadata(folder)).items()}


def read_metadata(folder: Path) -> Metadata:
    """The index itself, with the places of all tensors.

    Raises:
        CheckpointError: as `read_index`.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream).load()
        metadata.state_dict_metadata.items()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {INDEX}, so this is not a whole checkpoint") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: not the index of a checkpoint, refused ({error})") from None
    return metadata


def check_files(folder: Path) -> None:
    """See that every file is there as far as the index reaches; what a full disk or a copy cut short leaves is not.

    Raises:
        CheckpointError: as `read_index`, or names the file.
    """
    ends: dict[str, int] = {}
    for place in (read_metadata(folder).storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: is missing, {INDEX} refers to it")
        if path.stat().st_size < end:
            raise CheckpointError(f"{path}: it has {path.stat().st_size} bytes, {INDEX} refers to {end}")


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """What an index says of each tensor; objects that are none are passed over."""
    entries = metadata.state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def check_tensors(wanted: Iterable[ShardedTensor], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Compare what this rank wants to load with what is there.

    Raises:
        CheckpointError: a tensor is missing or of another shape; the sentence names the first one.
    """
    for tensor in wanted:
        if tensor.key not in shapes:
            if tensor.key.startswith("optimizer."):
                raise CheckpointError(
                    f"{folder}: no {tensor.key}, so that parameter was frozen when this was saved; to start a stage "
                    "that trains other parts, give it a run folder of its own and checkpoint.init_from"
                )
            raise CheckpointError(f"{folder}: no tensor {tensor.key}, which this model needs")
        if shapes[tensor.key] != tuple(tensor.global_shape):
            raise CheckpointError(
                f"{folder}: a checkpoint of another model size, {tensor.key} is "
                f"{shapes[tensor.key]} there and {tuple(tensor.global_shape)} in this model"
            )
