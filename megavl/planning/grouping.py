"""What grouping rows by modality is worth at scale, on paper: `data.grouping` none, microbatch, step on the same rows.

In: a `Case`, data-parallel ranks, micro-batches, how long rows are and how many images they hold. Out: seconds of all
steps under each grouping, and what they are made of. All groupings read the same rows; the three of the recipe in the
order in which `data/mixture.py` deals them, and `shuffled` as a plain shuffle of both modalities would.

The parts of a step's time, means over ranks: `compute`, the slowest stage at work on tokens and images; `padding`, the
same stage at work on padding (with a pipeline, the micro-batches of a rank are padded to the longest of the step);
`bubble`, that stage waiting for others; `wait`, the rank waiting for the slowest data-parallel rank.
Shapes: r data-parallel ranks, m micro-batches of one row, s stages, n rows of all steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavl.data.order import ModalitySchedule, exact
from megavl.model.layer_split import split_layers
from megavl.planning.costs import Case, stage_pieces, transfer_s
from megavl.planning.schedule import rank_tasks
from megavl.training.flops import StepCounts

GROUPINGS = ("shuffled", "none", "microbatch", "step")
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RowSizes:
    """How large made-up rows are."""

    packed: bool
    """Rows are full; otherwise each is one sample."""
    seq_length: int = 4096
    """Tokens of a full row, and the longest sample."""
    images: tuple[int, int] = (3, 6)
    """Fewest and most images of a multimodal row; of an unpacked one 1 to 2."""
    text_median: int = 500
    """Text tokens of an unpacked sample: log-normal, with a spread of e."""


@dataclass(frozen=True, kw_only=True)
class GroupingTime:
    """Seconds of all steps under one grouping."""

    grouping: str
    compute: float
    padding: float
    bubble: float
    wait: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.compute + self.padding + self.bubble + self.wait


class _Rows(NamedTuple):
    """Tokens, padding included, sum of squared document lengths, images, labels; each [r, m] or [n]."""

    tokens: Array
    squared: Array
    images: Array
    logits: Array

    def take(self, index: NDArray[np.int64]) -> "_Rows":
        return _Rows(*(values[index] for values in self))


def compare_groupings(
    case: Case,
    sizes: RowSizes,
    *,
    data: int,
    micro_batches: int,
    steps: int = 40,
    language_share: float = 0.7,
    seed: int = 0,
) -> list[GroupingTime]:
    """Time every grouping on the same rows.

    Args:
        case: the setting; a micro-batch is one row, chunks per rank are not simulated.
        sizes: of the rows.
        data: r.
        micro_batches: m.
        steps: simulated; the share of text steps among them should be a whole number of steps.
        language_share: of rows.
        seed: of the rows.
    """
    per_step = data * micro_batches
    random = np.random.default_rng(seed)
    rows = {language: _draw(random, case, sizes, language, steps * per_step) for language in (True, False)}
    schedule = ModalitySchedule(target=exact(language_share), warmup_steps=exact(0.0))
    found = []
    for grouping in GROUPINGS:
        used = {True: 0, False: 0}
        parts = np.zeros(4)
        for step in range(steps):
            language = _modalities(schedule, "none" if grouping == "shuffled" else grouping, step, per_step)
            if grouping == "shuffled":
                random.shuffle(language)
            batch = _Rows(*(np.empty(per_step) for _ in _Rows._fields))
            for kind in (True, False):
                mine = language == kind
                count = int(mine.sum())
                taken = rows[kind].take(np.arange(used[kind], used[kind] + count))
                for target, values in zip(batch, taken, strict=True):
                    target[mine] = values
                used[kind] += count
            # Row i belongs to micro-batch i // r of rank i % r.
            parts += _step_parts(case, _Rows(*(v.reshape(micro_batches, data).T for v in batch)))
        compute, padding, bubble, wait = parts.tolist()
        found.append(GroupingTime(grouping=grouping, compute=compute, padding=padding, bubble=bubble, wait=wait))
    return found


def grouping_lines(times: Sequence[GroupingTime]) -> list[str]:
    """A line per grouping, with the gain over shuffled rows and how much of it each part gives."""
    mixed = times[0]
    lines = [f"{'grouping':10} {'seconds':>9} {'gain':>7}   {'compute':>8} {'padding':>8} {'bubble':>8} {'wait':>8}"]
    for time in times:
        shares = [
            100 * (getattr(mixed, part) - getattr(time, part)) / time.total
            for part in ("compute", "padding", "bubble", "wait")
        ]
        gain = 100 * (mixed.total / time.total - 1)
        lines.append(
            f"{time.grouping:10} {time.total:9.2f} {gain:+6.1f}%   " + " ".join(f"{share:+7.1f}%" for share in shares)
        )
    return lines


def _draw(random: np.random.Generator, case: Case, sizes: RowSizes, language: bool, count: int) -> _Rows:
    """Rows of one modality, [n]."""
    full, slots = sizes.seq_length, case.model.tokens_per_image
    if sizes.packed:
        images = np.zeros(count) if language else random.integers(sizes.images[0], sizes.images[1] + 1, count)
        tokens = np.full(count, float(full))
    else:
        images = np.zeros(count) if language else random.integers(1, 3, count)
        text = np.exp(random.normal(np.log(sizes.text_median), 1.0, count))
        tokens = np.clip(np.round(text), 16, full - images * slots) + images * slots
    return _Rows(tokens, tokens**2, images.astype(np.float64), tokens.copy())


def _modalities(schedule: ModalitySchedule, grouping: str, step: int, rows: int) -> NDArray[np.bool_]:
    """Which rows of a step are language, as `StepPlan` deals them."""
    if grouping == "none":  # they alternate within the step
        before = np.array([schedule.language_before(step, row, rows) for row in range(rows + 1)])
        return np.diff(before) > 0
    units = rows if grouping == "microbatch" else 1  # language rows first
    count = schedule.language_before(step + 1, 0, units) - schedule.language_before(step, 0, units)
    return np.arange(rows) < count * (rows // units)


def _step_parts(case: Case, rows: _Rows) -> Array:
    """(compute, padding, bubble, wait) of one step, from its rows [r, m]."""
    forward, backward = _stage_seconds(case, rows)  # [r, m, s]
    padded = rows
    if case.parallel.pipeline > 1:
        longest = rows.tokens.max(axis=1, keepdims=True)
        spare = longest - rows.tokens
        # Padding is a document of its own, and the head runs over it too.
        padded = _Rows(rows.tokens + spare, rows.squared + spare**2, rows.images, rows.logits + spare)
    padded_forward, padded_backward = _stage_seconds(case, padded)
    work = (padded_forward + padded_backward).sum(axis=1)  # [r, s]
    slowest = work.argmax(axis=1)
    useful = (forward + backward).sum(axis=1)[np.arange(len(work)), slowest]
    seconds = _pipeline_seconds(padded_forward, padded_backward, transfer_s(case, int(padded.tokens.max())))
    busy = work.max(axis=1)
    return np.array([useful.mean(), (busy - useful).mean(), (seconds - busy).mean(), (seconds.max() - seconds).mean()])


def _stage_seconds(case: Case, rows: _Rows) -> tuple[Array, Array]:
    """Forward and backward seconds, [r, m, s], from what one token, image and label cost."""
    split = split_layers(case.model.decoder.layers, case.parallel)
    directions = []
    for direction in (0, 1):
        layer = sum(
            _unit(case, "layer", direction, name) * values
            for name, values in zip(("tokens", "squared_lengths"), (rows.tokens, rows.squared), strict=True)
        )
        seconds = np.stack([count * layer for count in split], axis=-1)
        seconds[..., 0] += _unit(case, "first", direction, "images") * rows.images
        seconds[..., -1] += _unit(case, "last", direction, "logits") * rows.logits
        directions.append(seconds)
    return directions[0], directions[1]


def _unit(case: Case, piece: str, direction: int, name: str) -> float:
    """Seconds that one more token, squared token, image or label costs a piece of a stage."""
    zero = {"images": 0, "tokens": 0, "squared_lengths": 0, "logits": 0}
    large = 1_000_000
    some, none = (StepCounts(**{**zero, name: value}) for value in (large, 0))
    return (stage_pieces(case, some)[piece][direction] - stage_pieces(case, none)[piece][direction]) / large


def _pipeline_seconds(forward: Array, backward: Array, transfer: float) -> Array:
    """Seconds of a 1F1B step of every data-parallel rank at once, [r]; transfers run beside the computation."""
    ranks, micro_batches, stages = forward.shape
    orders = [rank_tasks(stage, stages, 1, micro_batches) for stage in range(stages)]
    at, free = [0] * stages, [np.zeros(ranks) for _ in range(stages)]
    end: dict[tuple[bool, int, int], Array] = {}
    while any(at[stage] < len(orders[stage]) for stage in range(stages)):
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                task = order[at[stage]]
                neighbour = stage + (1 if task.backward else -1)
                needed = (task.backward, task.micro_batch, neighbour)
                if 0 <= neighbour < stages and needed not in end:
                    break
                ready = end[needed] + transfer if needed in end else 0.0
                seconds = (backward if task.backward else forward)[:, task.micro_batch, stage]
                free[stage] = np.maximum(free[stage], ready) + seconds
                end[task.backward, task.micro_batch, stage] = free[stage]
                at[stage] += 1
    return np.max(np.stack(free), axis=0)
