"""The likely cause of a difference: from a tensor to a clue, from clues to a sentence."""

import math
from typing import Any

import pytest
import torch

from megavl.training.diagnosis import Clue, Scene, diagnose, make_clue

EXPECTED = {
    "decoder.layers.0.mlp.weight": torch.arange(1.0, 7.0).view(2, 3),
    "decoder.layers.1.mlp.weight": torch.tensor([[3.0, -1.0, 2.0], [0.5, 4.0, -2.0]]),
    "first_stage.adaptor.bias": torch.tensor([1.0, -2.0]),
}
FIRST, SECOND, BIAS = EXPECTED


def look(name: str, tensor: list[torch.Tensor], data: list[torch.Tensor] | None = None) -> Clue:
    copies = {"tensor": tensor, "data-parallel": tensor[:1] if data is None else data}
    return make_clue(name, copies, EXPECTED, copied=len(tensor) > 1, difference=1.0, tolerance=1e-5)


def test_clues() -> None:
    wanted = EXPECTED[BIAS]
    part = torch.tensor([0.75, 1.0])
    assert look(BIAS, [2 * wanted, 2 * wanted]).factor == pytest.approx(2)
    assert look(BIAS, [wanted / 2, wanted / 2]).factor == pytest.approx(0.5)
    assert look(BIAS, [wanted / 2, wanted / 2]).partial == ""  # equal copies of a half: averaged where a sum is due
    assert look(BIAS, [part, wanted - part]).partial == "tensor"
    assert look(BIAS, [part], [part, wanted - part]).partial == "data-parallel"
    assert look(BIAS, [part, part]).factor is None
    assert look(BIAS, [0 * wanted]).factor == 0
    assert look(FIRST, [EXPECTED[SECOND] + 1e-4]).twin == SECOND
    assert look(FIRST, [EXPECTED[FIRST] + 0.3]).twin == ""


def test_alike_norms_are_no_twins() -> None:
    """Norm weights of all layers are about 1: a wrong update does not make one the other."""
    expected = {f"decoder.layers.{n}.norm.weight": torch.ones(4) + 0.01 * n for n in range(2)}
    (name, _), wrong = expected, torch.ones(4) + 0.02
    copies = {"tensor": [wrong], "data-parallel": [wrong]}
    assert make_clue(name, copies, expected, copied=True, difference=0.02, tolerance=1e-5).twin == ""


def test_a_gradient_where_there_should_be_none() -> None:
    copies = {"tensor": [torch.ones(2)], "data-parallel": [torch.ones(2)]}
    clue = make_clue(BIAS, copies, {BIAS: torch.zeros(2)}, copied=True, difference=1.0, tolerance=1e-5)
    assert clue.factor == math.inf


SIZES = {"tensor": 2, "data-parallel": 2, "micro-batches": 8}


def clue(name: str = BIAS, **what: Any) -> Clue:
    return Clue(name=name, difference=1.0, **{"copied": name == BIAS, **what})


@pytest.mark.parametrize(
    ("seen", "sentence"),
    [
        ({"layers": (0, 2, 1)}, "the decoder layers run in the order 0,2,1"),
        ({"gradients": [clue(factor=2.0)]}, "(the size of the tensor group): summed although each rank has the whole"),
        (
            {"gradients": [clue(factor=2.0), clue(FIRST, factor=2.0)]},
            "the size of the tensor group or the size of the data-parallel group",
        ),
        ({"gradients": [clue(factor=0.5)]}, "(the size of the tensor group): averaged or divided where a sum is due"),
        ({"gradients": [clue(FIRST, factor=0.125)]}, "0.125 times the reference (micro-batches)"),
        ({"gradients": [clue(FIRST, factor=0.3)]}, "0.3 times the reference, which is no group's size"),
        ({"gradients": [clue(FIRST, factor=0.0)]}, "are zero: the backward pass does not reach them"),
        ({"gradients": [clue(factor=math.inf)]}, "are not zero although the step gives them none"),
        ({"gradients": [clue(partial="tensor")]}, "the sum over the tensor group (2 ranks) is missing"),
        ({"gradients": [clue(FIRST)]}, "without a clean factor"),
        (
            {"gradients": [clue(factor=2.0), clue(factor=2.0), clue(FIRST)]},
            "2 gradients of aligner, decoder are 2 times the reference",
        ),
        (
            {"parameters": [clue(FIRST, twin=SECOND)]},
            "decoder layers are swapped: decoder.layers.0 has the weights of decoder.layers.1",
        ),
        ({"gradients": [clue(FIRST, twin=SECOND)]}, "decoder.layers.0 has the gradients of decoder.layers.1"),
        ({"loss": 4.2005}, "the labels are shifted by one position to the left"),
        ({"loss": 33.6}, "the loss is a clean factor off (micro-batches)"),
        ({"loss": 4.7}, "the forward pass differs before any update"),
        ({"loss": 4.7, "first_step": False, "shifted_losses": {}}, "the weights used in this step were out of date"),
        ({"norm_factor": math.sqrt(2)}, "their norm is 1.414 times the reference's"),
        ({"parameters": [clue(FIRST)]}, "loss, gradients and norm agree, the update does not"),
    ],
)
def test_causes(seen: dict[str, Any], sentence: str) -> None:
    scene = {
        "sizes": SIZES,
        "first_step": True,
        "loss": 4.2,
        "expected_loss": 4.2,
        "shifted_losses": {"left": (4.2005, 4.1), "right": (4.3, 4.4)},
        "norm_factor": None,
        "layers": (0, 1, 2),
    }
    assert sentence in diagnose(Scene(**{**scene, "loss_differs": "loss" in seen, **seen}))
