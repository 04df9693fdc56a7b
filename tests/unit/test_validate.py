"""Layouts that do not fit: each problem is one sentence with both numbers, and a recipe that fits has none."""

import dataclasses
from typing import Any

import pytest

from megavl.config import DataConfig, OptimConfig, ParallelConfig, Recipe, StageConfig
from megavl.model.sizes import SIZES
from megavl.parallel.validate import check_layout


def recipe(parallel: dict[str, Any] | None = None, stage: dict[str, Any] | None = None, model: str = "tiny") -> Recipe:
    """A recipe with the given layout and batch."""
    return Recipe(
        run_dir="run",
        model=SIZES[model],
        parallel=ParallelConfig(**(parallel or {})),
        data=DataConfig(tokenizer="t", sources=(), seq_length=128),
        stage=StageConfig(number=2, steps=1, **{"global_batch": 16, **(stage or {})}),
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0),
    )


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        ({}, 1),
        ({}, 16),
        ({"tensor": 2, "pipeline": 2, "sequence": True}, 8),
        ({"pipeline": 2, "virtual_pipeline": 2}, 2),
        ({"pipeline": 2, "layout": "1,3"}, 2),
        ({"vision": "split_model", "vision_ahead_mib": 0, "vision_cache": "x"}, 1),
        ({"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}, 4),
    ],
)
def test_a_layout_that_fits_has_no_problem(parallel: dict[str, Any], world_size: int) -> None:
    assert check_layout(recipe(parallel), world_size) == []


@pytest.mark.parametrize(
    ("parallel", "stage", "world_size", "sentence"),
    [
        ({"tensor": 0}, {}, 1, "parallel.tensor 0 is below 1"),
        ({"tensor": 2, "pipeline": 2}, {}, 6, "6 ranks do not divide by parallel.tensor * pipeline 2 * 2 = 4"),
        ({"tensor": 8}, {}, 8, "model.decoder.heads 4 does not divide by parallel.tensor 8"),
        ({"tensor": 8}, {}, 8, "model.decoder.kv_heads 4 does not divide by parallel.tensor 8"),
        ({"tensor": 3}, {}, 3, "model.decoder.ffn 352 does not divide by parallel.tensor 3"),
        ({"tensor": 3}, {}, 3, "model.decoder.vocab 1024 does not divide by parallel.tensor 3"),
        ({"pipeline": 2, "layout": "1,2"}, {}, 2, "places 3 layers, the model has 4"),
        ({"pipeline": 2, "layout": "4,0"}, {}, 2, "pipeline stage 1 of 2 has 0 decoder layers"),
        ({"pipeline": 8}, {}, 8, "model.decoder.layers 4 is below parallel.pipeline * virtual_pipeline 8 * 1 = 8"),
        ({"sequence": True}, {}, 1, "but parallel.tensor is 1"),
        ({"virtual_pipeline": 2}, {}, 1, "parallel.virtual_pipeline 2 needs a pipeline, but parallel.pipeline is 1"),
        ({"overlap_param_gather": True}, {}, 1, "needs parallel.distributed_optimizer, which is off"),
        ({"overlap_param_gather": True}, {}, 1, "needs parallel.overlap_grad_reduce, which is off"),
        ({"pipeline": 2, "overlap_p2p_comm_warmup_flush": True}, {}, 2, "but parallel.virtual_pipeline is 1"),
        ({"timeout_s": 0}, {}, 1, "parallel.timeout_s 0 is below 1"),
        ({"vision_batch": 0}, {}, 1, "parallel.vision_batch 0 is below 1"),
        ({"vision_ahead_mib": -1}, {}, 1, "parallel.vision_ahead_mib -1 is below 0"),
        ({"vision_cache": "x"}, {}, 1, "under parallel.vision split_model, but parallel.vision is replicate"),
        ({"vision_cache_gib": 0.0}, {}, 1, "parallel.vision_cache_gib 0.0 is not above 0"),
        (
            {},
            {"micro_batch": 2},
            3,
            "stage.global_batch 16 does not divide by stage.micro_batch * data-parallel ranks ",
        ),
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            {"global_batch": 3},
            2,
            "stage.global_batch 3 gives 3 micro-batches a rank; with parallel.virtual_pipeline 2 they must be a "
            "multiple of parallel.pipeline 2",
        ),
    ],
)
def test_a_layout_that_does_not_fit(
    parallel: dict[str, Any], stage: dict[str, Any], world_size: int, sentence: str
) -> None:
    problems = check_layout(recipe(parallel, stage), world_size)
    assert any(sentence in problem for problem in problems), problems


def test_interleaving_refuses_the_variable_that_makes_it_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_AVOID_RECORD_STREAMS", "1")
    (problem,) = check_layout(recipe({"pipeline": 2, "virtual_pipeline": 2}), 2)
    assert "TORCH_NCCL_AVOID_RECORD_STREAMS" in problem
    assert check_layout(recipe({"pipeline": 2}), 2) == []


def test_all_problems_come_at_once() -> None:
    base = recipe({"tensor": 3, "sequence": False, "overlap_param_gather": True}, {"global_batch": 7})
    assert len(check_layout(dataclasses.replace(base), 6)) == 7
