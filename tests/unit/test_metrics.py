"""The run's reports: each step once after a resume, valid JSON, plain lines where there is no terminal."""

import json
from pathlib import Path
from typing import Any

import pytest

from megavl.config import LoggingConfig
from megavl.training.metrics import Metrics, StepRecord, trim

PLAIN = LoggingConfig(tensorboard=False)


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "modality": "language",
        "loss": 2.5,
        "loss_language": 2.5,
        "loss_multimodal": None,
        "tokens": 1000,
        "supervised_tokens": 900,
        "images": 0,
        "images_spread": 0,
        "grad_norm": 1.5,
        "grad_norms": {"siglip": 0.9, "decoder": 1.2},
        "lr": 1e-3,
        "step_time_s": 0.5,
        "data_wait_s": 0.01,
        "tokens_per_s": 2000.0,
        "images_per_s": 0.0,
        "tflops": 0.1,
        "llm_tflops": 0.1,
        "hardware_tflops": 0.12,
        "mfu": None,
        "llm_mfu": None,
        "hfu": None,
        "parts": {"forward": 0.1, "backward": 0.2, "checkpoint": 0.0},
        "bubble": (0.1, 0.25),
        "memory_gib": 1.5,
        "skipped": False,
        "language_rows": 4,
        "rows": 4,
        "failed_samples": 0,
    }
    return StepRecord(**{**values, **changes})


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_step_once_after_a_resume(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 6, PLAIN)
    for step in range(5):
        first.step(
            record(step, modality="multimodal" if step == 1 else "language", language_rows=0 if step == 1 else 4)
        )
    first.validation(3, {"held": {"loss": 1.0, "ppl": 2.7, "tokens": 10.0}})
    first.validation(5, {"held": {"loss": 1.0, "ppl": 2.7, "tokens": 10.0}})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    again = Metrics(tmp_path, 6, PLAIN, resume_step=3)
    assert again.validated == {3}
    for step in range(3, 6):
        again.step(record(step))
    again.close()
    written = lines(tmp_path)
    assert [line["step"] for line in written if "loss" in line] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in written if "validation" in line] == [3]
    shares = [line["language_share"] for line in written if "loss" in line]
    assert shares == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4, 4 / 5, 5 / 6])  # the count goes on over the resume


def test_not_finite_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 1, PLAIN)
    metrics.step(record(0, loss=float("nan"), grad_norm=float("inf"), skipped=True))
    metrics.close()
    (line,) = lines(tmp_path)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["skipped"] is True


def test_fields_of_the_contract(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 1, PLAIN)
    metrics.step(record(0))
    metrics.close()
    contract = (
        "step modality loss tokens supervised_tokens images grad_norm lr step_time_s tokens_per_s tflops mfu skipped"
    )
    assert set(contract.split()) <= set(lines(tmp_path)[0])


def test_terminal_is_plain_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, 8, LoggingConfig(tensorboard=False, every=4))
    metrics.note("[start] a line with [brackets] and of more than eighty characters: " + "x" * 40)
    for step in range(8):
        metrics.step(record(step, skipped=step == 1))
    metrics.close()
    out = capsys.readouterr().out
    shown = out.splitlines()
    assert "\x1b" not in out
    assert shown[0].startswith("[start]")
    assert shown[0].endswith("xxx")
    assert [line.split()[1] for line in shown[1:]] == ["2/8", "4/8", "8/8"]  # every 4th, and what was skipped
    assert "SKIPPED" in shown[1]
    assert "left 0:00:02" in shown[2]  # four steps of half a second
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert len(log) == 9  # log.txt has every step


def test_tensorboard_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, 2, LoggingConfig())
    metrics.step(record(0))
    metrics.step(record(1, loss=2.0))
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.5, 2.0]
    assert [event.value for event in events.Scalars("grad_norm/siglip")] == pytest.approx([0.9, 0.9])
    assert "speed/mfu" not in events.Tags()["scalars"]
    assert [event.value for event in events.Scalars("parts/backward_s")] == pytest.approx([0.2, 0.2])
    assert [event.value for event in events.Scalars("bubble/pipeline_rank_1")] == [0.25, 0.25]


def test_one_line_stays_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, 100_000, PLAIN)
    metrics.step(record(41_999, modality="multimodal", images=9216, images_per_s=1234.5, mfu=0.4123, memory_gib=71.3))
    metrics.close()
    line = capsys.readouterr().out.splitlines()[0]
    assert "1.2k img/s  mfu 41.2%  bubble 25%  71.3 GiB" in line
    assert len(line) <= 150


def test_trim_without_a_file(tmp_path: Path) -> None:
    assert trim(tmp_path / "metrics.jsonl", 0) == []
    assert list(tmp_path.iterdir()) == []
