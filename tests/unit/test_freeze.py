"""The freeze table against the report's, on real stages."""

import torch

from megavl.config import ParallelConfig
from megavl.model.build import build_stages
from megavl.model.sizes import SIZES, count_parameters
from megavl.model.stage import Stage
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.training.freeze import COMPONENTS, TRAINED, apply_freeze

REPORT = {  # columns: SAM, its adaptor part, SigLIP, aligner, decoder
    0: "FFFFT",
    1: "FTFTF",
    2: "FTFTT",
    3: "FTTTT",
}


def build() -> list[Stage]:
    """The whole tiny hybrid model."""
    groups = init_groups(ParallelConfig(device="cpu"))
    return build_stages(
        SIZES["tiny_hybrid"], ParallelConfig(), dtype=torch.float32, seed=0, pg=groups.pg, device=groups.device
    )


def test_the_table_is_the_reports() -> None:
    assert {n: "".join("FT"[row[c]] for c in COMPONENTS) for n, row in TRAINED.items()} == REPORT


def test_requires_grad_follows_the_table_and_later_stages_undo_earlier_ones() -> None:
    try:
        stages, counts = build(), count_parameters(SIZES["tiny_hybrid"])
        for number in (3, 1, 0, 2):
            trainable = apply_freeze(stages, number)
            assert trainable == {c: counts[c] * TRAINED[number][c] for c in COMPONENTS}
            for name, parameter in stages[0].named_parameters():
                assert parameter.requires_grad == TRAINED[number][stages[0].component_of(name)], name
    finally:
        destroy_groups()
