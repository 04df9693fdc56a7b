"""How many decoder layers each pipeline rank should hold: the split that makes the expected step shortest.

In: seconds of a layer and of what the first and the last stage have besides, for each kind of step with its share.
Out: layers per stage in pipeline order.

A step takes sum(t) + (m - 1) * max(t), and the sum does not depend on the split. So the expected step is shortest where
the expected max(t) is: sum over kinds of share * max over ranks. Kinds disagree about the slowest rank, hence a dynamic
program over ranks that keeps, per number of layers placed, every pair of maxima that no other pair beats. Among the
splits that reach the best maxima, a second pass takes the most even one (least sum of squares), then the one with fewer
layers first: early ranks hold more micro-batches in flight.
Shapes: p pipeline ranks, v chunks per rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

EPSILON = 1e-12
"""Seconds that count as equal."""


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """Seconds, forward and backward, of one kind of step."""

    share: float
    """How often this kind comes."""
    layer: float
    """A decoder layer."""
    first: float
    """What the first stage has besides: vision, embedding."""
    last: float
    """What the last stage has besides: head, loss."""

    def rank_seconds(self, rank: int, ranks: int, layers: int) -> float:
        """Of a rank with `layers` layers."""
        return layers * self.layer + self.first * (rank == 0) + self.last * (rank == ranks - 1)


def best_split(
    loads: Sequence[StageLoad], layers: int, ranks: int, *, virtual: int = 1, caps: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Layers of every stage in pipeline order, p * v of them, each at least 1; None if they do not fit.

    Args:
        loads: one per kind of step.
        layers: decoder layers to place.
        ranks: p.
        virtual: v.
        caps: most layers of each rank, such as its memory allows; [p].
    """
    room = [min(cap, layers) for cap in (caps or [layers] * ranks)]
    if ranks * virtual > layers or sum(room) < layers or min(room) < virtual:
        return None
    best = min(_fronts(loads, layers, ranks, virtual, room), key=lambda maxima: (_expected(loads, maxima), maxima))
    per_rank = _most_even(loads, layers, ranks, virtual, room, best)
    return _into_chunks(loads, per_rank, virtual)


def _expected(loads: Sequence[StageLoad], maxima: Sequence[float]) -> float:
    return sum(load.share * slowest for load, slowest in zip(loads, maxima, strict=True))


def _fronts(
    loads: Sequence[StageLoad], layers: int, ranks: int, virtual: int, room: Sequence[int]
) -> set[tuple[float, ...]]:
    """Maxima by kind of step of the splits that no other split beats in every kind."""
    limit = _even_seconds(loads, layers, ranks, room) + EPSILON
    placed: dict[int, set[tuple[float, ...]]] = {0: {(0.0,) * len(loads)}}
    for rank in range(ranks):
        after: dict[int, set[tuple[float, ...]]] = {}
        for done, front in placed.items():
            for count in range(virtual, min(room[rank], layers - done) + 1):
                own = [load.rank_seconds(rank, ranks, count) for load in loads]
                if _expected(loads, own) > limit:  # maxima only grow
                    break
                reached = {tuple(max(a, b) for a, b in zip(maxima, own, strict=True)) for maxima in front}
                after.setdefault(done + count, set()).update(r for r in reached if _expected(loads, r) <= limit)
        placed = {done: _unbeaten(front) for done, front in after.items()}
    return placed[layers]


def _even_seconds(loads: Sequence[StageLoad], layers: int, ranks: int, room: Sequence[int]) -> float:
    """Expected maximum of the even split, which the best one does not exceed; infinite if ranks lack the room."""
    base, left = divmod(layers, ranks)
    counts = [base + (rank < left) for rank in range(ranks)]
    if any(count > most for count, most in zip(counts, room, strict=True)):
        return float("inf")
    seconds = ([load.rank_seconds(rank, ranks, count) for rank, count in enumerate(counts)] for load in loads)
    return _expected(loads, [max(row) for row in seconds])


def _unbeaten(front: set[tuple[float, ...]]) -> set[tuple[float, ...]]:
    """Points for which no other is at most as large in every coordinate."""
    kept: list[tuple[float, ...]] = []
    for point in sorted(front):
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in kept):
            kept.append(point)
    return set(kept)


def _most_even(
    loads: Sequence[StageLoad],
    layers: int,
    ranks: int,
    virtual: int,
    room: Sequence[int],
    maxima: Sequence[float],
) -> list[int]:
    """Layers per rank within the maxima, with the least sum of squares of the ranks' expected seconds."""

    def allowed(rank: int, count: int) -> bool:
        return all(
            load.rank_seconds(rank, ranks, count) <= slowest + EPSILON
            for load, slowest in zip(loads, maxima, strict=True)
        )

    @cache
    def rest(rank: int, left: int) -> tuple[float, int]:
        """(sum of squares from `rank` on, layers of `rank`) for `left` layers; infinite where they do not fit."""
        if rank == ranks:
            return (0.0 if left == 0 else float("inf")), 0
        options = []
        for count in range(virtual, min(room[rank], left) + 1):
            if allowed(rank, count):
                seconds = sum(load.share * load.rank_seconds(rank, ranks, count) for load in loads)
                options.append((round(seconds**2 + rest(rank + 1, left - count)[0], 15), count))
        return min(options, default=(float("inf"), 0))

    split, left = [], layers
    for rank in range(ranks):
        split.append(rest(rank, left)[1])
        left -= split[-1]
    assert left == 0, f"{left} of {layers} layers are not placed"
    return split


def _into_chunks(loads: Sequence[StageLoad], per_rank: Sequence[int], virtual: int) -> tuple[int, ...]:
    """Deal each rank's layers over its chunks, the least loaded chunk first; stage s = chunk * p + rank."""
    ranks = len(per_rank)
    split = [1] * (ranks * virtual)
    layer = sum(load.share * load.layer for load in loads)
    for rank, count in enumerate(per_rank):
        seconds = [layer] * virtual
        seconds[0] += sum(load.share * load.first for load in loads) * (rank == 0)
        seconds[-1] += sum(load.share * load.last for load in loads) * (rank == ranks - 1)
        for _ in range(count - virtual):
            chunk = min(range(virtual), key=lambda at: (seconds[at], -at))
            seconds[chunk] += layer
            split[chunk * ranks + rank] += 1
    return tuple(split)
