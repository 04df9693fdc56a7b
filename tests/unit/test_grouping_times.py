"""The benchmark of modality grouping: the same rows under each grouping, and a table that adds up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavl.config import ParallelConfig
from megavl.data.microbatch import IGNORE
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.training import grouping_times
from megavl.training.grouping_times import (
    GROUPINGS,
    LENGTH,
    STEPS,
    GroupingTime,
    _all_rows,
    _batches,
    _plan,
    _recipe,
    grouping_table,
    measure_groupings,
)


@pytest.mark.parametrize("packing", [False, True])
def test_every_grouping_reads_the_same_rows(packing: bool) -> None:
    recipe = _recipe(ParallelConfig(), packing, 16)
    plans = {g: [_plan(recipe, g).rows(step) for step in range(STEPS)] for g in GROUPINGS}
    read = [sorted((row.source, row.parts) for rows in plan for row in rows) for plan in plans.values()]
    assert read[0] == read[1] == read[2]
    modalities = {g: [[row.modality for row in rows] for rows in plan] for g, plan in plans.items()}
    assert [len(set(rows)) for rows in modalities["step"]] == [1] * STEPS
    assert sum(rows[0] == "multimodal" for rows in modalities["step"]) == 3
    pairs = {g: [set(rows[i : i + 2]) for rows in steps for i in range(0, 16, 2)] for g, steps in modalities.items()}
    assert max(map(len, pairs["microbatch"])) == 1
    assert max(map(len, pairs["none"])) == 2
    fill = [row.length / LENGTH for row in plans["step"][0] + plans["step"][1] if row.modality == "multimodal"]
    assert not packing or not fill or min(fill) > 0.5


@pytest.mark.parametrize("pipeline", [1, 2])
def test_batches_hold_the_rows_of_a_rank(pipeline: int) -> None:
    recipe = _recipe(ParallelConfig(pipeline=pipeline), False, 16)
    plan = _plan(recipe, "none")
    whole = images = 0
    for rank in range(2):
        groups: Any = SimpleNamespace(data_rank=rank, data_size=2, tensor_size=1, pipeline_size=pipeline)
        for step, batch in enumerate(_batches(recipe, groups, plan)):
            lengths = {m.tokens.numel() for m in batch.micro_batches}
            assert pipeline == 1 or len(lengths) == 1, f"step {step}: {lengths}"
            images += sum(m.num_images for m in batch.micro_batches)
            for m in batch.micro_batches:
                assert m.image_slots.numel() == 36 * m.num_images
                assert bool((m.labels[m.image_slots[:-1]] == IGNORE).all()) or not m.num_images
                whole += m.tokens.numel()
    rows = _all_rows(plan)
    real = sum(row.length for row in rows)
    assert images == sum(row.num_images for row in rows)
    assert whole == real if pipeline == 1 else whole > 1.05 * real


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping_times, "_train", short_training(grouping_times._train))
    torch.set_num_threads(1)
    groups = init_groups(ParallelConfig(device="cpu"))
    times = measure_groupings(ParallelConfig(device="cpu"), groups, packing=True, global_batch=2, rounds=1)
    destroy_groups()
    assert list(times) == list(GROUPINGS)
    for time in times.values():
        parts = time.computing + time.computing_padding + time.bubble + time.data_wait + time.rest
        assert parts == pytest.approx(time.seconds)
        assert time.computing > 0.5 * time.seconds
        assert time.padding == pytest.approx(0, abs=1e-6)


def short_training(train: Any) -> Any:
    """The first step stands for all."""
    return lambda run, batches: train(run, batches[:1])


def test_table() -> None:
    mixed = GroupingTime(
        seconds=10, tokens=1000, padding=0.2, computing=6, computing_padding=1.5, bubble=1, data_wait=1, rest=0.5
    )
    grouped = GroupingTime(
        seconds=8, tokens=1000, padding=0.0, computing=6, computing_padding=0, bubble=0.5, data_wait=1, rest=0.5
    )
    lines = grouping_table({"none": mixed, "step": grouped}).splitlines()
    assert lines[1].split()[:4] == ["none", "10.00", "100", "+0.0%"]
    assert lines[2].split()[:4] == ["step", "8.00", "125", "+25.0%"]
    assert "0.00 s (+15.0%)" in lines[2]  # padding
    assert "0.50 s ( +5.0%)" in lines[2]  # bubble
