"""The weights of a Hugging Face folder, whichever of its four forms they have.

In: a folder with `model.safetensors`, `pytorch_model.bin`, or shards of either and their index. Out: lazy tensors.
Names of files come from the index, which is somebody else's: only plain names of files in the folder itself are
followed, and links only as the Hugging Face cache makes them.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from megavl.checkpoint.convert.hf_files import read_json
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.safetensors_file import INDEX, SINGLE, read_safetensors
from megavl.checkpoint.convert.torch_file import read_torch_file
from megavl.checkpoint.folder import CheckpointError

_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def find_file(folder: Path, name: str) -> Path | None:
    """A file of the folder; None: there is none.

    Raises:
        CheckpointError: it is a link to somewhere other than the cache's own store.
    """
    path = folder / name
    if path.is_symlink():
        target, cache = path.resolve(), folder.resolve().parent.parent / "blobs"
        if target.parent != cache:  # the cache's `snapshots/<commit>/<name>` point to `blobs/<hash>`
            raise CheckpointError(f"{path}: a link to {target}, outside the checkpoint")
    return path if path.is_file() else None


def find_weights(folder: Path) -> list[str]:
    """Names of the files with weights, safetensors first; empty: there are none."""
    for single, index in ((SINGLE, INDEX), (_BIN, _BIN_INDEX)):
        if (folder / index).exists():
            return sorted(set(_weight_map(folder, index).values()))
        if (folder / single).exists():
            return [single]
    return []


def read_weights(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of the folder.

    Raises:
        CheckpointError: no weights, a shard is missing or damaged, or index and shards disagree.
    """
    files = find_weights(folder)
    if not files:
        raise CheckpointError(f"{folder}: no weights, looked for {SINGLE}, {INDEX}, {_BIN} and {_BIN_INDEX}")
    shards: dict[str, dict[str, LazyTensor]] = {}
    for name in files:
        path = find_file(folder, name)
        if path is None:
            raise CheckpointError(f"{folder}: shard {name} is missing, one of {len(files)} that the index names")
        shards[name] = read_safetensors(path) if path.suffix != ".bin" else read_bin(path)
    counts = Counter(tensor for shard in shards.values() for tensor in shard)
    doubled = [tensor for tensor, count in counts.items() if count > 1]
    if doubled:
        holders = [name for name, shard in shards.items() if doubled[0] in shard]
        raise CheckpointError(f"{folder}: {len(doubled)} tensors occur twice, {doubled[0]} in {' and '.join(holders)}")
    _check_index(folder, shards)
    return {tensor: lazy for shard in shards.values() for tensor, lazy in shard.items()}


def _check_index(folder: Path, shards: dict[str, dict[str, LazyTensor]]) -> None:
    """Where there is an index, it says what the shards hold."""
    for index in (INDEX, _BIN_INDEX):
        if (folder / index).exists():
            said = _weight_map(folder, index)
            for name, file in said.items():
                if name not in shards[file]:
                    raise CheckpointError(f"{folder / index}: {name} is said to be in {file} and is not")
            for file, shard in shards.items():
                for name in shard.keys() - said.keys():
                    raise CheckpointError(f"{folder / index}: {file} holds {name}, which the index does not name")
            return


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """Tensor -> file, all plain names of files."""
    table: Any = read_json(folder / index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{folder / index}: no weight_map")
    suffix = ".bin" if index == _BIN_INDEX else ".safetensors"
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
            raise CheckpointError(f"{folder / index}: {name} is said to be in {file!r}, not a {suffix} of this folder")
    return table


def read_bin(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a file of `torch.save`.

    Raises:
        CheckpointError: it is damaged, holds anything else, or asks for code.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, LazyTensor) for tensor in content.values()):
        raise CheckpointError(f"{path}: not a table of tensors")
    return content
