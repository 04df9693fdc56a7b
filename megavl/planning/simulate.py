"""Run a pipeline step on paper: when every rank computes what, how long it waits, how long the step takes.

In: seconds of every stage for every micro-batch (they may differ: text and images) and of a transfer. Out: `Simulation`
with every pass as a `Span`.

1F1B: megatron-core sends and receives in place, so a rank goes on only when its neighbour has taken what it sent; in
the steady state one call does both. Interleaved: transfers run beside the computation, and a rank waits only for what
it needs. Stage s lies on rank s % p, chunk s // p.
Shapes: m micro-batches, p pipeline ranks, v chunks per rank, s = p * v stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megavl.planning.schedule import Task, rank_tasks, warmup_passes


class Span(NamedTuple):
    """One pass as it ran."""

    rank: int
    task: Task
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """One step of one pipeline."""

    pipeline: int
    """Pipeline ranks."""
    step_s: float
    """Seconds from the first pass to the end of the last."""
    spans: tuple[Span, ...]
    """Every pass."""

    def busy_s(self, rank: int) -> float:
        """Seconds that a rank computes."""
        return sum(span.end - span.start for span in self.spans if span.rank == rank)

    def bubbles(self) -> list[float]:
        """Share of the step that each rank does not compute."""
        return [1 - self.busy_s(rank) / self.step_s for rank in range(self.pipeline)]


def simulate(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    *,
    pipeline: int,
    virtual: int = 1,
    transfer: float = 0.0,
) -> Simulation:
    """One step.

    Args:
        forward: [m][s] seconds of the forward pass of a micro-batch on a stage.
        backward: [m][s] seconds of its backward pass.
        pipeline: p.
        virtual: v.
        transfer: seconds that hidden states take from rank to rank.

    Raises:
        ValueError: stages or micro-batches do not fit the schedule.
    """
    micro_batches, stages = len(forward), pipeline * virtual
    if {len(row) for row in (*forward, *backward)} != {stages} or len(backward) != micro_batches:
        raise ValueError(f"the times are not of {micro_batches} micro-batches and {stages} stages")
    if virtual > 1 and micro_batches % pipeline:
        raise ValueError(f"{micro_batches} micro-batches are no multiple of {pipeline} pipeline ranks (interleaved)")
    ranks = [_Rank(rank, pipeline, virtual, micro_batches) for rank in range(pipeline)]
    mail = _Mail(transfer=transfer, waits=virtual == 1)
    spans: list[Span] = []
    while any(rank.steps for rank in ranks):
        moved = [rank.advance(mail, forward, backward, spans) for rank in ranks]
        assert any(moved), "the schedule waits for itself"
    return Simulation(pipeline=pipeline, step_s=max(span.end for span in spans), spans=tuple(spans))


Message = tuple[bool, int, int]
"""(gradient?, micro-batch, stage that it goes to)."""


@dataclass(frozen=True)
class _Exchange:
    """Messages that a rank sends and takes in one call."""

    sends: tuple[Message, ...]
    takes: tuple[Message, ...]


class _Mail:
    """When each message was offered, and when its receiver asked for it."""

    def __init__(self, *, transfer: float, waits: bool) -> None:
        self.transfer, self.waits = transfer, waits
        self.offered: dict[Message, float] = {}
        self.asked: dict[Message, float] = {}

    def finish(self, exchange: _Exchange, now: float) -> float | None:
        """When an exchange that a rank reached at `now` is over, or None while that is not known."""
        for message in exchange.sends:
            self.offered.setdefault(message, now)
        for message in exchange.takes:
            self.asked.setdefault(message, now)
        needed = (*exchange.takes, *(exchange.sends if self.waits else ()))
        if any(m not in self.offered or (self.waits and m not in self.asked) for m in needed):
            return None
        met = (max(self.offered[m], self.asked[m]) if self.waits else self.offered[m] for m in needed)
        return max([now, *(start + self.transfer for start in met)])


class _Rank:
    """A rank's calls in order, and how far it is."""

    def __init__(self, rank: int, pipeline: int, virtual: int, micro_batches: int) -> None:
        self.rank, self.pipeline, self.now = rank, pipeline, 0.0
        self.last_stage = pipeline * virtual - 1
        tasks = rank_tasks(rank, pipeline, virtual, micro_batches)
        warmup = warmup_passes(rank, pipeline, virtual, micro_batches) if virtual == 1 else len(tasks)
        self.steps: list[Task | _Exchange] = []  # reversed: the next one is the last
        self.steps.append(_Exchange((), self._takes(tasks[0])))
        for index, (task, following) in enumerate(zip(tasks, [*tasks[1:], None], strict=True)):
            self.steps.append(task)
            sends, takes = self._sends(task), () if following is None else self._takes(following)
            if warmup <= index < len(tasks) - 1 - warmup:  # steady state: one call
                self.steps.append(_Exchange(sends, takes))
            else:
                self.steps += [_Exchange(sends, ()), _Exchange((), takes)]
        self.steps.reverse()

    def advance(
        self, mail: _Mail, forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], spans: list[Span]
    ) -> bool:
        """Go on until a message is missing; whether anything was done."""
        before = len(self.steps)
        while self.steps:
            step = self.steps[-1]
            if isinstance(step, _Exchange):
                end = mail.finish(step, self.now)
                if end is None:
                    break
            else:
                seconds = (backward if step.backward else forward)[step.micro_batch][self._stage(step)]
                end = self.now + seconds
                spans.append(Span(self.rank, step, self.now, end))
            self.now = end
            self.steps.pop()
        return len(self.steps) < before

    def _stage(self, task: Task) -> int:
        return task.chunk * self.pipeline + self.rank

    def _takes(self, task: Task) -> tuple[Message, ...]:
        """What a pass needs from a neighbour."""
        outermost = self.last_stage if task.backward else 0
        stage = self._stage(task)
        return () if stage == outermost or self.pipeline == 1 else ((task.backward, task.micro_batch, stage),)

    def _sends(self, task: Task) -> tuple[Message, ...]:
        """What a pass makes for a neighbour."""
        to = self._stage(task) + (-1 if task.backward else 1)
        return ((task.backward, task.micro_batch, to),) if 0 <= to <= self.last_stage and self.pipeline > 1 else ()
