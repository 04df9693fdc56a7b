"""The step plan: a pure function of the step, with the scheduled modalities and the shares of the report."""

import json
from collections import Counter
from dataclasses import asdict, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import make_recipe

from megavl.config import Modality, Recipe, SourceConfig
from megavl.data.mixture import RowSpec, StepPlan, order_changes
from megavl.data.plan_report import describe_plan, padding_share
from megavl.data.rank_batch import RankPlace

TOKENS_PER_IMAGE = 16
TABLE_1: dict[str, tuple[Modality, float]] = {
    "interleaved": ("multimodal", 0.131),
    "captions": ("multimodal", 0.111),
    "tables": ("multimodal", 0.021),
    "web code": ("multimodal", 0.004),
    "scene text": ("multimodal", 0.012),
    "documents": ("multimodal", 0.021),
    "text": ("language", 0.700),
}
TABLE_2: dict[str, tuple[Modality, float]] = {
    "in-house": ("multimodal", 0.105),
    "general": ("multimodal", 0.355),
    "tables": ("multimodal", 0.041),
    "web code": ("multimodal", 0.020),
    "text-only": ("language", 0.479),
}


def fake_store(kind: str, samples: int, seed: int = 0) -> Any:
    """Lengths without tokens: planning must not need more."""
    random = np.random.default_rng(seed)
    images = np.zeros(samples, dtype=np.int32) if kind == "text" else random.integers(0, 3, samples)
    lengths = random.integers(3, 30, samples) + images
    return SimpleNamespace(manifest={"kind": kind}, num_samples=samples, lengths=lengths, image_counts=images)


def make_plan(table: dict[str, tuple[Modality, float]], samples: int = 50, **fields: Any) -> StepPlan:
    sources = tuple(SourceConfig(name=n, path="", modality=m, share=s) for n, (m, s) in table.items())
    recipe = make_recipe(sources, **fields)
    kinds = {n: "text" if n == "text" else "caption" for n in table}
    stores = {n: fake_store(kinds[n], samples, seed) for seed, n in enumerate(table)}
    return StepPlan(recipe.data, recipe.stage, stores, TOKENS_PER_IMAGE)


def ids(rows: list[RowSpec]) -> list[tuple[str, Any]]:
    return [(row.source, row.parts) for row in rows]


@pytest.mark.parametrize("table", [TABLE_1, TABLE_2])
@pytest.mark.parametrize("grouping", ["step", "microbatch", "none"])
def test_realised_shares_converge_to_the_tables(table: dict[str, tuple[Modality, float]], grouping: str) -> None:
    plan = make_plan(table, grouping=grouping, global_batch=8, micro_batch=2, steps=500)
    counts = Counter(row.source for step in range(500) for row in plan.rows(step))
    slack = {"step": 8, "microbatch": 2, "none": 1}[grouping] + 2  # one unit of a modality, and the deal's rounding
    for name, (_, share) in table.items():
        assert abs(counts[name] - 4000 * share) <= slack
        assert abs(counts[name] - plan.drawn(name, 500)) <= 3


@given(
    grouping=st.sampled_from(["step", "microbatch", "none"]),
    warmup=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    share=st.integers(0, 10),
    micro_batch=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_every_prefix_follows_the_schedule(grouping: str, warmup: float, share: int, micro_batch: int) -> None:
    table: dict[str, tuple[Modality, float]] = {"text": ("language", share), "pictures": ("multimodal", 10 - share)}
    if share == 0 and warmup:
        with pytest.raises(ValueError, match=r"language_warmup is .* no source has modality language"):
            make_plan(table, grouping=grouping, language_warmup=warmup)
        return
    plan = make_plan(table, grouping=grouping, language_warmup=warmup, micro_batch=micro_batch, steps=40)
    unit = {"step": 8, "microbatch": micro_batch, "none": 1}[grouping]
    ideal, counted = Fraction(0), 0
    for step in range(40):
        rows = plan.rows(step)
        modalities = [row.modality for row in rows]
        groups = [set(modalities[r : r + unit]) for r in range(0, 8, unit)]
        assert all(len(g) == 1 for g in groups)  # one modality per step, micro-batch or row
        if grouping == "microbatch":
            assert modalities == sorted(modalities)  # language rows first
        assert modalities.count("language") == plan.language_rows(step)
        target = Fraction(share, 10)
        falling = warmup and step < 40 * warmup
        ideal += 8 * (1 - (1 - target) * Fraction(step) / Fraction(40 * warmup) if falling else target)
        counted += plan.language_rows(step)
        assert abs(counted - ideal) < unit


@pytest.mark.parametrize("packing", [False, True])
def test_each_epoch_reads_every_sample_once_in_another_order(packing: bool) -> None:
    table: dict[str, tuple[Modality, float]] = {"pictures": ("multimodal", 1.0)}
    plan = make_plan(table, samples=48, packing=packing, global_batch=4, steps=200)
    orders: dict[int, list[int]] = {0: [], 1: []}
    for step in range(60):
        for row in plan.rows(step):
            orders.setdefault(row.epoch, []).extend(p.sample for p in row.parts)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(48))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(48))


def test_a_corpus_is_cut_into_full_rows_that_cover_every_token_once() -> None:
    table: dict[str, tuple[Modality, float]] = {"text": ("language", 1.0)}
    plan = make_plan(table, samples=60, global_batch=4, steps=200, seq_length=32)
    lengths = fake_store("text", 60).lengths
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    cut: dict[int, set[Any]] = {0: set(), 1: set()}
    row_lengths: list[int] = []
    for step in range(30):
        for row in plan.rows(step):
            if row.epoch in seen:
                cut[row.epoch].add(row.parts)
                seen[row.epoch] += [(p.sample, t) for p in row.parts for t in range(p.start, p.stop)]
            if row.epoch == 0:
                row_lengths.append(row.length)
    everything = [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    assert sorted(seen[0]) == sorted(seen[1]) == everything
    assert not cut[0] & cut[1]  # the documents are joined in another order, not only the rows shuffled
    assert sorted(row_lengths)[1:] == [32] * (len(row_lengths) - 1)  # only the last row of an epoch is shorter


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    fresh = ids(make_plan(TABLE_1, packing=True).rows(13))
    used = make_plan(TABLE_1, packing=True)
    for step in (19, 2, 7):
        used.rows(step)
    assert ids(used.rows(13)) == fresh
    assert ids(used.rows(13, [5, 2])) == [fresh[5], fresh[2]]
    other = make_plan(TABLE_1, packing=True, seed=8)
    assert ids(other.rows(13)) != fresh


def sources_of(recipe: Recipe, **fields: Any) -> Recipe:
    return replace(recipe, data=replace(recipe.data, **fields))


def test_a_sample_longer_than_the_sequence_is_named_with_both_numbers() -> None:
    store = fake_store("caption", 20)
    store.lengths[11], store.image_counts[11] = 40, 2  # 40 + 2 * 15 = 70 positions, 38 of them text
    source = SourceConfig(name="pictures", path="", modality="multimodal", share=1.0)
    recipe = make_recipe((source,), seq_length=64)
    with pytest.raises(ValueError, match=r"source pictures: sample 11 has 70 tokens, data.seq_length is 64"):
        StepPlan(recipe.data, recipe.stage, {"pictures": store}, TOKENS_PER_IMAGE)
    text_only = sources_of(recipe, length_counts="text", seq_length=38)
    StepPlan(text_only.data, text_only.stage, {"pictures": store}, TOKENS_PER_IMAGE)
    with pytest.raises(ValueError, match=r"sample 11 has 38 tokens, data.seq_length is 37"):
        StepPlan(sources_of(text_only, seq_length=37).data, recipe.stage, {"pictures": store}, TOKENS_PER_IMAGE)


def test_no_share_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shares of 1 data.sources sum to 0.0"):
        make_plan({"pictures": ("multimodal", 0.0)})


def test_a_resumed_run_tells_what_reads_its_rows_in_another_order() -> None:
    recipe = make_recipe(
        (
            SourceConfig(name="text", path="there", modality="language", share=0.7),
            SourceConfig(name="pairs", path="here", modality="multimodal", share=0.3),
        )
    )
    before = json.loads(json.dumps(asdict(recipe)))
    longer = replace(recipe, stage=replace(recipe.stage, steps=recipe.stage.steps + 1))
    assert order_changes(recipe, before) == order_changes(longer, before) == order_changes(recipe, {}) == []
    first, second = recipe.data.sources
    other = replace(
        recipe,
        stage=replace(longer.stage, seed=99),
        data=replace(recipe.data, language_warmup=0.5, sources=(replace(first, share=0.6), replace(second, share=0.4))),
    )
    assert order_changes(other, before) == [
        f"stage.seed was {recipe.stage.seed}, now 99",
        f"stage.steps was {recipe.stage.steps}, now {recipe.stage.steps + 1}",
        "data.language_warmup was 0.0, now 0.5",
        "data.sources were text 0.7, pairs 0.3, now text 0.6, pairs 0.4",
    ]


def test_the_report_of_the_plan() -> None:
    plan = make_plan(TABLE_1, packing=True, language_warmup=0.1, steps=100)
    place = RankPlace(dp_rank=0, dp_size=2, micro_batch=1, length_multiple=1, equal_lengths=True)
    lines = describe_plan(plan, place)
    assert lines[0] == (
        "100 steps of 8 rows; language share 0.7, from 1 over the first 10 steps; a step holds one modality only"
    )
    assert len(lines) == 1 + len(TABLE_1) + 1
    assert lines[1].startswith("text: language, 568 rows = ")  # 71.5 of 100 steps by the schedule, whole steps drawn
    rows = plan.sources["captions"]
    assert f"{rows.num_rows} packs, {100 * rows.fill:.1f}% of seq_length full on average" in lines[3]
    assert 0 < padding_share(plan, place) < 0.5
    unpadded = replace(place, equal_lengths=False)
    assert padding_share(plan, unpadded) == 0
