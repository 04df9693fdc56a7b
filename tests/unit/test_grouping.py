"""Grouping on paper: against the exact schedule, against what groupings may not change, and against gains worked out
before by another simulation (7B, packed rows with 3 to 6 images, 30% multimodal)."""

import numpy as np
import pytest

from megavl.config import KernelsConfig, ParallelConfig
from megavl.model.sizes import SIZES
from megavl.planning.costs import Case
from megavl.planning.grouping import GroupingTime, RowSizes, _pipeline_seconds, compare_groupings, grouping_lines
from megavl.planning.hardware import HARDWARE
from megavl.planning.simulate import simulate

LAYOUTS = {1: "", 2: "16,14", 4: "8,8,8,6", 8: "4,4,4,4,4,4,4,2"}


def compare(pipeline: int, data: int, micro_batches: int, *, fused: bool, packed: bool = True) -> list[GroupingTime]:
    kernel = "triton" if fused else "reference"
    case = Case(
        model=SIZES["7b"],
        stage=2,
        parallel=ParallelConfig(pipeline=pipeline, layout=LAYOUTS[pipeline]),
        hardware=HARDWARE["h200"],
        kernels=KernelsConfig(sam_attention=kernel, linear_cross_entropy=kernel),  # type: ignore[arg-type]
    )
    return compare_groupings(case, RowSizes(packed=packed), data=data, micro_batches=micro_batches, steps=20)


@pytest.mark.parametrize(
    ("pipeline", "data", "micro_batches", "fused", "gain"),
    [
        (1, 32, 18, False, 1.5),
        (2, 32, 18, False, 2.2),
        (4, 32, 18, False, 2.3),
        (8, 32, 36, False, 0.4),
        (1, 32, 18, True, 0.8),
        (2, 32, 18, True, 1.5),
        (4, 32, 18, True, 2.7),
        (8, 32, 36, True, 3.2),
        (1, 512, 4, False, 5.1),
        (2, 256, 9, False, 4.5),
        (4, 128, 18, False, 3.7),
    ],
)
def test_gain_of_whole_steps_over_shuffled_rows(
    pipeline: int, data: int, micro_batches: int, fused: bool, gain: float
) -> None:
    """In per cent, against an independent simulation of other draws, hence half a per cent.

    For 128 ranks x 4 stages that simulation says 2.4, and so does this one if rows hold 3 or 4 images instead of 3 to
    6. By hand: of 128 ranks the fullest has 1.1 more of 18 micro-batches with images than of 32, each 2.5 of 192
    layers, so that 2.3 becomes 3.7; here it is 3.4 to 4.1 over four seeds.
    """
    shuffled, _, _, step = compare(pipeline, data, micro_batches, fused=fused)
    assert 100 * (shuffled.total / step.total - 1) == pytest.approx(gain, abs=0.5)


def test_all_groupings_compute_the_same_rows() -> None:
    """20 steps at 0.7 are 14 of text: the same rows in another order, so the same operations on one stage."""
    times = compare(1, 32, 4, fused=True)
    assert [time.grouping for time in times] == ["shuffled", "none", "microbatch", "step"]
    assert [time.compute for time in times] == pytest.approx([times[0].compute] * 4, rel=1e-9)
    assert all(time.bubble == pytest.approx(0, abs=1e-9) and time.padding == 0 for time in times)


def test_micro_batches_of_one_modality_are_shared_by_the_ranks() -> None:
    """Language rows come first in a step, so ranks differ by one row at most; shuffled ones differ by several."""
    shuffled, _, microbatch, _ = compare(1, 32, 18, fused=False)
    assert microbatch.wait < 0.7 * shuffled.wait


def test_unpacked_rows_are_padded_in_a_pipeline() -> None:
    assert all(time.padding > 0.5 * time.compute for time in compare(4, 32, 4, fused=True, packed=False))
    assert all(time.padding == 0 for time in compare(1, 32, 4, fused=True, packed=False))


def test_all_ranks_at_once_equal_the_schedule_one_by_one() -> None:
    random = np.random.default_rng(0)
    forward, backward = random.uniform(1, 1.2, (3, 8, 4)), random.uniform(2, 2.4, (3, 8, 4))
    found = _pipeline_seconds(forward, backward, 0.0)
    for rank in range(3):
        exact = simulate(forward[rank].tolist(), backward[rank].tolist(), pipeline=4).step_s
        assert found[rank] <= exact  # in which sends wait for their receivers
        assert found[rank] == pytest.approx(exact, rel=0.03)


def test_lines_add_up() -> None:
    lines = grouping_lines(compare(4, 32, 4, fused=True, packed=False))
    for line in lines[1:]:
        gain, *parts = (float(word.rstrip("%")) for word in line.split()[2:])
        assert sum(parts) == pytest.approx(gain, abs=0.25)
