"""Opens a checkpoint that is published on its own: a file, or a folder as timm, open_clip, Meta or transformers lay it.

In: a path. Out: a `Source` whose tensors are read later. Only safetensors files and torch files that ask for nothing
but tensors are opened.
"""

from pathlib import Path

from megavl.checkpoint.convert.assemble import Source
from megavl.checkpoint.convert.hf_files import CONFIG, read_json
from megavl.checkpoint.convert.hf_weights import find_file, find_weights, read_bin, read_weights
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.safetensors_file import read_safetensors
from megavl.checkpoint.folder import CheckpointError

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
"""Kinds of files with weights, the preferred one first."""


def read_source(path: Path) -> Source:
    """Tensors and `config.json` of a public checkpoint.

    Args:
        path: a `.safetensors`, `.bin`, `.pth` or `.pt` file, or a folder with weights as transformers calls them, or
            with one such file (of each kind) under another name.

    Raises:
        CheckpointError: no weights there, several that could be meant, or damaged ones.
    """
    if path.is_file():
        return Source(origin=str(path), tensors=_read_file(path))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    config = read_json(path / CONFIG) if find_file(path, CONFIG) else None
    tensors = read_weights(path) if find_weights(path) else _read_file(_only_file(path))
    return Source(origin=str(path), tensors=tensors, config=config)


def _read_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path}: not a {', '.join(_SUFFIXES)} file")
    return read_safetensors(path) if path.suffix == _SUFFIXES[0] else read_bin(path)


def _only_file(folder: Path) -> Path:
    """The one file with weights, of the preferred kind."""
    for suffix in _SUFFIXES:
        found = sorted(entry.name for entry in folder.iterdir() if entry.suffix == suffix)
        if len(found) > 1:
            raise CheckpointError(f"{folder}: {len(found)} files could be meant: {', '.join(found)}; give one of them")
        if found:
            return find_file(folder, found[0]) or folder / found[0]
    raise CheckpointError(f"{folder}: no weights, looked for {', '.join('*' + suffix for suffix in _SUFFIXES)}")
