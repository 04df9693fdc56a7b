"""Which samples share a row: planned once from the lengths, before anything is read.

In: the length of every sample of a source. Out: `Packs`: for every pack its samples. Nothing is cut: a sample is in
one pack, whole. Packing works on the histogram of lengths, as in Krell et al. 2021 (arXiv 2107.02027), so its cost
depends on the number of distinct lengths, not of samples. Which of the samples of one length takes which place changes
with the epoch, the plan does not.

Fill at 4096 (100,000 samples, synthetic lengths): captions of 596 to 695 tokens with conversations of 600 to 2500,
99.1%; captions with one or two images, 99.9%; a mix with interleaved documents and pages, 98.9%. Best-fit decreasing
on the same: 97.6%, 95.8%, 97.3%.

Shapes: n samples, k packs.
"""

from dataclasses import dataclass

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
    group_starts: NDArray[np.int64]
    """For each place in the order of lengths, where its group of equal lengths starts, int64 [n]."""
    group_sizes: NDArray[np.int64]
    """For each place in the order of lengths, how many samples are equally long, int64 [n]."""
    fill: float
    """Tokens of the samples over tokens of the packs."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def samples(self, pack: int, key: int) -> NDArray[np.int64]:
        """The samples of a pack, int64.

        Args:
            pack: which pack, from 0.
            key: which order among equally long samples; see `megavl.data.order.order_key`.
        """
        places = self.slots[self.starts[pack] : self.starts[pack + 1]].copy()
        for i, place in enumerate(places):
            start, size = int(self.group_starts[place]), int(self.group_sizes[place])
            if size > 1:
                places[i] = start + shuffled(np.array([place - start]), size, order_key(key, start))[0]
        return self.by_length[places]


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
        group_starts=np.repeat(firsts, counts).astype(np.int64),
        group_sizes=np.repeat(counts, counts).astype(np.int64),
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
