"""In which order everything is read, in closed form.

In: a position (step, row of a modality, row of an epoch). Out: the modality, the source, the element. No function here
looks at anything before its position, so a run continues from one integer, the step. All arithmetic is on integers and
fractions: the same on every machine.

Shapes: n positions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, lcm

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = 6  # 4 make a pseudo-random permutation of a large domain; small domains mix visibly better with 6


def exact(value: float) -> Fraction:
    """The decimal number that was written: 0.7 becomes 7/10, not the nearest binary fraction."""
    return Fraction(str(value))


@dataclass(frozen=True)
class ModalitySchedule:
    """The language share of every step and its running sum.

    The share falls linearly from 1 at step 0 to `target` at step `warmup_steps`, then stays.
    """

    target: Fraction
    """Language share after the warm-up."""
    warmup_steps: Fraction
    """Steps of modality warm-up; need not be whole."""

    def share(self, step: int) -> Fraction:
        """Scheduled language share of `step`."""
        if step >= self.warmup_steps:
            return self.target
        return 1 - (1 - self.target) * step / self.warmup_steps

    def share_sum(self, step: int) -> Fraction:
        """C(step): the sum of the shares of all steps before `step`."""
        falling = min(step, ceil(self.warmup_steps))  # steps before `step` that lie inside the warm-up
        total = falling + (step - falling) * self.target
        if falling:
            total -= (1 - self.target) * falling * (falling - 1) / (2 * self.warmup_steps)
        return Fraction(total)

    def language_before(self, step: int, unit: int, units: int) -> int:
        """Language units before unit `unit` of `step`, where each step has `units` units (a step, or rows of it).

        Unit (step, unit) is language exactly if the count rises after it. Every prefix is within one unit of the
        schedule, because the count is the floor of the scheduled sum.
        """
        return floor(units * self.share_sum(step) + unit * self.share(step))


class Shares:
    """Deals the rows of one modality to its sources, each prefix close to the shares.

    The sources are the leaves of a binary tree whose branches are as even as possible; of the first k rows of a node
    the left branch gets round(k * its share) and the right branch the rest. Counts are exact sums, the position of a
    row in its source follows from k alone, and each level adds at most half a row to the distance from the exact
    share.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        """Takes the shares of the sources, in any scale; at least one is above zero."""
        fractions = [exact(s) for s in shares]
        scale = lcm(*(f.denominator for f in fractions))
        weights = [int(f * scale) for f in fractions]
        self._order = sorted(range(len(weights)), key=lambda i: -weights[i])  # large shares close to the root
        self._sums = [0]
        for i in self._order:
            self._sums.append(self._sums[-1] + weights[i])

    def deal(self, row: int) -> tuple[int, int]:
        """(source, position within the source) of row `row` of the modality, both from 0."""
        low, high = 0, len(self._order)
        while high - low > 1:
            middle = self._middle(low, high)
            left, total = self._sums[middle] - self._sums[low], self._sums[high] - self._sums[low]
            before = _round_share(row, left, total)
            if _round_share(row + 1, left, total) > before:
                row, high = before, middle
            else:
                row, low = row - before, middle
        return self._order[low], row

    def _middle(self, low: int, high: int) -> int:
        """Where to cut sources [low, high) into two halves of about the same share."""
        twice_half = self._sums[low] + self._sums[high]
        return min(range(low + 1, high), key=lambda m: abs(2 * self._sums[m] - twice_half))


def _round_share(rows: int, left: int, total: int) -> int:
    return (2 * rows * left + total) // (2 * total) if total else 0


def order_key(*parts: int | str) -> int:
    """A 64-bit key from a few numbers and names, such as (seed, source, epoch)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def shuffled(
    positions: NDArray[np.int64], size: int | NDArray[np.int64], key: int | NDArray[np.uint64]
) -> NDArray[np.int64]:
    """The elements at `positions` of a pseudo-random order of [0, size), or of one such order for each position.

    A Feistel network over the next power of four; values that fall outside [0, size) go through it again until they
    fall inside (cycle walking), which keeps it a bijection. Memory does not depend on `size`.

    Args:
        positions: positions in [0, size), int64 [n].
        size: number of elements, below 2**53; one for all positions, or [n].
        key: which order, see `order_key`; one for all positions, or [n].

    Returns:
        Elements in [0, size), int64 [n]; distinct for distinct positions of an order.
    """
    sizes = np.atleast_1d(np.asarray(size, dtype=np.uint64))  # [n] or [1]
    rounds = np.arange(FEISTEL_ROUNDS, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    keys = _mix(np.atleast_1d(np.asarray(key, dtype=np.uint64)) + rounds)  # [rounds, n] or [rounds, 1]
    bits = np.frexp((sizes - np.uint64(1)).astype(np.float64))[1]  # bit_length, exact
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    values = _feistel(positions.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= sizes)
    if outside.size:
        sizes, half = (np.broadcast_to(each, values.shape) for each in (sizes, half))
        keys = np.broadcast_to(keys, (FEISTEL_ROUNDS, *values.shape))
    while outside.size:
        values[outside] = _feistel(values[outside], half[outside], keys[:, outside])
        outside = outside[values[outside] >= sizes[outside]]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """All rounds; half the bits of each domain and the key of each round, of one order or of each value's."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64; arrays wrap around without a warning."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
