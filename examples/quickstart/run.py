"""The quickstart: prepare data, train a small DeepSeek-VL through its stages, measure it on held-out data, show it.

    python examples/quickstart/run.py        (or `make quickstart`)

In: nothing but this machine. Out: `runs/quickstart/report.html` and `summary.json`, below the folder it is started in.
Each part is a process of its own. Parts that are done are skipped when it is started again, and a stage that was
interrupted goes on from its last checkpoint. What was made with other settings is thrown away first.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavl.evaluate.report import read_metrics

HERE = Path(__file__).resolve().parent
ROOT = Path("runs/quickstart")
STAGES = ("stage0", "stage1", "stage2", "stage3")
TITLES = {
    "prepare": "preparing text, pages and digits",
    "stage0": "language pre-training of the decoder",
    "stage1": "stage 1, the adaptor",
    "stage2": "stage 2, language and images together",
    "stage3": "stage 3, questions and answers",
    "measure": "measuring on held-out data",
}
NOMINAL_SECONDS = {"prepare": 20, "stage0": 125, "stage1": 40, "stage2": 85, "stage3": 170, "measure": 40}
"""On 2 idle cores; only the ratios matter, for the time that is left."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process of the quickstart."""

    name: str
    """Key of `TITLES`."""
    command: list[str]
    """What to start."""


@dataclass
class Progress:
    """What is done, kept in `progress.json` so that the next start can go on."""

    settings: str
    """Fingerprint of the files and options that the parts depend on."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each part so far, interrupted attempts included."""
    done: list[str] = field(default_factory=list)
    """Finished parts."""

    def save(self) -> None:
        """Write it, complete or not at all."""
        partial = ROOT / "progress.json.partial"
        partial.write_text(json.dumps(vars(self), indent=1))
        partial.replace(ROOT / "progress.json")


def main() -> int:
    """Run all parts; returns the exit status."""
    arguments = _parse()
    parts = _parts(arguments)
    progress = _take_up(_fingerprint(arguments))
    signal.signal(signal.SIGTERM, _interrupted)
    layout = f"tensor {arguments.tensor} x pipeline {arguments.pipeline}"
    _say(f"a small DeepSeek-VL on {arguments.tensor * arguments.pipeline} processes, {layout}; results in {ROOT}")
    for number, part in enumerate(parts, start=1):
        title = f"[{number}/{len(parts)}] {TITLES[part.name]}"
        if part.name in progress.done:
            _say(f"{title}: done before, in {progress.seconds[part.name]:.0f} s")
            continue
        _say(f"{title} (about {_minutes_left(progress)} left in all)")
        if problem := _run(part, progress):
            _say(f"{TITLES[part.name]}: {problem}", file=sys.stderr)
            return 1
    summary = _finish(arguments, progress)
    _say(f"digits {summary['digits_accuracy']:.1%} right, {summary['digits_accuracy_blind']:.1%} without the image")
    _say("text perplexity " + ", ".join(f"{name} {value:.2f}" for name, value in summary["text_ppl"].items()))
    _say(f"{summary['wall_s']:.0f} s in all; open {ROOT / 'report.html'}")
    return 0


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and measure a small DeepSeek-VL on this machine.")
    parser.add_argument("--tensor", type=int, default=0, help="tensor-parallel size; 0: fits the machine")
    parser.add_argument("--pipeline", type=int, default=0, help="pipeline-parallel size; 0: fits the machine")
    parser.add_argument("--steps", default="", help="steps of the four stages, such as 4,2,4,4, to try it out quickly")
    parser.add_argument(
        "--share", type=float, default=1.0, help="part of the data, such as 0.05, to try it out quickly"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="what is measured on")
    arguments = parser.parse_args()
    tensor, pipeline = _layout_for_machine()
    arguments.tensor, arguments.pipeline = arguments.tensor or tensor, arguments.pipeline or pipeline
    arguments.steps = [int(steps) for steps in arguments.steps.split(",")] if arguments.steps else []
    if arguments.steps and len(arguments.steps) != len(STAGES):
        parser.error(f"--steps names {len(arguments.steps)} stages, there are {len(STAGES)}")
    return arguments


def _layout_for_machine() -> tuple[int, int]:
    """Tensor 2 x pipeline 2 as processes on the CPU, or as many of them as there are GPUs."""
    gpus = 0
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        gpus = listed.stdout.count("GPU ") if listed.returncode == 0 else 0
    return {1: (1, 1), 2: (2, 1), 3: (2, 1)}.get(gpus, (2, 2))


def _parts(arguments: argparse.Namespace) -> list[Part]:
    python = [sys.executable, "-W", "ignore"]
    prepare = [*python, str(HERE / "prepare.py"), str(ROOT / "data"), "--share", str(arguments.share)]
    parts = [Part(name="prepare", command=prepare)]
    for number, stage in enumerate(STAGES):
        changed = ["--parallel.tensor", str(arguments.tensor), "--parallel.pipeline", str(arguments.pipeline)]
        if arguments.steps:
            steps = arguments.steps[number]
            changed += ["--stage.steps", str(steps), "--optim.warmup-steps", str(min(2, steps))]
            changed += ["--checkpoint.every-steps", "2", "--logging.validation-rows", "4"]
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(arguments.tensor * arguments.pipeline)]
        # Port 0: two quickstarts on one machine must not meet.
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        train = ["-m", "megavl.train", str(HERE / f"{stage}.py"), *changed]
        parts.append(Part(name=stage, command=[*python, *launch, *train]))
    measure = [*python, str(HERE / "measure.py"), str(ROOT), "--split", arguments.split]
    measure += ["--share", str(arguments.share)]
    return [*parts, Part(name="measure", command=measure)]


def _take_up(settings: str) -> Progress:
    """What an earlier start with the same settings has done; otherwise its files are removed."""
    path = ROOT / "progress.json"
    if path.exists():
        try:
            progress = Progress(**json.loads(path.read_text()))
            if progress.settings == settings:
                return progress
        except (json.JSONDecodeError, TypeError):
            pass
        _say(f"the settings have changed since {path} was written: starting over")
    for name in ("data", *STAGES, "measurements.json", "progress.json", "report.html", "summary.json"):
        old = ROOT / name
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    ROOT.mkdir(parents=True, exist_ok=True)
    progress = Progress(settings=settings)
    progress.save()
    return progress


def _fingerprint(arguments: argparse.Namespace) -> str:
    files = b"".join(
        path.read_bytes() for path in sorted(HERE.glob("*.py")) if path.name not in ("run.py", "present.py")
    )
    return hashlib.sha256(files + repr(sorted(vars(arguments).items())).encode()).hexdigest()


def _run(part: Part, progress: Progress) -> str:
    """Run a part to its end; returns what went wrong in one sentence, or nothing.

    Its standard output is shown, its standard error kept in a file: it holds the noise of libraries and, after a
    failure, tracebacks of all processes.
    """
    errors = ROOT / f"{part.name}.stderr.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    before, start = progress.seconds.get(part.name, 0.0), time.monotonic()
    interrupted = True
    with errors.open("w") as stderr:
        child = subprocess.Popen(part.command, stderr=stderr, env=environment)
        try:
            status = child.wait()
            interrupted = False
        finally:
            _stop(child)
            progress.seconds[part.name] = before + time.monotonic() - start
            if not interrupted and status == 0 and not _steps_missing(part):
                progress.done.append(part.name)
            progress.save()
    if status:
        return f"stopped with exit status {status}: {_cause(errors)} (more in {errors})"
    return _steps_missing(part)


def _steps_missing(part: Part) -> str:
    """A trainer that was asked to stop ends well without having done all its steps."""
    if part.name not in STAGES:
        return ""
    wanted = json.loads((ROOT / part.name / "recipe.json").read_text())["stage"]["steps"]
    steps = read_metrics(ROOT / part.name / "metrics.jsonl")
    done = steps[-1]["step"] + 1 if steps else 0
    return f"was stopped after {done} of {wanted} steps; start again to go on" if done < wanted else ""


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child that still runs; a trainer saves first, which Ctrl-C in the terminal has asked it to do already."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _cause(errors: Path) -> str:
    """The first line of a child's standard error that names an error, in the words of our own commands if they did."""
    lines = [line.strip() for line in errors.read_text(errors="replace").splitlines()]
    ours = [line for line in lines if line.startswith(("megavl: ", "error: "))]
    named = ours or [line for line in lines if "Error: " in line]
    return named[0] if named else "it wrote no error message"


def _minutes_left(progress: Progress) -> str:
    past = sum(NOMINAL_SECONDS[name] for name in progress.done)
    pace = sum(progress.seconds[name] for name in progress.done) / past if past else 1.0
    seconds = pace * (sum(NOMINAL_SECONDS.values()) - past)
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(10, round(seconds, -1)):.0f} s"


def _finish(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Write `summary.json` and `report.html`."""
    from present import write_report  # here: matplotlib is not needed while the stages run

    measured = json.loads((ROOT / "measurements.json").read_text())
    summary = {
        "digits_accuracy": measured["digits_accuracy"],
        "digits_accuracy_blind": measured["digits_accuracy_blind"],
        "text_ppl": measured["text_ppl"],
        "layout": f"tp{arguments.tensor}pp{arguments.pipeline}",
        "wall_s": round(sum(progress.seconds.values()), 1),
    }
    write_report(ROOT, summary, measured, progress.seconds)
    (ROOT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _say(text: str, file: Any = None) -> None:
    print(f"quickstart: {text}", file=file or sys.stdout, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        _say("interrupted; start again to go on", file=sys.stderr)
        sys.exit(130)
