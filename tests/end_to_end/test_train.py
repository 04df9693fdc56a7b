"""The real command on a tiny model: a whole run, stopped and resumed bit for bit, and every way to fail."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import command, finish, lines, make_data, run, start, wait_for

from megavl.parallel.groups import destroy_groups
from megavl.recipe import load_recipe, load_recipe_json
from megavl.train import main
from megavl.training import stopping

STEPS = 24
PIPELINE = ("--parallel.pipeline", "2", "--stage.steps", str(STEPS), "--data.language_warmup", "0.5")
PIPELINE += ("--parallel.layout", "auto")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> tuple[Path, str]:
    """The folder and the standard output of an uninterrupted run of two processes."""
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


@pytest.mark.slow
def test_stop_and_resume_bit_for_bit(recipe: Path, whole: tuple[Path, str]) -> None:
    folder = recipe.parent / "stopped"
    words = command(recipe, *PIPELINE, "--run_dir", str(folder))
    process = start(words)
    wait_for(folder / "metrics.jsonl", '"step": 2,', process)
    os.kill(workers(process.pid)[-1], signal.SIGTERM)  # one rank is told, both stop
    code, out, err = finish(process)
    assert code == 0, err
    done = lines(folder)[-1]["step"] + 1
    assert 3 <= done < STEPS
    assert f"{done} of {STEPS} steps are saved" in out
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step_{done:08d}"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {done}, "loss": 0}}\n{{"step": ')  # as if it had been killed a little later
    code, out, err = finish(start(words))
    assert code == 0, err
    assert f"starts at step {done}" in out
    same = ("step", "modality", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "images", "language_share")
    first, second = ([[line[name] for name in same] for line in lines(of)] for of in (whole[0], folder))
    assert first == second
    assert lines(whole[0], "validation")[-1] == lines(folder, "validation")[-1]


def workers(agent: int) -> list[int]:
    """Training processes of a torchrun agent."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    found = [int(c) for c in children if "megavl.train" in Path(f"/proc/{c}/cmdline").read_text()]
    assert len(found) == 2, found
    return found


@pytest.mark.slow
def test_one_rank_fails(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank waits in a collective; the launcher ends it."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3")
    lonely = recipe.parent / "lonely.py"
    fault = 'import os\nif os.environ["RANK"] == "1":\n    raise ValueError("this rank alone")\n'
    lonely.write_text(recipe.read_text() + fault)
    code, _, err = run(lonely)
    assert code != 0
    assert "megavl: this rank alone (rank 1)" in err


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Call `main` here: leave signals and process groups as they were."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(stopping, "FAREWELL_S", 0.0)
    yield
    for number, handler in before:
        signal.signal(number, handler)
    destroy_groups()


@pytest.mark.usefixtures("in_process")
def test_resume_under_another_layout(recipe: Path, whole: tuple[Path, str], tmp_path: Path) -> None:
    """From the two-process checkpoint of step 16 to the end on one process: the same losses, the same samples."""
    folder = tmp_path / "moved"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000024")
    options = (*PIPELINE[2:], "--data.workers", "0", "--run_dir", str(folder))
    assert main([str(recipe), *options]) == 0
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
