"""Packs: every sample once, none cut, full rows, and a cost that does not grow with the samples."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megavl.data import packing
from megavl.data.order import order_key, shuffled
from megavl.data.packing import Packs, pack


def realistic_lengths(count: int, seed: int = 0) -> NDArray[np.int64]:
    """45% captions, 25% conversations, 15% interleaved documents of up to six images, 15% rendered pages."""
    random = np.random.default_rng(seed)
    captions = 576 + random.integers(20, 120, int(count * 0.45))
    conversations = random.integers(600, 2501, int(count * 0.25))
    interleaved = random.integers(1, 7, int(count * 0.15)) * 576 + random.integers(50, 600, int(count * 0.15))
    pages = 576 + np.clip(random.lognormal(6.5, 0.5, int(count * 0.15)), 50, 3500).astype(np.int64)
    return np.concatenate([captions, conversations, np.minimum(interleaved, 4000), pages])


def check(packs: Packs, lengths: NDArray[np.int64], key: int) -> None:
    read = packs.samples(range(len(packs)), packs.group_keys(key))
    assert np.array_equal(np.sort(np.concatenate(read)), np.arange(len(lengths)))
    sums = [int(lengths[r].sum()) for r in read]
    assert max(sums) <= packs.capacity
    assert packs.fill == sum(sums) / (len(packs) * packs.capacity)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=200), extra=st.integers(0, 50), key=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_every_sample_once_and_whole(lengths: list[int], extra: int, key: int) -> None:
    array = np.array(lengths)
    packs = pack(array, int(array.max()) + extra)
    check(packs, array, key)
    # Two packs that fit into one would show that the plan wastes rows.
    sums = sorted(int(array[samples].sum()) for samples in packs.samples(range(len(packs)), packs.group_keys(key)))
    assert len(sums) == 1 or sums[0] + sums[1] > packs.capacity


def test_fill_on_a_realistic_mix() -> None:
    for count in (2_000, 20_000):
        assert pack(realistic_lengths(count), 4096).fill > 0.98


def test_the_cost_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fillings that are tried, counted: they follow the number of distinct lengths, not of samples."""
    tried = 0
    fill_pack = packing._fill_pack

    def counting(*args: Any, **kwargs: Any) -> list[int]:
        nonlocal tried
        tried += 1
        return fill_pack(*args, **kwargs)

    monkeypatch.setattr(packing, "_fill_pack", counting)
    for count in (20_000, 1_000_000):
        lengths, tried = realistic_lengths(count), 0
        assert pack(lengths, 4096).fill > 0.98
        assert tried <= packing.ATTEMPTS * len(np.unique(lengths))


def test_only_equally_long_samples_change_places() -> None:
    lengths = realistic_lengths(2_000)
    packs = pack(lengths, 4096)
    first = packs.samples(range(len(packs)), packs.group_keys(1))
    second = packs.samples(range(len(packs)), packs.group_keys(2))
    assert all(np.array_equal(lengths[a], lengths[b]) for a, b in zip(first, second, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    check(packs, lengths, 2)


def test_an_order_is_that_of_each_sample_by_itself() -> None:
    """All packs at once against one sample at a time; a run that was started with an older version reads the same."""
    lengths = realistic_lengths(3_000)
    packs = pack(lengths, 4096)
    by_length = np.argsort(lengths, kind="stable")
    wanted = [7, 3, len(packs) - 1, 3]
    for number, samples in zip(wanted, packs.samples(wanted, packs.group_keys(9)), strict=True):
        for place, sample in zip(packs.slots[packs.starts[number] : packs.starts[number + 1]], samples, strict=True):
            equally_long = np.flatnonzero(lengths[by_length] == lengths[by_length[place]])
            start, size = int(equally_long[0]), len(equally_long)
            moved = int(shuffled(np.array([place - start]), size, order_key(9, start))[0])
            assert sample == by_length[start + moved]


def test_the_plan_is_deterministic() -> None:
    lengths = realistic_lengths(3_000)
    assert np.array_equal(pack(lengths, 4096).slots, pack(lengths.copy(), 4096).slots)
