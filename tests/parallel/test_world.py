"""The spawned world itself: results by rank, fresh groups per call, and no hang when a rank fails."""

import time

import pytest
import torch
import torch.distributed as dist
from world import COLLECTIVE_TIMEOUT_S, World, WorldError

from megavl.config import ParallelConfig
from megavl.parallel.groups import destroy_groups, init_groups


def place(parallel: ParallelConfig) -> tuple[int, int, int, int, float]:
    """(tensor rank, pipeline rank, data rank, world size, sum of ranks in the tensor group)."""
    groups = init_groups(parallel)
    total = torch.tensor([float(groups.rank)])
    dist.all_reduce(total, group=groups.pg.tp)
    return groups.tensor_rank, groups.pipeline_rank, groups.data_rank, groups.world_size, total.item()


def groups_left() -> list[int]:
    """Groups that torch knows after each of three layouts was formed and taken down."""
    left = []
    for _ in range(3):
        init_groups(ParallelConfig(pipeline=2, device="cpu"))
        destroy_groups(leave_world=False)
        left.append(len(dist.distributed_c10d._world.pg_map))
    return left


def fail_on(rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    if dist.get_rank() == rank:
        raise ValueError("a mistake on purpose")
    dist.barrier()


def test_the_grid_is_tensor_then_data_then_pipeline(world: World) -> None:
    places = world.run(place, ParallelConfig(tensor=2, pipeline=2))
    assert places == [(0, 0, 0, 4, 1), (1, 0, 0, 4, 1), (0, 1, 0, 4, 5), (1, 1, 0, 4, 5)]
    places = world.run(place, ParallelConfig(pipeline=2))
    assert [(t, p, d) for t, p, d, _, _ in places] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]


def test_a_smaller_world_and_another_layout_in_the_same_processes(world: World) -> None:
    assert [p[3:] for p in world.run(place, ParallelConfig(tensor=2), ranks=2)] == [(2, 1), (2, 1)]
    assert [p[3:] for p in world.run(place, ParallelConfig(), ranks=1)] == [(1, 0)]


def test_one_rank_that_raises_fails_the_call_and_the_next_call_works(world: World) -> None:
    start = time.monotonic()
    with pytest.raises(WorldError, match="a mistake on purpose"):
        world.run(fail_on, 1, ranks=2)
    assert time.monotonic() - start < COLLECTIVE_TIMEOUT_S / 2  # the other rank did not sit its wait out
    assert [p[3:] for p in world.run(place, ParallelConfig(tensor=2), ranks=2)] == [(2, 1), (2, 1)]


def test_a_layout_that_does_not_divide_says_both_numbers(world: World) -> None:
    with pytest.raises(WorldError, match=r"3 ranks do not divide by tensor \* pipeline = 2 \* 1 = 2") as caught:
        world.run(place, ParallelConfig(tensor=2), ranks=3)
    assert set(caught.value.errors) == {0, 1, 2}


def test_layouts_one_after_another_leave_no_groups(world: World) -> None:
    """Each has threads that poll: a thousand of them, after 14 layouts, kept two cores busy."""
    assert world.run(groups_left, ranks=2) == [[1, 1, 1], [1, 1, 1]]
