"""How long a slowed-down rank rests, on clocks that the test turns, and that computing alone is timed on one thread."""

import time

import pytest
import torch

from megavl.planning.calibrate import time_part
from megavl.training import dilated_clock, step_clock
from megavl.training.dilated_clock import DilatedClock, Pass


class Clocks:
    """Wall and thread, which only the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.thread, self.sleeps = 0.0, 0.0, []
        monkeypatch.setattr(dilated_clock, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(step_clock, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(dilated_clock, "thread_time", lambda: self.thread)
        monkeypatch.setattr(dilated_clock, "sleep", self.sleep)

    def work(self, seconds: float, waiting: float = 0.0) -> None:
        self.thread += seconds
        self.wall += seconds + waiting

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.wall += seconds


def test_a_pass_lasts_a_multiple_of_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vision inside a pass is slowed down with it, and time taken by another process counts as part of the rest."""
    clocks = Clocks(monkeypatch)
    clock = DilatedClock(4.0)
    clock("forward-backward").start()
    clock("forward-compute").start()
    clocks.work(1.0)
    with clock.part("vision"):
        clocks.work(2.0, waiting=0.5)
    clock("forward-compute").stop()
    clocks.work(0.25, waiting=5.0)  # a message: as it comes
    clock("backward-compute").start()
    clocks.work(1.0, waiting=9.0)  # others had the core for longer than the rest
    clock("backward-compute").stop()
    clock("forward-backward").stop()
    assert clock.passes == [Pass(False, 3.0, 12.0), Pass(True, 1.0, 10.0)]
    assert clocks.sleeps == [8.5]
    parts = clock.read()
    assert (parts["vision"], parts["forward"], parts["backward"]) == (2.5, 9.5, 10.0)
    assert parts["schedule"] == 5.25


def test_parts_that_wait_for_other_ranks_rest_for_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    clock = DilatedClock(3.0)
    for part in ("reduction", "optimizer", "vision"):
        with clock.part(part):
            clocks.work(1.0, waiting=20.0)
    assert clocks.sleeps == [2.0, 2.0, 2.0]
    assert clock.passes == []


def test_on_one_thread_a_part_takes_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what passes meanwhile: here the part is away from its core for 20 ms, as on a busy machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    weight = torch.ones(4, requires_grad=True)

    def away() -> torch.Tensor:
        time.sleep(0.02)
        return weight * 2

    seconds = time_part(away, torch.device("cpu"))
    assert 0 < seconds["forward"] < 0.01
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # several threads compute: only the wall clock sees all
    assert time_part(away, torch.device("cpu"))["forward"] >= 0.02
