"""The closed forms against counting one by one."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.data.order import ModalitySchedule, Shares, exact, order_key, shuffled

TABLE_1 = [13.1, 11.1, 2.1, 0.4, 1.2, 2.1, 70.0]
TABLE_2 = [10.5, 35.5, 4.1, 2.0, 47.9]
shares = st.fractions(min_value=0, max_value=1, max_denominator=1000)


@given(target=shares, warmup=st.fractions(min_value=0, max_value=50, max_denominator=7), step=st.integers(0, 120))
@settings(deadline=None)
def test_sum_of_shares_is_the_sum(target: Fraction, warmup: Fraction, step: int) -> None:
    schedule = ModalitySchedule(target=target, warmup_steps=warmup)
    assert schedule.share_sum(step) == sum((schedule.share(s) for s in range(step)), Fraction(0))


def test_share_falls_from_one_to_the_target() -> None:
    schedule = ModalitySchedule(target=exact(0.7), warmup_steps=Fraction(10))
    assert [float(schedule.share(s)) for s in (0, 5, 10, 11)] == [1.0, 0.85, 0.7, 0.7]


@given(target=shares, warmup=st.integers(0, 60), units=st.sampled_from([1, 3, 8]))
@settings(max_examples=50, deadline=None)
def test_every_prefix_is_within_one_unit_of_the_schedule(target: Fraction, warmup: int, units: int) -> None:
    schedule = ModalitySchedule(target=target, warmup_steps=Fraction(warmup))
    ideal, counted = Fraction(0), 0
    for step in range(100):
        for unit in range(units):
            before = schedule.language_before(step, unit, units)
            last = unit + 1 == units
            after = schedule.language_before(step + last, 0 if last else unit + 1, units)
            assert after - before in (0, 1)
            assert before == counted
            counted, ideal = after, ideal + schedule.share(step)
            assert abs(counted - ideal) < 1


@pytest.mark.parametrize("table", [TABLE_1, TABLE_2])
def test_shares_of_the_report_hold_in_every_prefix(table: list[float]) -> None:
    deal, counts = Shares(table), [0] * len(table)
    for row in range(5000):
        source, place = deal.deal(row)
        assert place == counts[source]  # rows of a source are numbered without gaps
        counts[source] += 1
        expected = np.array(table) / sum(table) * (row + 1)
        assert np.abs(np.array(counts) - expected).max() < 1.5  # half a row per level of the tree, weighted
    assert np.allclose(np.array(counts) / 5000, np.array(table) / sum(table), atol=2e-4)


@given(weights=st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any), rows=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_any_shares(weights: list[int], rows: int) -> None:
    deal, counts = Shares(weights), [0] * len(weights)
    for row in range(rows):
        source, place = deal.deal(row)
        assert place == counts[source]
        counts[source] += 1
        assert all(abs(c - w * (row + 1) / sum(weights)) < 2 for c, w in zip(counts, weights, strict=True))
    assert all(c == 0 for c, w in zip(counts, weights, strict=True) if w == 0)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_every_element_exactly_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(shuffled(np.arange(size), size, key)), np.arange(size))


def test_elements_can_be_asked_one_by_one_and_in_a_large_domain() -> None:
    size = 10**15  # nothing of this size is ever allocated
    together = shuffled(np.arange(100), size, 5)
    assert together.tolist() == [int(shuffled(np.array([i]), size, 5)[0]) for i in range(100)]
    assert len(set(together.tolist())) == 100
    assert together.max() < size


def test_orders_of_many_sizes_at_once() -> None:
    """An order for each position is what each order gives by itself."""
    random = np.random.default_rng(0)
    sizes = np.concatenate([np.arange(1, 70), 2 ** np.arange(53), random.integers(1, 10**15, 300)])
    positions = (random.random(len(sizes)) * sizes).astype(np.int64)
    keys = random.integers(0, 2**64, len(sizes), dtype=np.uint64)
    alone = [
        int(shuffled(np.array([position]), size, key)[0])
        for position, size, key in zip(positions.tolist(), sizes.tolist(), keys.tolist(), strict=True)
    ]
    assert shuffled(positions, sizes, keys).tolist() == alone


def test_order_depends_on_the_key_and_looks_random() -> None:
    size, keys = 10, 4000
    orders = np.stack([shuffled(np.arange(size), size, order_key(7, "source", e)) for e in range(keys)])
    counts = np.stack([np.bincount(orders[:, p], minlength=size) for p in range(size)])  # [position, element]
    expected = keys / size
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)
    assert len({tuple(o) for o in orders.tolist()}) > 0.99 * keys


def test_order_never_changes() -> None:
    """A run that was started with an older version resumes in the same order."""
    assert shuffled(np.arange(8), 8, order_key(1234, "text", "rows", 0)).tolist() == GOLDEN


GOLDEN = [2, 3, 4, 7, 1, 6, 0, 5]
