"""What a run tells: one line a step on the terminal and in `log.txt`, `metrics.jsonl`, TensorBoard.

In: one `StepRecord` per step and held-out perplexities. Out: the files of the run folder. Exactly one rank makes a
`Metrics`; on a resume the lines of steps past the checkpoint are dropped, so that each step appears once.
"""

import json
import logging
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megavl.config import LoggingConfig, Modality

SMOOTHING = 0.9
"""Weight of the past in the mean step time from which the time left is told."""


SPEEDS = (
    *("tokens_per_s", "images_per_s", "step_time_s", "data_wait_s", "tflops", "llm_tflops", "hardware_tflops"),
    *("mfu", "llm_mfu", "hfu", "memory_gib"),
)
"""Fields of a record under `speed/` in TensorBoard."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of `metrics.jsonl`. Sums and means are over the global batch; what is not finite is null."""

    step: int
    """Step, from 0."""
    modality: Modality | None
    """The one modality of the step, or None if mixed."""
    loss: float
    """Mean over supervised tokens, in nats."""
    loss_language: float | None
    """The same over language micro-batches; None without any."""
    loss_multimodal: float | None
    """The same over multimodal micro-batches; None without any."""
    tokens: int
    """Tokens read, padding included."""
    supervised_tokens: int
    """Tokens learnt."""
    images: int
    """Images encoded."""
    images_spread: int
    """Most minus fewest images of a data-parallel rank: what the others wait for."""
    grad_norm: float
    """Norm of the global gradient before clipping."""
    grad_norms: dict[str, float]
    """The same by trained component of the model (`grad_norm/` in TensorBoard)."""
    lr: float
    """Learning rate of the update."""
    step_time_s: float
    """Wall time from one step's end to the next, waiting for data included, saving and validating excluded."""
    data_wait_s: float
    """Longest time that a rank waited for its batch."""
    tokens_per_s: float
    """`tokens` / `step_time_s`, all ranks together."""
    images_per_s: float
    """`images` / `step_time_s`."""
    tflops: float
    """Model operations (see flops.py) per second and rank, in 1e12."""
    llm_tflops: float
    """The same of the language model alone, with the head over every token."""
    hardware_tflops: float
    """Operations carried out per second and rank, in 1e12: with padding, recomputation and repeated encoding."""
    mfu: float | None
    """`tflops` over the device's peak, or None where that is not known; so with the next two."""
    llm_mfu: float | None
    """`llm_tflops` over the peak."""
    hfu: float | None
    """`hardware_tflops` over the peak."""
    parts: dict[str, float]
    """Part of the step (see step_clock.py) -> seconds on the rank that takes longest, and `checkpoint`: seconds that
    training waited for saving since the line before. On a GPU the update is counted in the next line."""
    bubble: tuple[float, ...]
    """By pipeline rank: the share of the schedule's time in which it computes nothing."""
    memory_gib: float
    """Peak memory of the rank that needs most: tensors on the device in this step; on the CPU the process so far."""
    skipped: bool
    """The update was skipped because loss or gradient was not finite."""
    language_rows: int
    """Language rows of this step."""
    rows: int
    """Rows of this step."""
    failed_samples: int
    """Samples so far in this process that could not be decoded."""


def start_logging(rank: int) -> None:
    """Show what the package logs: everything on rank 0, warnings on the others."""
    handler = logging.StreamHandler(sys.stdout if rank == 0 else sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger = logging.getLogger("megavl")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


class Metrics:
    """The one writer of a run's reports."""

    def __init__(self, run_dir: Path, steps: int, wanted: LoggingConfig, resume_step: int = 0) -> None:
        """Open the files of a run folder and drop what a resumed run will write again.

        Args:
            run_dir: the run folder; made if missing.
            steps: steps of the whole run.
            wanted: what to write.
            resume_step: first step that will be written.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._steps, self._wanted = steps, wanted
        # soft_wrap below: a line stays a line, however narrow the terminal or pipe.
        self._console = Console(highlight=False)
        self._log = (run_dir / "log.txt").open("a", encoding="utf-8")
        self._logged = logging.StreamHandler(self._log)  # what the package logs is in the file too
        logging.getLogger("megavl").addHandler(self._logged)
        kept = trim(run_dir / "metrics.jsonl", resume_step)
        self.validated = frozenset(line["step"] for line in kept if "validation" in line)
        """Steps whose held-out perplexity is already in the file."""
        self._language_rows = sum(line.get("language_rows", 0) for line in kept)
        self._rows = sum(line.get("rows", 0) for line in kept)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = _board(run_dir / "tensorboard", resume_step) if wanted.tensorboard else None
        self._mean_time: float | None = None

    def note(self, text: str) -> None:
        """Print a line, and keep it in `log.txt`."""
        self._console.print(text, soft_wrap=True, markup=False)
        self._to_log(text)

    def step(self, record: StepRecord) -> None:
        """Write one step everywhere."""
        self._language_rows += record.language_rows
        self._rows += record.rows
        share = self._language_rows / max(1, self._rows)
        self._to_file({**asdict(record), "language_share": share})
        past = record.step_time_s if self._mean_time is None else self._mean_time
        self._mean_time = SMOOTHING * past + (1 - SMOOTHING) * record.step_time_s
        line = _line(record, self._steps, (self._steps - record.step - 1) * self._mean_time)
        self._to_log(line)
        if (record.step + 1) % self._wanted.every == 0 or record.step + 1 == self._steps or record.skipped:
            colour = {"language": "cyan", "multimodal": "magenta", None: "white"}[record.modality]
            self._console.print(line, soft_wrap=True, markup=False, style="red" if record.skipped else colour)
        if self._board is not None:
            self._to_board(record, share)

    def validation(self, step: int, results: dict[str, dict[str, float]]) -> None:
        """Write held-out results.

        Args:
            step: steps done so far.
            results: for each validation source `loss` (nats per token), `ppl` and `tokens`.
        """
        self._to_file({"step": step, "validation": results})
        for name, result in results.items():
            values = f"loss {result['loss']:.4f}  ppl {result['ppl']:.3f}  {result['tokens']:.0f} tokens"
            self.note(f"step {step}  held-out {name}  {values}")
            if self._board is not None:
                self._board.add_scalar(f"validation/{name}/ppl", result["ppl"], step)

    def close(self) -> None:
        """Flush and close."""
        logging.getLogger("megavl").removeHandler(self._logged)
        self._file.close()
        self._log.close()
        if self._board is not None:
            self._board.close()

    def _to_file(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._file.flush()  # a killed run keeps its last step

    def _to_log(self, text: str) -> None:
        self._log.write(text + "\n")
        self._log.flush()

    def _to_board(self, record: StepRecord, share: float) -> None:
        assert self._board is not None
        values = {**asdict(record), "language_share": share}
        for name in ("loss", "loss_language", "loss_multimodal", "grad_norm", "lr", "language_share", "images_spread"):
            if values[name] is not None:
                self._board.add_scalar(f"train/{name}", values[name], record.step)
        for name in SPEEDS:
            if values[name] is not None:
                self._board.add_scalar(f"speed/{name}", values[name], record.step)
        for component, norm in record.grad_norms.items():
            self._board.add_scalar(f"grad_norm/{component}", norm, record.step)
        for part, seconds in record.parts.items():
            self._board.add_scalar(f"parts/{part}_s", seconds, record.step)
        for rank, share_idle in enumerate(record.bubble):
            self._board.add_scalar(f"bubble/pipeline_rank_{rank}", share_idle, record.step)


def trim(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps from `resume_step` on, and a last line that a crash cut short.

    A validation line carries the number of steps done, so the one at `resume_step` itself still holds.

    Returns:
        The lines that stay.
    """
    if not path.exists():
        return []
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["step"] < resume_step or ("validation" in line and line["step"] == resume_step > 0):
            kept.append(line)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
    return kept


def _line(record: StepRecord, steps: int, left_s: float) -> str:
    """The line of one step, such as
    `step 12/100  multimodal  loss 3.2100  lr 1.00e-03  grad 0.512  10.2k tok/s  98 img/s  mfu 38.1%  bubble 6%
    41.2 GiB  wait 0.01s  left 0:02:03`; without images, peak or pipeline their parts are left out.
    """
    parts = [
        f"step {record.step + 1}/{steps}",
        f"{record.modality or 'mixed':10}",
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.2e}",
        f"grad {record.grad_norm:.3f}",
        f"{_short(record.tokens_per_s)} tok/s",
        f"{_short(record.images_per_s)} img/s" if record.images else "",
        f"mfu {100 * record.mfu:.1f}%" if record.mfu is not None else "",
        f"bubble {100 * max(record.bubble):.0f}%" if len(record.bubble) > 1 else "",
        f"{record.memory_gib:.1f} GiB",
        f"wait {record.data_wait_s:.2f}s",
        f"left {_clock(left_s)}",
    ]
    if record.skipped:
        parts.append("SKIPPED: not finite")
    return "  ".join(part for part in parts if part)


def _short(rate: float) -> str:
    if rate >= 1000:
        return f"{rate / 1000:.1f}k"
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def _board(folder: Path, resume_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # a second of import, needed on one rank only

    return SummaryWriter(str(folder), purge_step=resume_step or None)
