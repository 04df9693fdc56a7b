"""The freeze table against the report's, on real stages."""

import pytest
import torch

from megavl.config import ParallelConfig
from megavl.model.build import build_stages
from megavl.model.sizes import SIZES, count_parameters
from megavl.model.stage import Stage
from megavl.parallel.groups import destroy_groups, init_groups
from megavl.training.freeze import COMPONENTS, TRAINED, apply_freeze, compile_frozen_towers
from megavl.training.synthetic_batches import global_batch

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


def losses_and_gradients(stage: Stage) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Of micro-batches with one, two and three images."""
    found = []
    for batch in global_batch(SIZES["tiny_hybrid"], "image", micro_batches=3, tokens=64):
        stage.zero_grad()
        loss = stage(batch).sum()
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None}))
    return found


def test_compiled_towers_change_nothing() -> None:
    """Captured as graphs for any number of images, and run by torch's own operators here, so no compiler is needed."""
    try:
        (stage,) = build()
        apply_freeze([stage], 2)
        names, expected = list(stage.state_dict()), losses_and_gradients(stage)
        torch._dynamo.utils.counters.clear()
        compiled = compile_frozen_towers([stage], backend="eager")
        assert compiled == len(stage.first_stage.towers.sam.blocks) + len(stage.first_stage.towers.siglip.blocks)
        got = losses_and_gradients(stage)
        assert list(stage.state_dict()) == names
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # they did run compiled
        assert not torch._dynamo.utils.counters["graph_break"]
        for (loss, gradients), (wanted, reference) in zip(got, expected, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5)
            assert gradients.keys() == reference.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-5, msg=name)
        apply_freeze([stage], 3)
        assert compile_frozen_towers([stage], backend="eager") == len(stage.first_stage.towers.sam.blocks)
    finally:
        destroy_groups()
