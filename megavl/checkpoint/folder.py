"""Where checkpoints lie on disk, which of them are complete, and which are removed.

In: the `checkpoints` folder of a run. Out: folders to write into and to read from. Nothing here knows torch.

    step_00000120/                  a complete checkpoint; it gets this name when it is complete
    step_00000120/metadata.json     megatron-core's marker, written last
    step_00000120/state.json        step, layout, optimizer kind and the caller's own values
    latest                          text: the name of the newest complete checkpoint
    incomplete_00000140_9f31c2a8/   being written, or left by a crash; never used twice, because a background
                                    writer can outlive its crashed trainer and go on writing there
    removed_00000100_51d0be77/      being removed
    carried/                        what every checkpoint hands on without using it (see `side_files.py`)

A rename makes a checkpoint complete, and a rename makes it cease to be one, so a crash at any moment leaves each of
them complete or absent. One process calls the functions that change something (rank 0).
"""

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

MARKER = "metadata.json"
"""megatron-core looks for this file to see whether a folder is a distributed checkpoint."""
STATE = "state.json"
"""Our own description of a checkpoint."""
LATEST = "latest"
"""The file that names the newest complete checkpoint."""

_COMPLETE = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"(incomplete|removed)_\d{8,}_[0-9a-f]{8}")
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What megatron-core reads from the marker: the format of the tensors and of the rest."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message is one sentence for the user."""


def step_name(step: int) -> str:
    """The folder name of the complete checkpoint after `step` steps."""
    return f"step_{step:08d}"


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint."""
    try:
        return isinstance(json.loads((folder / MARKER).read_text()), dict)
    except (OSError, ValueError):
        return False


def list_complete(checkpoints: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a `checkpoints` folder, oldest first, as (steps done, folder)."""
    if not checkpoints.is_dir():
        return []
    found = ((_COMPLETE.fullmatch(entry.name), entry) for entry in checkpoints.iterdir())
    return sorted((int(match[1]), entry) for match, entry in found if match and is_complete(entry))


def find_newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder or a `checkpoints` folder, or None."""
    inner = run / "checkpoints"
    complete = list_complete(inner if inner.is_dir() else run)
    return complete[-1][1] if complete else None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by `path`: a run folder, a `checkpoints` folder or one checkpoint.

    Raises:
        CheckpointError: there is none, or it is incomplete.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder, expected a run folder or a checkpoint")
    if is_complete(path):
        return path
    newest = find_newest(path)
    if newest is not None:
        return newest
    if _COMPLETE.fullmatch(path.name) or _LEFTOVER.fullmatch(path.name) or any(path.glob("*.distcp")):
        raise CheckpointError(f"{path}: this checkpoint is incomplete (no valid {MARKER}), saving it was interrupted")
    inner = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    raise CheckpointError(f"{path}: no complete checkpoint in it ({len(_leftovers(inner))} incomplete)")


def start_checkpoint(checkpoints: Path, step: int) -> Path:
    """Make the folder in which the checkpoint after `step` steps is to be written, under a name never used before."""
    folder = checkpoints / f"incomplete_{step:08d}_{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    return folder


def complete_checkpoint(folder: Path, step: int) -> Path:
    """Turn a folder from `start_checkpoint`, all its files written, into the newest complete checkpoint.

    Returns:
        The folder under its final name; `latest` names it.

    Raises:
        OSError: the file system refused.
    """
    checkpoints, target = folder.parent, folder.parent / step_name(step)
    assert not is_complete(target), f"{target} is complete already"
    write_durably(folder / MARKER, json.dumps(BACKEND))
    if target.exists():  # not ours: we give the name to complete checkpoints only
        _remove(target, step)
    folder.rename(target)
    sync_folder(checkpoints)
    write_durably(checkpoints / LATEST, target.name + "\n")
    return target


def abandon_checkpoint(folder: Path) -> None:
    """Remove a folder from `start_checkpoint` whose writing failed, to give its space back."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_old(checkpoints: Path, keep: int) -> list[Path]:
    """Remove complete checkpoints except the newest `keep` (at least one stays); returns what is gone."""
    old = list_complete(checkpoints)[: -max(keep, 1)]
    for step, folder in old:
        _remove(folder, step)
    return [folder for _, folder in old]


def remove_leftovers(checkpoints: Path) -> list[Path]:
    """Remove what a crash left behind and make `latest` name the newest complete checkpoint; at the start of a run."""
    leftovers = _leftovers(checkpoints)
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)  # an orphaned writer may still add a file: the next start gets it
    newest, latest = find_newest(checkpoints), checkpoints / LATEST
    if newest is not None and (not latest.exists() or latest.read_text().strip() != newest.name):
        write_durably(latest, newest.name + "\n")
    return leftovers


def check_space(folder: Path, needed: int) -> None:
    """Refuse to write `needed` bytes where they cannot fit.

    Raises:
        CheckpointError: the file system of `folder` has less free space.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"it needs {needed:,} bytes, the disk has {free:,} free")


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (values that JSON can hold) as the checkpoint's description."""
    write_durably(folder / STATE, json.dumps(state, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's description.

    Raises:
        CheckpointError: it has none (the folder was not written by training), or a damaged one.
    """
    try:
        state = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {STATE}, so it holds model weights but no training state") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE}: not valid JSON ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE}: a {type(state).__name__}, not the description of a checkpoint")
    return state


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace a file by `content` so that after a crash, of the machine too, it is the old one or the new one."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _leftovers(checkpoints: Path) -> list[Path]:
    """Folders that a crash left behind."""
    if not checkpoints.is_dir():
        return []
    names = sorted(entry for entry in checkpoints.iterdir() if entry.is_dir())
    return [n for n in names if _LEFTOVER.fullmatch(n.name) or (_COMPLETE.fullmatch(n.name) and not is_complete(n))]


def _remove(folder: Path, step: int) -> None:
    """Remove a checkpoint: first its name, so that a half-removed one is never taken for complete."""
    doomed = folder.with_name(f"removed_{step:08d}_{secrets.token_hex(4)}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
