"""What goes through formats that have no place of their own for it: side files in the checkpoint's folder.

In: `Contents`, or a folder. Out: side files, or what they hold.

    unused.safetensors     tensors that no forward pass reads, by their original names
    files/                 tokenizer, processor and configuration files of the checkpoint that it came from
"""

import shutil
from pathlib import Path

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import Progress
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.safetensors_file import read_safetensors, write_safetensors

UNUSED, FILES = "unused.safetensors", "files"


def write_unused(contents: Contents, folder: Path, progress: Progress) -> None:
    """Write `unused.safetensors`, where there are such tensors.

    Raises:
        CheckpointError: the disk is full.
    """
    if contents.unused:
        write_safetensors(contents.unused, folder / UNUSED, progress)


def read_unused(folder: Path) -> dict[str, LazyTensor]:
    """Tensors of `unused.safetensors`; none where there is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / UNUSED
    return read_safetensors(path) if path.exists() else {}


def write_files(contents: Contents, folder: Path) -> None:
    """Copy the files that are handed on."""
    if contents.files:
        (folder / FILES).mkdir()
    for name, file in contents.files.items():
        shutil.copyfile(file, folder / FILES / name)


def read_files(folder: Path) -> dict[str, Path]:
    """Files that were handed on."""
    inner = folder / FILES
    return {path.name: path for path in sorted(inner.iterdir()) if path.is_file()} if inner.is_dir() else {}
