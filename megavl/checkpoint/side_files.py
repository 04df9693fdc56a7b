"""What a run hands on without using it: from the checkpoint that it starts from into each of its own.

In: a checkpoint with `unused.safetensors` or `files/` (see `convert/carried.py`). Out: the same files in every
checkpoint of the run, so that an export after training has all that the released model had.

    checkpoints/carried/    what the run hands on; made anew at every start, nothing reads it but the run itself

They are copied once, when a run starts from another's checkpoint, and are hard links from then on: each checkpoint is
whole by itself, however many others are moved or removed. One process calls the functions here (rank 0).
"""

import hashlib
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from megavl.checkpoint import folder as folders
from megavl.checkpoint.convert import carried
from megavl.checkpoint.convert.hf_files import TOKENIZER, TOKENIZER_SETTINGS
from megavl.checkpoint.folder import CheckpointError

log = logging.getLogger(__name__)

CARRIED = "carried"
"""Where a run keeps them, in its `checkpoints` folder."""


def keep_side_files(checkpoints: Path, init_from: str, tokenizer: str) -> None:
    """Make `carried/` from what the run starts from: its newest checkpoint, or another's.

    Args:
        checkpoints: the run's `checkpoints` folder.
        init_from: where weights come from if the run has no checkpoint yet; empty: initial weights.
        tokenizer: fingerprint of the run's tokenizer; empty: not compared.

    Raises:
        CheckpointError: there is no checkpoint, or its unused tensors are damaged.
        OSError: the file system refused.
    """
    kept = checkpoints / CARRIED
    shutil.rmtree(kept, ignore_errors=True)  # of an earlier start, complete or not
    newest = folders.find_newest(checkpoints)
    if newest is None and not init_from:
        return
    source = newest or folders.find_checkpoint(Path(init_from))
    names = _names(source, tokenizer)
    for name in names:
        _place(source / name, kept / name, link=newest is not None)  # what another run owns may be edited there
    if names:
        log.info("every checkpoint carries along from %s: %s", source, ", ".join(names))


def add_side_files(checkpoints: Path, folder: Path) -> None:
    """Put what the run hands on into a checkpoint that is being written.

    Raises:
        OSError: the file system refused.
    """
    kept = checkpoints / CARRIED
    for file in sorted(kept.rglob("*")):
        if file.is_file():
            _place(file, folder / file.relative_to(kept), link=True)
    if (folder / carried.FILES).is_dir():
        folders.sync_folder(folder / carried.FILES)


def _names(source: Path, tokenizer: str) -> list[str]:
    """Which files of a checkpoint are handed on, relative to it."""
    try:
        unused = carried.read_unused(source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the run cannot hand it on, remove it to train without it") from None
    files = carried.read_files(source)
    hashes = {hashlib.sha256(files[name].read_bytes()).hexdigest() for name in TOKENIZER if name in files}
    if tokenizer and hashes and tokenizer not in hashes:
        log.warning("%s: not the run's tokenizer, not carried along; export with --tokenizer", source / carried.FILES)
        files = {name: path for name, path in files.items() if name not in (*TOKENIZER, *TOKENIZER_SETTINGS)}
    return [*([carried.UNUSED] if unused else []), *(f"{carried.FILES}/{name}" for name in files)]


def _place(source: Path, target: Path, *, link: bool) -> None:
    """Link a file to another name, or copy it where that is not wanted or not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        with suppress(OSError):  # a file system without hard links; what else is wrong shows while copying
            target.hardlink_to(source.resolve())
            return
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())
