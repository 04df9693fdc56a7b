"""The closed-form counts against the report's numbers and against the modules that are really built."""

from dataclasses import replace

import pytest
import torch

from megavl.config import AdaptorKind
from megavl.model.sizes import SIZES, count_parameters, count_unused_parameters
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import SAM_ADAPTOR_PREFIXES, VisionTowers

TWO_TOWER_KINDS: tuple[AdaptorKind, ...] = ("hybrid", "shared", "separate", "pool_w", "pool_h")


def test_seven_billion_matches_the_released_model() -> None:
    assert count_parameters(SIZES["7b"]) == {
        "sam": 89_670_912,
        "sam_adaptor": 5_898_240 + 787_456 + 1,
        "siglip": 303_688_704,
        "aligner": 20_979_712,
        "decoder": 6_910_365_696,
    }
    assert count_unused_parameters(SIZES["7b"]) == 12_595_200 + 4 * 1024
    assert sum(count_parameters(SIZES["7b"]).values()) + count_unused_parameters(SIZES["7b"]) == 7_343_990_017


def test_one_billion_matches_the_released_model() -> None:
    assert count_parameters(SIZES["1.3b"]) == {
        "sam": 0,
        "sam_adaptor": 0,
        "siglip": 303_688_704,
        "aligner": 6_295_552,
        "decoder": 1_652_656_128,
    }
    assert count_unused_parameters(SIZES["1.3b"]) == 12_595_200
    assert sum(count_parameters(SIZES["1.3b"]).values()) + count_unused_parameters(SIZES["1.3b"]) == 1_975_235_584


def test_tokens_per_image() -> None:
    assert {name: model.tokens_per_image for name, model in SIZES.items()} == {
        "tiny": 16,
        "tiny_hybrid": 16,
        "1.3b": 576,
        "1.3b_hybrid": 576,
        "7b": 576,
    }


@pytest.mark.parametrize("name", SIZES)
def test_counts_equal_the_built_towers(name: str) -> None:
    model = SIZES[name]
    with torch.device("meta"):  # shapes without memory
        towers = VisionTowers(model)
        adaptor = make_adaptor(model)
    built = dict.fromkeys(("sam", "sam_adaptor", "siglip", "aligner"), 0)
    built["siglip"] = sum(p.numel() for p in towers.siglip.parameters())
    built["aligner"] = sum(p.numel() for p in adaptor.parameters())
    if towers.sam:
        for parameter_name, parameter in towers.sam.named_parameters():
            built["sam_adaptor" if parameter_name.startswith(SAM_ADAPTOR_PREFIXES) else "sam"] += parameter.numel()
    counts = count_parameters(model)
    assert built == {component: counts[component] for component in built}


@pytest.mark.parametrize("kind", TWO_TOWER_KINDS)
def test_counts_equal_every_adaptor(kind: AdaptorKind) -> None:
    model = replace(SIZES["7b"], adaptor=kind)
    with torch.device("meta"):
        adaptor = make_adaptor(model)
    assert count_parameters(model)["aligner"] == sum(p.numel() for p in adaptor.parameters())


def test_adaptor_must_fit_the_towers() -> None:
    with pytest.raises(ValueError, match="for 1 tower, but the model has 2"):
        make_adaptor(replace(SIZES["7b"], adaptor="mlp_gelu"))
    with pytest.raises(ValueError, match="for 2 towers, but the model has 1"):
        make_adaptor(replace(SIZES["1.3b"], adaptor="hybrid"))
