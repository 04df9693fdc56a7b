"""The shipped recipes: Table 4's numbers, Tables 1 and 2's shares, and layouts that fit the hardware they name."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from megavl.config import SourceConfig
from megavl.model.sizes import SIZES
from megavl.parallel.validate import check_layout
from megavl.recipe import load_recipe
from megavl.training.schedule import learning_rate
from megavl.validate import validate

EXAMPLES = Path(__file__).parents[2] / "examples"

TABLE_4 = {
    # (size, stage): peak, schedule, warm-up, steps, batch, length, packed
    ("1.3b", 1): (1.0e-3, "cosine", 128, 15000, 256, 512, False),
    ("1.3b", 2): (3e-5, "multistep", 2000, 96000, 1024, 4096, True),
    ("1.3b", 3): (2.0e-5, "cosine", 256, 10000, 256, 4096, False),
    ("7b", 1): (1.0e-3, "cosine", 128, 15000, 256, 512, False),
    ("7b", 2): (4.2e-5, "multistep", 2000, 42000, 2304, 4096, True),
    ("7b", 3): (2.0e-5, "cosine", 256, 10000, 256, 4096, False),
}
PIPELINED = {("7b", 2), ("7b", 3)}
TABLE_1 = [13.1, 11.1, 2.1, 0.4, 1.2, 2.1, 70.0]
TABLE_2 = [10.5, 35.5, 4.1, 2.0, 47.9]


@pytest.mark.parametrize(("size", "number"), sorted(TABLE_4))
def test_recipe(size: str, number: int) -> None:
    path = EXAMPLES / f"deepseek_vl_{size}" / f"stage{number}.py"
    recipe = load_recipe(path)
    optim, stage, data = recipe.optim, recipe.stage, recipe.data
    values = (optim.lr, optim.schedule, optim.warmup_steps, stage.steps, stage.global_batch, data.seq_length)
    assert (*values, data.packing) == TABLE_4[size, number]
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip, optim.eps) == (0.9, 0.95, 0.0, 1.0, 1e-8)
    assert stage.number == number
    assert recipe.model == SIZES[size]
    assert data.length_counts == ("text" if number == 1 else "all")
    assert stage.dtype == "bf16"
    assert validate(recipe) == []
    assert (recipe.parallel.pipeline > 1) == ((size, number) in PIPELINED)
    # Hardware named in the docstring: `N nodes of 8`, data-parallel size and micro-batches as written there.
    text = path.read_text()
    nodes = int(re.search(r"(\d+) nodes of 8", text)[1])  # type: ignore[index]
    assert f"NODES={nodes} " in text
    assert check_layout(recipe, 8 * nodes) == []
    data_size = 8 * nodes // (recipe.parallel.tensor * recipe.parallel.pipeline)
    assert f"pipeline {recipe.parallel.pipeline} x data {data_size}" in text
    assert f"{stage.global_batch // data_size // stage.micro_batch} micro-batch" in text
    assert "not measured yet" in text
    if number > 1:
        assert recipe.checkpoint.init_from.endswith(f"deepseek_vl_{size}/stage{number - 1}")
    assert learning_rate(optim, stage.steps, optim.warmup_steps) == optim.lr


def by_share(sources: tuple[SourceConfig, ...]) -> list[float]:
    """Percentages of the rows of a table: neighbours of equal share belong to one category."""
    totals: dict[float, float] = defaultdict(float)
    for source in sources:
        totals[source.share] += 100 * source.share
    return list(totals.values())


def test_mixtures() -> None:
    recipes = {n: load_recipe(EXAMPLES / "deepseek_vl_7b" / f"stage{n}.py").data.sources for n in (1, 2, 3)}
    assert by_share(recipes[1]) == pytest.approx([100 / 3, 200 / 3])
    assert by_share(recipes[3]) == pytest.approx(TABLE_2)
    pretraining = tuple(s for s in recipes[2] if s.name.startswith("pretrain/"))
    assert by_share(pretraining) == pytest.approx([0.98 * share for share in TABLE_1])
    assert sum(s.share for s in recipes[2] if s.name.startswith("sft/")) == pytest.approx(0.02)
    language = sum(s.share for s in recipes[2] if s.modality == "language")
    assert language == pytest.approx(0.98 * 0.7 + 0.02 * 0.479)
    assert {s.path for s in recipes[2]} == {f"data/{s.name}" for s in recipes[2]}


def test_mixtures_are_those_of_both_sizes() -> None:
    for number in (1, 2, 3):
        small, large = (load_recipe(EXAMPLES / f"deepseek_vl_{s}" / f"stage{number}.py").data for s in ("1.3b", "7b"))
        assert small.sources == large.sources
