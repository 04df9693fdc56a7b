"""Which samples share a row: planned once from the lengths, before anything is read.

In: the length of every sample of a source. Out: `Packs`: for every pack its samples. Nothing is cut: a sample is in
one pack, whole. Packing works on the histogram of lengths, as in Krell et al. 2021 (arXiv 2107.02027), so its cost
depends on the number of distinct lengths, not of samples. Which of the samples of one length takes which place changes
with the epoch, the plan does not.

Fill at 4096 (100,000 samples, synthetic lengths): captions of 596 to 695 tokens with conversations of 600 to 2500,
99.1%; captions with one or two images, 99.9%; a mix with interleaved documents and pages, 98.9%. Best-fit decreasing
on the same: 97.6%, 95.8%, 97.3%.

Shapes: n samples, k packs, g groups of equally long samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megavl.data.order import order_key, shuffled

ATTEMPTS = 4
"""Fillings that are tried for each kind of pack."""
CLOSE = 0.999
"""A pair that fills this much of the space is taken at once."""


@dataclass(frozen=True)
class Packs:
    """The packs of one source."""

    capacity: int
    """Tokens of a full pack."""
    starts: NDArray[np.int64]
    """Where each pack begins in `slots`, int64 [k+1]."""
    slots: NDArray[np.int64]
    """For each place in a pack, which sample in the order of lengths, int64 [n]."""
    by_length: NDArray[np.int64]
    """Samples in the order of their lengths, int64 [n]."""
    groups: NDArray[np.int32]
    """For each place in the order of lengths, which group of equal lengths it is in, int32 [n]."""
    group_starts: NDArray[np.int64]
    """Where each group starts in the order of lengths, int64 [g]."""
    group_sizes: NDArray[np.int64]
    """How many samples each group has, int64 [g]."""
    fill: float
    """Tokens of the samples over tokens of the packs."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def group_keys(self, key: int) -> NDArray[np.uint64]:
        """The key of each group's order, uint64 [g], from a key for all; see `megavl.data.order.order_key`."""
        return np.array([order_key(key, start) for start in self.group_starts.tolist()], dtype=np.uint64)

    def samples(self, packs: Sequence[int], group_keys: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
        """The samples of some packs, int64 each; many at once cost little more than one.

        Args:
            packs: which packs, from 0.
            group_keys: which order among equally long samples, from `group_keys`.
        """
        numbers = np.asarray(packs, dtype=np.int64)
        firsts, stops = self.starts[numbers], self.starts[numbers + 1]
        bounds = np.concatenate([[0], np.cumsum(stops - firsts)])
        places = self.slots[np.arange(bounds[-1]) + np.repeat(firsts - bounds[:-1], stops - firsts)]
        groups = self.groups[places]
        starts = self.group_starts[groups]
        samples = self.by_length[starts + shuffled(places - starts, self.group_sizes[groups], group_keys[groups])]
        return [samples[first:stop] for first, stop in pairwise(bounds.tolist())]


def pack(lengths: NDArray[np.int64], capacity: int) -> Packs:
    """Plans packs of at most `capacity` tokens.

    Args:
        lengths: tokens of every sample, from 1 to `capacity`, [n].
        capacity: tokens of a full pack.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    by_length = np.argsort(lengths, kind="stable")
    values, firsts, counts = np.unique(lengths[by_length], return_index=True, return_counts=True)
    contents, repeats = _pack_histogram(values, counts, capacity)
    sizes = np.repeat([len(c) for c in contents], repeats)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    slot_lengths = np.concatenate([np.tile(c, r) for c, r in zip(contents, repeats, strict=True)])
    slots = np.empty(len(lengths), dtype=np.int64)
    slots[np.argsort(slot_lengths, kind="stable")] = np.arange(len(lengths))  # places of a length, in order
    return Packs(
        capacity=capacity,
        starts=starts,
        slots=slots,
        by_length=by_length,
        groups=np.repeat(np.arange(len(values), dtype=np.int32), counts),
        group_starts=firsts.astype(np.int64),
        group_sizes=counts.astype(np.int64),
        fill=float(lengths.sum()) / (capacity * max(1, len(starts) - 1)),
    )


def _pack_histogram(
    values: NDArray[np.int64], counts: NDArray[np.int64], capacity: int
) -> tuple[list[list[int]], list[int]]:
    """Packs a histogram of lengths: (lengths in a pack; how many such packs).

    A pack starts with the longest length left, since long samples have the fewest partners. One pack is filled with
    care, several times, and the best is repeated as often as the counts allow; that uses up a length, so there are not
    many more rounds than lengths.
    """
    left = np.zeros(capacity + 1, dtype=np.int64)
    left[values] = counts
    live = values  # lengths that are left, ascending
    contents, repeats = list[list[int]](), list[int]()
    while live.size:
        best: list[int] = []
        for attempt in range(ATTEMPTS):
            content = _fill_pack(live, left.copy(), capacity, seed=len(contents) * ATTEMPTS + attempt)
            best = max(best, content, key=sum)
            if sum(best) == capacity:
                break
        used, uses = np.unique(best, return_counts=True)
        times = int((left[used] // uses).min())
        left[used] -= uses * times
        live = live[left[live] > 0]
        contents.append(best)
        repeats.append(times)
    return contents, repeats


def _fill_pack(live: NDArray[np.int64], left: NDArray[np.int64], capacity: int, seed: int) -> list[int]:
    """Lengths for one pack; counts them off in `left`.

    The last two are the pair that fits best. What comes before is drawn by frequency, so that common lengths take part
    in all packs and do not remain alone: captions of 640 tokens among themselves would fill 94% of 4096.
    """
    content, space = [int(live[-1])], capacity - int(live[-1])
    left[content[0]] -= 1
    while True:
        live = live[: np.searchsorted(live, space, side="right")]
        live = live[left[live] > 0]
        if not live.size:
            return content
        added = _best_pair(live, left, space)
        if sum(added) < space * CLOSE and space >= 3 * live[0]:  # a third one has room
            upto = np.cumsum(left[live])
            draw = order_key("pack", seed, len(content)) % int(upto[-1])
            added = [int(live[np.searchsorted(upto, draw, side="right")])]
        content += added
        space -= sum(added)
        for length in added:
            left[length] -= 1


def _best_pair(live: NDArray[np.int64], left: NDArray[np.int64], space: int) -> list[int]:
    """One or two lengths with the largest sum up to `space`; of several pairs the most common."""
    partner = np.searchsorted(live, space - live, side="right") - 1  # the longest that still fits beside each
    partner -= (partner == np.arange(len(live))) & (left[live] < 2)  # the only sample of a length has no twin
    second = np.where(partner >= 0, live[partner], 0)
    sums = live + second
    found = np.flatnonzero(sums == sums.max())
    common = np.minimum(left[live[found]], np.where(second[found] > 0, left[second[found]], left[live[found]]))
    chosen = int(found[common.argmax()])
    return [int(live[chosen])] + ([int(second[chosen])] if second[chosen] else [])
