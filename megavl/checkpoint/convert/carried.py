"""What the Megatron formats keep beside their own files, so that a way through them loses nothing.

In: `Contents`, or a folder. Out: side files in the folder, or what they hold.

    model.json             sizes of the model
    unused.safetensors     tensors that no forward pass reads, by their original names
    files/                 tokenizer, processor and configuration files of the checkpoint that it came from
"""

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import Progress
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.safetensors_file import read_safetensors, write_safetensors
from megavl.checkpoint.folder import CheckpointError
from megavl.config import DecoderConfig, ModelConfig, SamConfig, SiglipConfig

MODEL, UNUSED, FILES = "model.json", "unused.safetensors", "files"


def write_carried(contents: Contents, folder: Path, drop_unused: bool, progress: Progress) -> None:
    """Write the three side files, each where there is something to write.

    Raises:
        CheckpointError: the disk is full.
    """
    (folder / MODEL).write_text(json.dumps(asdict(contents.model), indent=1) + "\n")
    write_unused(contents, folder, drop_unused, progress)
    if contents.files:
        (folder / FILES).mkdir()
        for name, file in contents.files.items():
            shutil.copyfile(file, folder / FILES / name)


def write_unused(contents: Contents, folder: Path, drop_unused: bool, progress: Progress) -> None:
    """Write `unused.safetensors`, where there are such tensors and they are wanted."""
    if contents.unused and not drop_unused:
        write_safetensors(contents.unused, folder / UNUSED, progress)


def read_model(folder: Path) -> ModelConfig | None:
    """Sizes from `model.json`; None: there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / MODEL
    if not path.exists():
        return None
    try:
        return model_of(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: not the sizes of a model ({error})") from None


def model_of(table: dict[str, Any]) -> ModelConfig:
    """The inverse of `asdict`.

    Raises:
        TypeError, KeyError: fields are missing or unknown.
    """
    sam: dict[str, Any] | None = table["sam"]
    tuples = {n: tuple(v) for n, v in sam.items() if isinstance(v, list)} if sam else {}
    sections = {
        "decoder": DecoderConfig(**table["decoder"]),
        "siglip": SiglipConfig(**table["siglip"]),
        "sam": SamConfig(**{**sam, **tuples}) if sam else None,
        "background": tuple(table["background"]),
    }
    missing = {field.name for field in fields(ModelConfig)} ^ set(table)
    if missing:
        raise KeyError(f"{', '.join(sorted(missing))} on one side only")
    return ModelConfig(**{**table, **sections})


def read_unused(folder: Path) -> dict[str, LazyTensor]:
    """Tensors of `unused.safetensors`; none where there is no such file."""
    path = folder / UNUSED
    return read_safetensors(path) if path.exists() else {}


def read_files(folder: Path) -> dict[str, Path]:
    """Files that were handed on."""
    inner = folder / FILES
    return {path.name: path for path in sorted(inner.iterdir()) if path.is_file()} if inner.is_dir() else {}
