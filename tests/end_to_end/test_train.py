"""The real command on a tiny model: a whole run, stopped and resumed bit for bit, and a rank that fails."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import command, finish, lines, run, start

from megavl.parallel.vision_ahead import AheadEncoder
from megavl.recipe import load_recipe, load_recipe_json
from megavl.train import main

STEPS = 24
PIPELINE = (
    *("--parallel.pipeline", "2", "--parallel.vision", "split_model", "--parallel.layout", "auto"),
    *("--stage.steps", str(STEPS), "--data.language_warmup", "0.5"),
)


@pytest.fixture(scope="module")
def lonely(recipe: Path) -> Iterator["subprocess.Popen[str]"]:
    """A run of two processes of which the second fails at once while the first waits for it in a collective."""
    path = recipe.parent / "lonely.py"
    fault = 'import os\nif os.environ["RANK"] == "1":\n    raise ValueError("this rank alone")\n'
    path.write_text(recipe.read_text() + fault)
    process = start(command(path, "--run_dir", str(recipe.parent / "lonely")))
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(recipe: Path, lonely: "subprocess.Popen[str]") -> tuple[Path, str]:
    """The folder and the standard output of an uninterrupted run of two processes.

    `lonely` is started before: torchrun gives a waiting rank 30 s to end, which need not be waited for here.
    """
    folder = recipe.parent / "whole"
    options = ("--logging.tensorboard", "True", "--logging.validate_every", "8", "--checkpoint.every_steps", "8")
    options += ("--checkpoint.background", "True")
    code, out, err = run(recipe, *PIPELINE, *options, "--run_dir", str(folder))
    assert code == 0, err
    return folder, out


def test_run_folder(recipe: Path, whole: tuple[Path, str]) -> None:
    folder, out = whole
    steps = lines(folder)
    assert [line["step"] for line in steps] == list(range(STEPS))
    assert all(0 < line["loss"] < 10 and line["mfu"] is None and not line["skipped"] for line in steps)
    assert [line["step"] for line in lines(folder, "validation")] == [8, 16, 24]
    assert lines(folder, "validation")[-1]["validation"]["held_out"]["tokens"] > 0
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "step_00000016", "step_00000024"]
    assert list((folder / "tensorboard").iterdir())
    for text in (out, (folder / "log.txt").read_text()):
        assert f"step {STEPS}/{STEPS}" in text
        assert "finished" in text
    saved = load_recipe_json(folder / "recipe.json")
    assert (saved.parallel.pipeline, saved.parallel.layout) == (2, "1,1")
    assert saved.model == load_recipe(recipe).model


def test_start_tells_what_was_chosen(whole: tuple[Path, str]) -> None:
    _, out = whole
    for words in (
        "CPU mode",
        "layout 1,1",
        "attention exact",
        "pipeline 2",
        "layer 1 + norm + head",
        "frozen",
        "images  ",
        "epochs",
    ):
        assert words in out


def test_dry_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of the same run, and all problems of a bad one, without a process group and without a trace on disk."""
    folder = recipe.parent / "never"
    options = ["--run_dir", str(folder), "--dry-run", "--gpus", "2"]
    assert main([str(recipe), *PIPELINE, *options]) == 0
    out = capsys.readouterr().out
    for words in ("layout 1,1 ", "images: multimodal, share 50.00%, 24 samples", "estimate from assumed", "no problem"):
        assert words in out
    assert main([str(recipe), "--data.seq_length", "8", "--parallel.pipeline", "3", *options]) == 1
    told = capsys.readouterr().err
    for words in ("24 of 24 samples are longer than data.seq_length 8", "2 ranks do not divide by", "3 problem(s)"):
        assert words in told
    assert not folder.exists()


def test_language_share(whole: tuple[Path, str]) -> None:
    """The share falls to one half over the first 12 steps and is held to it from there on."""
    steps = lines(whole[0])
    assert {line["modality"] for line in steps} == {"language", "multimodal"}
    for line in steps:
        assert line["loss_language" if line["modality"] == "language" else "loss_multimodal"] == line["loss"]
        assert (line["images"] > 0) == (line["modality"] == "multimodal")
    assert steps[11]["language_share"] == pytest.approx(0.75, abs=1 / 12)
    assert steps[23]["language_share"] == pytest.approx((12 * 0.75 + 12 * 0.5) / 24, abs=1 / 24)


STOPPED = """
import os, pathlib, signal, threading, time


def stop_after_step_2():
    metrics = pathlib.Path("{metrics}")
    while not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


if os.environ["RANK"] == "1":
    threading.Thread(target=stop_after_step_2, daemon=True).start()
"""
"""Added to a recipe: one rank is told to stop. It tells itself, as a busy machine may keep others from it too long."""


@pytest.mark.slow
def test_stop_and_resume_bit_for_bit(recipe: Path, whole: tuple[Path, str]) -> None:
    folder, stopped = recipe.parent / "stopped", recipe.parent / "stopped.py"
    stopped.write_text(recipe.read_text() + STOPPED.format(metrics=folder / "metrics.jsonl"))
    code, out, err = run(stopped, *PIPELINE, "--run_dir", str(folder))
    assert code == 0, err
    done = lines(folder)[-1]["step"] + 1
    assert 3 <= done < STEPS
    assert f"{done} of {STEPS} steps are saved" in out
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step_{done:08d}"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {done}, "loss": 0}}\n{{"step": ')  # as if it had been killed a little later
    code, out, err = run(recipe, *PIPELINE, "--run_dir", str(folder))
    assert code == 0, err
    assert f"starts at step {done}" in out
    counts = ("tokens", "supervised_tokens", "images", "language_share")
    same = ("step", "modality", "loss", "grad_norm", "grad_norms", "lr", *counts)
    first, second = ([[line[name] for name in same] for line in lines(of)] for of in (whole[0], folder))
    assert first == second
    assert lines(whole[0], "validation")[-1] == lines(folder, "validation")[-1]


def test_one_rank_fails(lonely: "subprocess.Popen[str]") -> None:
    """The launcher ends the other one."""
    code, _, err = finish(lonely)
    assert code != 0
    assert "megavl: this rank alone (rank 1)" in err


@pytest.mark.usefixtures("in_process")
def test_resume_under_another_layout(
    recipe: Path, whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the two-process checkpoint of step 16 to the end on one process that encodes all images itself.

    Ahead: those of the first step when it begins, of all others timed at the end of the step before, none twice.
    """
    begin, early = AheadEncoder.begin, []

    def counted(self: AheadEncoder, batches: Any, mark: Any = None) -> None:
        early.append(mark is not None)
        begin(self, batches, mark)

    monkeypatch.setattr(AheadEncoder, "begin", counted)
    folder = tmp_path / "moved"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000024")
    options = (*PIPELINE[2:4], *PIPELINE[6:], "--data.workers", "0", "--run_dir", str(folder))
    assert main([str(recipe), *options]) == 0
    assert early == [False, *[True] * (STEPS - 16 - 1)]
    for moved, steady in zip(lines(folder), lines(whole[0]), strict=True):
        assert moved["loss"] == pytest.approx(steady["loss"], rel=1e-5)
        assert moved["grad_norm"] == pytest.approx(steady["grad_norm"], rel=1e-4)  # eight updates later
        assert moved["modality"] == steady["modality"]


@pytest.mark.usefixtures("in_process")
def test_start_from_another_run(recipe: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    """The next stage starts from the weights alone: step 0, and a loss that the first run has earned."""
    options = ("--checkpoint.init_from", str(whole[0]), "--stage.number", "3", "--stage.steps", "1")
    assert main([str(recipe), *options, "--data.workers", "0", "--run_dir", str(tmp_path)]) == 0
    (first,) = lines(tmp_path)
    assert first["step"] == 0
    beginning = next(line for line in lines(whole[0]) if line["modality"] == first["modality"])
    assert first["loss"] < 0.9 * beginning["loss"]
    assert "from weights of" in (tmp_path / "log.txt").read_text()
