"""What a user may get wrong, through the real command: one sentence, a non-zero exit, nothing saved is lost."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import lines, make_data

from megavl.checkpoint import folder
from megavl.checkpoint.folder import find_newest
from megavl.data.store_writer import StoreWriter
from megavl.data.tokenizer import Tokenizer
from megavl.parallel.groups import destroy_groups
from megavl.train import main

STEPS = ("--stage.steps", "4", "--checkpoint.every_steps", "2")


@pytest.fixture
def whole(recipe: Path, in_process: None) -> Path:
    """The folder of a run of one process with two checkpoints."""
    run_dir = recipe.parent / "whole"
    if not run_dir.exists():
        assert main([str(recipe), *STEPS, "--data.workers", "0", "--run_dir", str(run_dir)]) == 0
        destroy_groups()
    return run_dir


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stage.stepz", "3"), ["--stage.stepz", "--stage.steps"]),
        (("--parallel.pipeline", "3"), ["3", "2"]),
        (
            ("--parallel.tensor", "2", "--model.decoder.heads", "1", "--model.decoder.kv-heads", "1"),
            ["heads", "1", "2"],
        ),
        (("--stage.global_batch", "5", "--stage.micro_batch", "2", "--optim.lr", "-1"), ["5", "2", "-1.0"]),
    ],
)
def test_bad_recipe_on_every_rank(
    recipe: Path,
    options: tuple[str, ...],
    words: list[str],
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Found before ranks wait for each other, so each ends by itself."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(recipe), *options]) != 0
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert "Traceback" not in err


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--data.tokenizer", "absent.model"), "absent.model"),
        (("--data.sources.0.path", "nowhere/text"), "nowhere/text"),
        (("--checkpoint.init_from", "no_such_run"), "no_such_run"),
    ],
)
def test_missing_files(
    recipe: Path, tmp_path: Path, change: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe), "--run_dir", str(tmp_path), "--data.workers", "0", *change]) != 0
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def cut_corpus(root: Path) -> tuple[str, ...]:
    """A `.bin` that is shorter than its `.idx` says."""
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{root}/text{suffix}", f"{root}/cut{suffix}")
    os.truncate(root / "cut.bin", 1000)
    return "--data.sources.0.path", str(root / "cut")


def strange_corpus(root: Path) -> tuple[str, ...]:
    """A store that was built with another tokenizer."""
    writer = StoreWriter(root / "strange", kind="text", tokenizer_fingerprint="f" * 64)
    writer.add(np.arange(5))
    writer.finish()
    return "--data.sources.0.path", str(root / "strange")


def mismatched_images(root: Path) -> tuple[str, ...]:
    """A sample with one placeholder and two images, as no importer writes it."""
    tokenizer = Tokenizer(root / "tokenizer.model")
    writer = StoreWriter(root / "mismatched", kind="caption", tokenizer_fingerprint=tokenizer.fingerprint)
    ids = np.array([tokenizer.bos_id, tokenizer.image_id, 40, tokenizer.eos_id])
    writer.add(ids, ids == 40, [b"first", b"second"])
    writer.finish()
    return "--data.sources.1.path", str(root / "mismatched"), "--stage.steps", "2", "--stage.number", "1"


def cut_checkpoint(root: Path) -> tuple[str, ...]:
    """A copy that was cut short."""
    copy = shutil.copytree(root / "whole", root / "cut_run")
    file = max(copy.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    return "--checkpoint.init_from", str(copy)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_corpus, ["cut.bin", "1000 bytes"]),
        (strange_corpus, ["strange", "tokenizer", "ffffffffffff"]),
        (mismatched_images, ["source images, sample 0: 1 image placeholders in the tokens, 2 images"]),
        (lambda _: ("--data.seq_length", "12"), ["source images: sample", "tokens, data.seq_length is 12"]),
        (cut_checkpoint, [".distcp: it has 100 bytes, .metadata refers to"]),
        (
            lambda root: ("--checkpoint.init_from", f"{root}/whole", "--model.decoder.ffn", "64"),
            ["linear_fc1", "(96, 32) there", "(128, 32) in this model"],
        ),
        (
            lambda root: ("--run_dir", f"{root}/whole", "--model.decoder.ffn", "64"),
            ["linear_fc1", "(96, 32) there", "(128, 32) in this model"],
        ),
    ],
)
def test_data_and_checkpoints_that_do_not_fit(
    recipe: Path,
    whole: Path,
    tmp_path: Path,
    change: Callable[[Path], tuple[str, ...]],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence with the file or the sample and both numbers; nothing that was saved is touched."""
    before = saved_files(whole / "checkpoints")
    options = ("--run_dir", str(tmp_path), "--data.workers", "0", *change(recipe.parent))
    assert main([str(recipe), *options]) != 0
    err = capsys.readouterr().err.strip().splitlines()
    assert all(word in err[-1] for word in words), err
    assert "Traceback" not in "".join(err)
    assert saved_files(whole / "checkpoints") == before


@pytest.mark.usefixtures("in_process")
def test_a_full_disk_while_saving(
    recipe: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run ends with both numbers, and the checkpoint that it went on from is still there to go on from."""
    run_dir = tmp_path / "full"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    before = saved_files(run_dir / "checkpoints" / "step_00000002")
    disk = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1000), rmtree=shutil.rmtree)
    monkeypatch.setattr(folder, "shutil", disk)
    assert main([str(recipe), *STEPS, "--data.workers", "0", "--run_dir", str(run_dir)]) != 0
    err = capsys.readouterr().err.strip().splitlines()
    assert "bytes, the disk has 1,000 free" in err[-1]
    assert str(run_dir) in err[-1]
    assert "Traceback" not in "".join(err)
    assert saved_files(run_dir / "checkpoints" / "step_00000002") == before
    assert find_newest(run_dir) == run_dir / "checkpoints" / "step_00000002"


def saved_files(checkpoints: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(checkpoints.rglob("*")) if p.is_file()}


@pytest.mark.usefixtures("in_process")
def test_not_finite_stops_the_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first update destroys the weights: each later step is skipped, until there are too many."""
    options = ("--optim.lr", "1e30", "--optim.warmup_steps", "0", "--stage.max_nonfinite", "3", "--stage.steps", "9")
    assert main([str(recipe), "--run_dir", str(tmp_path), "--data.workers", "0", *options]) != 0
    assert "3 steps in a row" in capsys.readouterr().err
    steps = lines(tmp_path)
    assert [line["skipped"] for line in steps] == [False, True, True, True]
    assert steps[1]["loss"] is None or steps[1]["grad_norm"] is None
    assert "skipped" in (tmp_path / "log.txt").read_text()
    assert not list((tmp_path / "checkpoints").glob("step_*"))


@pytest.mark.usefixtures("in_process")
def test_broken_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_data(tmp_path, broken_images=True)
    options = ("--data.workers", "0", "--data.max_failed_samples")
    assert main([str(recipe), *options, "5"]) != 0  # two image steps of four rows
    assert "8 images could not be decoded, data.max_failed_samples allows 5" in capsys.readouterr().err
    destroy_groups()
    assert main([str(recipe), *options, "8", "--run_dir", str(tmp_path / "patient")]) == 0
    assert lines(tmp_path / "patient")[-1]["failed_samples"] == 8
    assert (tmp_path / "patient" / "log.txt").read_text().count("source images, sample") == 8
