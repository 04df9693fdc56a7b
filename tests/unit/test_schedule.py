"""The learning rate against traces written out by hand, and against a loop that knows no closed form."""

import dataclasses
import math

import pytest

from megavl.config import OptimConfig
from megavl.training.schedule import learning_rate

COSINE = OptimConfig(lr=8.0, schedule="cosine", warmup_steps=3)


def trace(optim: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(optim, steps, step) for step in range(steps)]


def test_cosine_written_out() -> None:
    # Warm-up in quarters (3 steps below the peak), then cos^2 over 4 steps: 1, 0.8536, 0.5, 0.1464; step 7 would be 0.
    expected = [2.0, 4.0, 6.0, 8.0, 6.8284271, 4.0, 1.1715729]
    assert trace(COSINE, 7) == pytest.approx(expected, abs=1e-6)


def test_cosine_floor() -> None:
    optim = dataclasses.replace(COSINE, final=0.1, warmup_steps=0)
    assert trace(optim, 2) == pytest.approx([8.0, 8.0 * 0.55])
    assert learning_rate(optim, 2, 2) == pytest.approx(0.8)


def test_cosine_against_recurrence() -> None:
    """cos(x + d) = 2 cos(x) cos(d) - cos(x - d): no cosine of the progress itself is taken."""
    steps, warmup, peak = 150, 13, 3e-4
    optim = OptimConfig(lr=peak, schedule="cosine", warmup_steps=warmup)
    step_cos = math.cos(math.pi / (steps - warmup))
    before, now = step_cos, 1.0
    for step in range(steps):
        if step < warmup:
            assert learning_rate(optim, steps, step) == pytest.approx(peak * (step + 1) / (warmup + 1))
            continue
        assert learning_rate(optim, steps, step) == pytest.approx(peak * (1 + now) / 2, abs=1e-15)
        before, now = now, 2 * now * step_cos - before


def test_multistep_written_out() -> None:
    optim = OptimConfig(lr=1.0, schedule="multistep", warmup_steps=2)
    assert trace(optim, 10) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 0.316, 0.1])


@pytest.mark.parametrize("steps", [7, 10, 42000, 96000, 96001])
def test_multistep_milestones(steps: int) -> None:
    optim = OptimConfig(lr=1.0, schedule="multistep", warmup_steps=0)
    values = trace(optim, steps)
    assert values.count(1.0) == math.ceil(steps * 8 / 10)
    assert values.count(0.1) == steps - math.ceil(steps * 9 / 10)
    assert values == sorted(values, reverse=True)


def test_constant_and_own_peak() -> None:
    optim = OptimConfig(lr=2.0, schedule="constant", warmup_steps=1)
    assert trace(optim, 4) == [1.0, 2.0, 2.0, 2.0]
    assert learning_rate(optim, 4, 0, peak=5.0) == 2.5


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_every_update_moves(schedule: str, warmup: int) -> None:
    optim = OptimConfig(lr=1e-3, schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    values = trace(optim, 20)
    assert all(0 < v <= 1e-3 for v in values)
    assert values[warmup] == 1e-3
    assert values[:warmup] == sorted(set(values[:warmup]))
