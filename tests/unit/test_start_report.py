"""What a run says of its vision placement, also where the placement asked for changes nothing."""

from dataclasses import replace
from typing import Any

import pytest
from small_stores import make_recipe

from megavl.config import ParallelConfig
from megavl.model.sizes import SIZES
from megavl.training.start_report import vision_line

SHARED = "2 tensor ranks of the first stage share the images"
ALONE = "has one tensor rank, which shares its images with none, as in replicate"


@pytest.mark.parametrize(
    ("vision", "tensor", "pipeline", "size", "stage", "words"),
    [
        ("split_tensor", 2, 2, "tiny_hybrid", 2, [SHARED]),
        ("split_tensor", 1, 2, "tiny_hybrid", 2, [ALONE]),
        ("split_model", 2, 2, "tiny_hybrid", 2, [SHARED, "sam and siglip (", "on all 4 ranks of a copy, for up to "]),
        ("split_model", 1, 1, "tiny_hybrid", 2, [ALONE, "run ahead of the schedule on the one rank of a copy"]),
        ("split_model", 1, 2, "tiny_hybrid", 3, [ALONE, "; sam (", "on all 2 ranks"]),
        ("split_model", 2, 2, "tiny", 3, [SHARED, "no tower is frozen, so none runs ahead"]),
    ],
)
def test_placement_in_words(vision: Any, tensor: int, pipeline: int, size: str, stage: int, words: list[str]) -> None:
    recipe = make_recipe(())
    recipe = replace(
        recipe,
        model=SIZES[size],
        parallel=ParallelConfig(vision=vision, tensor=tensor, pipeline=pipeline),
        stage=replace(recipe.stage, number=stage),
    )
    line = vision_line(recipe)
    assert line.startswith(f"vision {vision}: ")
    assert [word for word in words if word not in line] == [], line
    assert ("ahead of" in line) == (vision == "split_model")
