"""The quickstart from end to end with a few steps a stage: it runs, goes on after an interruption, and reports.

Whether the model learns is not asked here: the quickstart itself states it, on every run.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavl.evaluate.report import read_metrics

pytest.importorskip("sklearn")

RUN = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"
COMMAND = [sys.executable, str(RUN), "--tensor", "1", "--pipeline", "2", "--steps", "12,2,4,3"]
COMMAND += ["--share", "0.03", "--split", "validation"]  # 320 digits to train on, 6 to measure on


def _start(folder: Path, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", **more}
    return subprocess.Popen(
        COMMAND, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _interrupt_in_stage0(folder: Path) -> str:
    """Send SIGTERM once the first stage has written a step."""
    process = _start(folder)
    metrics = folder / "runs" / "quickstart" / "stage0" / "metrics.jsonl"
    end = time.monotonic() + 900
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=900)[0] + f"\nexit {process.returncode}"


@pytest.mark.slow
def test_quickstart_goes_on_after_an_interruption_and_reports(tmp_path):
    first = _interrupt_in_stage0(tmp_path)
    root = tmp_path / "runs" / "quickstart"
    assert "interrupted; start again to go on" in first, first
    assert first.endswith("exit 130"), first
    progress = json.loads((root / "progress.json").read_text())
    assert progress["done"] == ["prepare"]

    process = _start(tmp_path)
    output = process.communicate(timeout=1800)[0]
    assert process.returncode == 0, output
    assert "preparing text, pages and digits: done before" in output
    assert re.search(r"starts at step [1-9]\d? of 12", output)  # the interrupted stage was not begun anew
    assert re.search(r"about \d+ (min|s) left in all", output)
    for stage, steps in zip(("stage0", "stage1", "stage2", "stage3"), (12, 2, 4, 3), strict=True):
        assert [entry["step"] for entry in read_metrics(root / stage / "metrics.jsonl")] == list(range(steps)), stage
    _check_results(root)

    again = _start(tmp_path)  # everything is done: nothing is trained, the results are written once more
    output = again.communicate(timeout=900)[0]
    assert again.returncode == 0, output
    assert output.count("done before") == 6


def _check_results(root: Path) -> None:
    summary = json.loads((root / "summary.json").read_text())
    assert set(summary) == {"digits_accuracy", "digits_accuracy_blind", "text_ppl", "layout", "wall_s"}
    assert set(summary["text_ppl"]) == {"language", "stage1", "stage2", "stage3"}
    assert summary["text_ppl"]["stage1"] == pytest.approx(summary["text_ppl"]["language"], rel=0.01)  # frozen
    assert all(0 <= summary[key] <= 1 for key in ("digits_accuracy", "digits_accuracy_blind"))
    assert summary["layout"] == "tp1pp2"
    assert summary["wall_s"] > 0
    page = (root / "report.html").read_text()
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    for title in ("Loss", "Language share in stage 2", "Handwritten digits", "Pages of text", "Speed"):
        assert f"<h2>{title}</h2>" in page


def test_a_failing_part_gives_one_sentence_and_a_non_zero_exit(tmp_path):
    shadow = tmp_path / "shadow" / "sklearn"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('not installed')\n")
    process = _start(tmp_path, PYTHONPATH=str(shadow.parent))
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "pip install 'megavl[quickstart]'" in output.splitlines()[-1]
