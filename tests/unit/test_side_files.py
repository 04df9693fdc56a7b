"""What checkpoints of a run hand on: the same bytes in each, each whole by itself, damage found at the start."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megavl.checkpoint import folder as folders
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.side_files import add_side_files, keep_side_files

TOKENIZER = b"a tokenizer"
FINGERPRINT = hashlib.sha256(TOKENIZER).hexdigest()
NAMES = ["files/config.json", "files/tokenizer.json", "files/tokenizer_config.json", "unused.safetensors"]


def save(checkpoints: Path, step: int) -> Path:
    """What a writer does, without tensors."""
    started = folders.start_checkpoint(checkpoints, step)
    add_side_files(checkpoints, started)
    return folders.complete_checkpoint(started, step)


def side_files(checkpoint: Path) -> dict[str, bytes]:
    found = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != folders.MARKER)
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in sorted(found)}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A converted checkpoint without tensors."""
    folder = tmp_path / "start"
    (folder / "files").mkdir(parents=True)
    (folder / folders.MARKER).write_text("{}")
    for name, content in (("config", b"{}"), ("tokenizer", TOKENIZER), ("tokenizer_config", b"{ }")):
        (folder / "files" / f"{name}.json").write_bytes(content)
    save_file({"attn_pool.latent": torch.arange(6.0)}, folder / "unused.safetensors")
    return folder


@pytest.mark.parametrize("links", [True, False])
def test_every_checkpoint_has_them_whatever_becomes_of_others(
    links: bool, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file system has no hard links; a resumed run goes on from its own."""

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    expected, checkpoints = side_files(start), tmp_path / "run" / "checkpoints"
    assert list(expected) == NAMES
    keep_side_files(checkpoints, str(start), FINGERPRINT)
    (start / "files" / "config.json").write_bytes(b"edited in place")
    shutil.rmtree(start)
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    assert side_files(first) == side_files(second) == expected
    assert (first / "unused.safetensors").samefile(second / "unused.safetensors") == links
    folders.remove_old(checkpoints, 1)
    shutil.rmtree(checkpoints / "carried")  # as if only the newest had been taken elsewhere
    keep_side_files(checkpoints, str(start), FINGERPRINT)
    assert side_files(save(checkpoints, 3)) == side_files(second) == expected


def test_a_run_without_any_has_none(tmp_path: Path, start: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    keep_side_files(checkpoints, str(start), "")
    keep_side_files(checkpoints, "", "")  # started again otherwise before its first checkpoint
    assert side_files(save(checkpoints, 1)) == {}
    keep_side_files(checkpoints, str(start), "")  # the run's own checkpoint is what it starts from
    assert side_files(save(checkpoints, 2)) == {}
    assert not (checkpoints / "carried").exists()


def test_another_tokenizer_is_left_behind(tmp_path: Path, start: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    keep_side_files(checkpoints, str(start), "b" * 64)
    assert list(side_files(save(checkpoints, 1))) == [NAMES[0], NAMES[3]]
    assert "not the run's tokenizer" in caplog.text


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_damage_is_found_at_the_start(size: int, tmp_path: Path, start: Path) -> None:
    unused = start / "unused.safetensors"
    unused.write_bytes(unused.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{unused}: .*; the run cannot hand it on, remove it to train without"):
        keep_side_files(tmp_path / "run" / "checkpoints", str(start), "")
    assert not (tmp_path / "run").exists()
