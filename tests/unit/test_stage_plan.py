"""The stage plan: which layers and how many parameters on which rank, against the closed-form counts."""

import dataclasses

import pytest

from megavl.config import ParallelConfig
from megavl.model.sizes import SIZES, count_parameters
from megavl.parallel.stage_plan import describe_plan, stage_plan

PLAN_7B = """\
pipeline rank 0: towers + adaptor + embedding, layers 0 to 5; 1237.9 M parameters per rank
pipeline rank 1: layers 6 to 13; 809.6 M parameters per rank
pipeline rank 2: layers 14 to 21; 809.6 M parameters per rank
pipeline rank 3: layers 22 to 29, norm + head + loss; 1019.3 M parameters per rank"""


def test_the_7b_plan_as_text() -> None:
    plan = stage_plan(SIZES["7b"], ParallelConfig(tensor=2, pipeline=4, layout="6,8,8,8"))
    assert describe_plan(plan) == PLAN_7B
    assert [len(place.layers) for place in plan] == [6, 8, 8, 8]


@pytest.mark.parametrize("name", ["1.3b", "7b", "tiny_hybrid"])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_every_layer_and_every_parameter_is_placed_once(name: str, pipeline: int, virtual: int) -> None:
    model = SIZES[name]
    plan = stage_plan(model, ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual))
    assert [layer for place in plan for layer in place.layers] == list(range(model.decoder.layers))
    assert sum(place.parameters for place in plan) == sum(count_parameters(model).values())
    assert [place.first for place in plan] == [True] + [False] * (len(plan) - 1)
    assert [place.last for place in plan] == [False] * (len(plan) - 1) + [True]


def test_virtual_stages_go_round_the_ranks() -> None:
    plan = stage_plan(SIZES["tiny"], ParallelConfig(pipeline=2, virtual_pipeline=2))
    assert [(place.rank, place.chunk) for place in plan] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_the_tensor_group_cuts_matrices_and_copies_the_rest() -> None:
    model = SIZES["tiny_hybrid"]
    (whole,) = stage_plan(model, ParallelConfig())
    (half,) = stage_plan(model, ParallelConfig(tensor=2))
    copied = sum(count for component, count in count_parameters(model).items() if component != "decoder")
    copied += (2 * model.decoder.layers + 1) * model.decoder.hidden  # norms
    assert 2 * half.parameters == whole.parameters + copied


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("8,8,8,8", "places 32 layers, the model has 30"),
        ("15,15", "names 2 stages, pipeline \\* virtual_pipeline is 4"),
        ("8,eight,8,6", "write decoder layers per stage"),
        ("0,10,10,10", "pipeline stage 0 of 4 has 0 decoder layers"),
    ],
)
def test_a_layout_that_does_not_fit_says_both_numbers(layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_plan(SIZES["7b"], ParallelConfig(pipeline=4, layout=layout))


def test_fewer_layers_than_stages() -> None:
    model = SIZES["tiny"]
    small = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, layers=2))
    with pytest.raises(ValueError, match="has 0 decoder layers"):
        stage_plan(small, ParallelConfig(pipeline=4))
