"""The schedule on paper against the closed form, against megatron-core's own tables, and against a clock that ticks."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ideal_pipeline import closed_form
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megavl.planning.schedule import peak_held, rank_tasks, warmup_passes
from megavl.planning.simulate import Simulation, simulate


def uniform(pipeline: int, micro_batches: int, virtual: int = 1, transfer: float = 0.0) -> Simulation:
    stages = pipeline * virtual
    rows = [[1.0] * stages] * micro_batches, [[2.0] * stages] * micro_batches
    return simulate(*rows, pipeline=pipeline, virtual=virtual, transfer=transfer)


@pytest.mark.parametrize("pipeline", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 7, 32])
def test_equal_times_take_the_closed_form(pipeline: int, micro_batches: int) -> None:
    step = uniform(pipeline, micro_batches)
    assert step.step_s == pytest.approx(closed_form([3.0] * pipeline, micro_batches), abs=1e-9)
    assert step.bubbles() == pytest.approx([(pipeline - 1) / (micro_batches + pipeline - 1)] * pipeline)


@pytest.mark.parametrize("virtual", [2, 3])
def test_interleaving_divides_the_bubble(virtual: int) -> None:
    """m*t + (p - 1)*t / v for a rank's t, with the transfers hidden."""
    step = uniform(4, 8, virtual)
    assert step.step_s == pytest.approx(8 * 3.0 * virtual + 3 * 3.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_unequal_stages_stay_close_to_the_closed_form(seed: int) -> None:
    """The closed form leaves out that a slow early stage may start its last backward passes before others end."""
    draw = random.Random(seed)
    times = [draw.uniform(2, 4) for _ in range(4)]
    step = simulate([[t / 3 for t in times]] * 32, [[2 * t / 3 for t in times]] * 32, pipeline=4)
    assert step.step_s == pytest.approx(closed_form(times, 32), rel=0.03)
    assert step.step_s >= 32 * max(times)


@pytest.mark.parametrize(("pipeline", "virtual", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (2, 4, 2)])
def test_order_is_that_of_megatron_core(pipeline: int, virtual: int, micro_batches: int) -> None:
    table = get_schedule_table(micro_batches, virtual, pipeline)
    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        communicator: Any = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        _, _, warmup, _ = get_pp_rank_microbatches(micro_batches, virtual, pipeline, p2p_communicator=communicator)
        assert warmup_passes(rank, pipeline, virtual, micro_batches) == warmup
        tasks = rank_tasks(rank, pipeline, virtual, micro_batches)
        assert [(t.micro_batch, t.chunk) for t in tasks if not t.backward] == table
        assert [(t.micro_batch, virtual - 1 - t.chunk) for t in tasks if t.backward] == table
        assert [t.backward for t in tasks[:warmup]] == [False] * warmup
        assert [t.backward for t in tasks[warmup : warmup + 2]] in ([False, True], [True, True])


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 5), (3, 4), (4, 9), (4, 2)])
@pytest.mark.parametrize("transfer", [0, 2])
def test_one_forward_one_backward_against_a_ticking_clock(pipeline: int, micro_batches: int, transfer: int) -> None:
    for seed in range(5):
        draw = random.Random(seed)
        forward, backward = (
            [[draw.randint(1, 9) for _ in range(pipeline)] for _ in range(micro_batches)] for _ in range(2)
        )
        step = simulate(forward, backward, pipeline=pipeline, transfer=transfer)  # type: ignore[arg-type]
        assert step.step_s == tick(forward, backward, transfer)


def tick(forward: list[list[int]], backward: list[list[int]], transfer: int) -> int:
    """Seconds of a step, found by moving a clock by 1 and asking every rank what it can do; ranks are generators that
    are written as the schedule's loops read."""
    ranks = len(forward[0])
    programs = [program(rank, ranks, forward, backward) for rank in range(ranks)]
    waiting: list[Any] = [next(p) for p in programs]
    until, met, now, last = [0] * ranks, {}, 0, 0
    while any(w is not None for w in waiting):
        moved = True
        while moved:
            moved = False
            offered = {m for w in waiting if isinstance(w, tuple) for m in w}
            for message in offered - met.keys():
                if sum(isinstance(w, tuple) and message in w for w in waiting) == 2:  # both sides have come
                    met[message] = now
            for rank, want in enumerate(waiting):
                if isinstance(want, int):
                    done = until[rank] + want <= now
                else:
                    done = want is not None and all(m in met and met[m] + transfer <= now for m in want)
                if done:
                    last = now if isinstance(want, int) else last
                    until[rank], waiting[rank], moved = now, next(programs[rank], None), True
        now += 1
    return last


def program(rank: int, ranks: int, forward: list[list[int]], backward: list[list[int]]) -> Iterator[Any]:
    """A number is a computation, a tuple are messages that both sides must come for."""
    total = len(forward)
    warmup = min(ranks - rank - 1, total)

    def message(kind: str, micro_batch: int, upper: int) -> tuple[Any, ...]:
        return ((kind, micro_batch, upper),) if 0 <= upper < ranks - 1 else ()

    for i in range(warmup):
        yield message("f", i, rank - 1)
        yield forward[i][rank]
        yield message("f", i, rank)
    if warmup < total:
        yield message("f", warmup, rank - 1)
    for i in range(total - warmup):
        yield forward[warmup + i][rank]
        yield message("f", warmup + i, rank) + message("b", i, rank)
        yield backward[i][rank]
        following = message("f", warmup + i + 1, rank - 1) if warmup + i + 1 < total else ()
        yield message("b", i, rank - 1) + following
    for i in range(total - warmup, total):
        yield message("b", i, rank)
        yield backward[i][rank]
        yield message("b", i, rank - 1)


def test_interleaved_against_repeated_relaxation() -> None:
    """Earliest starts found by going over all passes until none moves; transfers run beside the computation."""
    pipeline, virtual, micro_batches, transfer = 4, 2, 8, 0.25
    draw = random.Random(3)
    stages = pipeline * virtual
    forward, backward = ([[draw.uniform(1, 3) for _ in range(stages)] for _ in range(micro_batches)] for _ in range(2))
    step = simulate(forward, backward, pipeline=pipeline, virtual=virtual, transfer=transfer)
    orders = [rank_tasks(rank, pipeline, virtual, micro_batches) for rank in range(pipeline)]
    end = {(t.backward, t.micro_batch, t.chunk * pipeline + r): 0.0 for r, order in enumerate(orders) for t in order}
    for _ in range(len(end)):
        for rank, order in enumerate(orders):
            free = 0.0
            for t in order:
                stage = t.chunk * pipeline + rank
                before = (t.backward, t.micro_batch, stage + (1 if t.backward else -1))
                ready = end[before] + transfer if before in end else 0.0
                free = max(free, ready) + (backward if t.backward else forward)[t.micro_batch][stage]
                end[t.backward, t.micro_batch, stage] = free
    assert step.step_s == pytest.approx(max(end.values()), rel=1e-12)


def test_micro_batches_in_flight() -> None:
    """1F1B: rank r holds p - r of them, whatever their number; the last of several chunks frees its own first."""
    assert [peak_held(rank, 4, 1, [[1.0] * 4] * 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [peak_held(rank, 4, 1, [[1.0] * 4] * 2) for rank in range(4)] == [2, 2, 2, 1]
    assert [peak_held(rank, 4, 2, [[1.0] * 8] * 8) for rank in range(4)] == [11, 9, 7, 5]


def test_times_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="not of 2 micro-batches and 2 stages"):
        simulate([[1.0]] * 2, [[1.0]] * 2, pipeline=2)
    with pytest.raises(ValueError, match="3 micro-batches are no multiple of 2"):
        simulate([[1.0] * 4] * 3, [[1.0] * 4] * 3, pipeline=2, virtual=2)
