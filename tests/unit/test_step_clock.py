"""Parts of a step: exclusive times, events that the device has not passed yet, and megatron-core's own marks."""

import pytest
import torch

from megavl.config import DataConfig, OptimConfig, ParallelConfig, Recipe, StageConfig
from megavl.model.sizes import SIZES
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.training import step_clock
from megavl.training.step_clock import PARTS, StepClock
from megavl.training.synthetic_run import build_run, recipe_batch
from megavl.training.throughput import step_counts


def test_time_inside_an_inner_part_is_not_the_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 1.5, 3.5, 4.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr(step_clock, "perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    schedule = clock("forward-backward", log_level=1)
    schedule.start(barrier=False)
    with clock.part("forward"), clock.part("vision"):  # 1.0 to 4.0, and 1.5 to 3.5 of that
        clock("forward-recv", log_level=2).start()  # one of those that are left inside
    schedule.stop()  # 9.0
    with clock.part("optimizer"):
        pass
    assert clock.read() == {
        **dict.fromkeys(PARTS, 0.0),
        "vision": 2.0,
        "forward": 1.0,
        "schedule": 6.0,
        "optimizer": 2.0,
    }
    assert clock.read() == dict.fromkeys(PARTS, 0.0)


class Event:
    """A device that has come as far as `now`, and marks at 1, 2, 3, ... ms."""

    now, made = 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.made += 1
        self.at = Event.made

    def query(self) -> bool:
        return Event.now >= self.at

    def elapsed_time(self, end: "Event") -> float:
        return float(end.at - self.at)


def test_what_the_device_has_not_passed_is_counted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for part in ("forward", "optimizer"):
        with clock.part(part):
            pass
    Event.now = 3  # the update is under way
    assert (lambda seconds: (seconds["forward"], seconds["optimizer"]))(clock.read()) == (0.001, 0.0)
    with clock.part("forward"):
        pass
    Event.now = 6
    assert (lambda seconds: (seconds["forward"], seconds["optimizer"]))(clock.read()) == (0.001, 0.001)


@pytest.mark.parametrize(("device", "around"), [("cuda", 0.003), ("cpu", 0.002)])
def test_work_beside_a_part_is_not_inside_it(monkeypatch: pytest.MonkeyPatch, device: str, around: float) -> None:
    """Marks 1 ms apart; only the CPU does one thing at a time."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "now", 10**6)
    times = iter([0.001, 0.002, 0.003, 0.004])
    monkeypatch.setattr(step_clock, "perf_counter", lambda: next(times))
    clock = StepClock(torch.device(device))
    with clock.part("schedule"), clock.part("vision", beside=True):
        pass
    assert clock.read() == pytest.approx({**dict.fromkeys(PARTS, 0.0), "schedule": around, "vision": 0.001})


def test_a_step_sets_all_marks() -> None:
    """megatron-core's forward and backward marks, and ours around the rest."""
    recipe = Recipe(
        run_dir="none",
        model=SIZES["tiny_hybrid"],
        parallel=ParallelConfig(device="cpu"),
        data=DataConfig(tokenizer="none", sources=(), seq_length=40),
        stage=StageConfig(number=2, steps=1, global_batch=2, dtype="fp32"),
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0),
    )
    groups = init_groups(recipe.parallel)
    run = build_run(recipe, groups)
    result, totals = run.step(recipe_batch(recipe, groups, 1, micro_batches=2, step=0))
    destroy_groups()
    assert all(seconds > 0 for seconds in totals.parts.values()), totals.parts
    assert 0 <= totals.bubble[0] < 1
    assert (totals.tokens, totals.squared_lengths) == (80, 2 * 40**2)
    every, learnt = (step_counts(result, totals, head_skips=skips) for skips in (False, True))
    assert [c.logits for c in (*every, *learnt)] == [80, 80, result.supervised_tokens, result.supervised_tokens]
    assert 0 < result.supervised_tokens < 80
    assert totals.memory > 1e8
