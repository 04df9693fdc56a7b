"""The layouts, the model and the steps of the parity tests, and what the worker processes run."""

import torch

from megavl.config import DecoderConfig, ModelConfig, ParallelConfig, SamConfig, SiglipConfig
from megavl.parallel.groups import init_groups
from megavl.training.parity import Comparison, run_layout
from megavl.training.reference_steps import Question, run_reference
from megavl.training.synthetic_batches import CASES, global_batch

TOLERANCE = 1e-5
"""Relative, fp32; measured differences are 1e-6 to 4e-6."""

STEPS = ("text", *CASES[1:], "text")
"""Consecutive steps: first a text step on fresh buckets, last a text step after images (momentum moves SigLIP)."""
STEP_NAMES = ("text", "image", "mixed", "packed", "text again")

BUCKET_SIZE = 3000
"""Parameters per bucket: about 10 buckets, so that their order matters."""

MODEL = ModelConfig(
    decoder=DecoderConfig(layers=4, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64, init_std=0.1),
    siglip=SiglipConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp=32),
    sam=SamConfig(
        image_size=64,
        patch_size=8,
        width=16,
        layers=2,
        heads=2,
        mlp=32,
        window=4,
        global_layers=(0, 1),
        neck=8,
        upsample=16,
        downsample=(16, 16),
    ),
    adaptor="hybrid",
    background=(122, 116, 104),
)
"""Both towers, grouped-query attention; 24 thousand parameters."""

_SP = {"tensor": 2, "sequence": True}
_DISTRIBUTED = {"distributed_optimizer": True}
_INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
_TENSOR = {"vision": "split_tensor"}
_MODEL = {"vision": "split_model", "vision_batch": 2}
_OVERLAP = {"overlap_grad_reduce": True}
_OVERLAP_ALL = {**_DISTRIBUTED, **_OVERLAP, "overlap_param_gather": True}

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    name: (ranks, ParallelConfig(device="cpu", **fields))
    for name, ranks, fields in [
        ("tp2", 2, {"tensor": 2}),
        ("tp2sp", 2, _SP),
        ("pp2", 2, {"pipeline": 2}),
        ("pp2 uneven", 2, {"pipeline": 2, "layout": "1,3"}),
        ("pp4", 4, {"pipeline": 4}),
        ("pp2vpp2", 2, {"pipeline": 2, "virtual_pipeline": 2}),
        ("dp2", 2, {}),
        ("dp2 overlap", 2, _OVERLAP),
        ("dp2 distributed", 2, _DISTRIBUTED),
        ("dp2 distributed overlap", 2, _OVERLAP_ALL),
        ("tp2pp2sp", 4, {**_SP, "pipeline": 2}),
        ("tp2dp2", 4, {"tensor": 2}),
        ("tp2dp2sp distributed overlap", 4, {**_SP, **_OVERLAP_ALL}),
        ("pp2dp2", 4, {"pipeline": 2}),
        ("pp2dp2 overlap", 4, {"pipeline": 2, **_OVERLAP}),
        ("pp2dp2 distributed overlap", 4, {"pipeline": 2, **_OVERLAP_ALL}),
        ("pp2vpp2dp2 distributed overlap", 4, {**_INTERLEAVED, **_OVERLAP_ALL}),
    ]
}
"""Name -> ranks and layout."""

VISION_LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    name: (ranks, ParallelConfig(device="cpu", **fields))
    for name, ranks, fields in [
        ("tp2 split_tensor", 2, {"tensor": 2, **_TENSOR}),
        ("tp2 split_model", 2, {"tensor": 2, **_MODEL}),
        ("pp2 split_model", 2, {"pipeline": 2, **_MODEL}),
        ("tp2pp2sp split_model", 4, {**_SP, "pipeline": 2, **_MODEL}),
        ("tp2dp2sp split_tensor distributed overlap", 4, {**_SP, **_TENSOR, **_OVERLAP_ALL}),
        ("pp2vpp2dp2 split_model distributed overlap", 4, {**_INTERLEAVED, **_MODEL, **_OVERLAP_ALL}),
    ]
}
"""The same for placements of vision other than `replicate`."""

RECOMPUTE: dict[str, tuple[int, ParallelConfig]] = {
    name: (ranks, ParallelConfig(device="cpu", **fields))
    for name, ranks, fields in [
        ("recompute full", 1, {"recompute": "full"}),
        ("recompute selective", 1, {"recompute": "selective"}),
        ("recompute vision", 1, {"recompute_vision": True}),
        ("tp2pp2sp recompute full + vision", 4, {**_SP, "pipeline": 2, "recompute": "full", "recompute_vision": True}),
    ]
}
"""The same for activation recomputation."""


MESSAGES: dict[str, tuple[int, ParallelConfig]] = {
    name: (ranks, ParallelConfig(device="cpu", **fields))
    for name, ranks, fields in [
        ("pp2 one by one", 2, {"pipeline": 2, "batch_p2p_comm": False}),
        ("pp4 one by one", 4, {"pipeline": 4, "batch_p2p_comm": False}),
        ("pp4 without waiting", 4, {"pipeline": 4, "batch_p2p_sync": False}),
        ("pp2vpp2 flush", 2, {"pipeline": 2, "virtual_pipeline": 2, "overlap_p2p_comm_warmup_flush": True}),
    ]
}
"""The same for the ways in which pipeline ranks send to each other."""


def micro_batches(ranks: int, parallel: ParallelConfig) -> int:
    """Of a global batch: as few as give every schedule its steady phase and every data-parallel rank two.

    A layout costs in proportion, most of it for the collectives of gloo: 0.7 ms of computing each on each rank.
    """
    return 8 if ranks // parallel.tensor >= 4 else 4


def question(stage: int, count: int) -> Question:
    """All steps, of `count` micro-batches each. Which data-parallel rank of two has no image changes with the stage."""
    batches = [global_batch(MODEL, case, micro_batches=count, seed=stage % 2) for case in STEPS]
    return Question(model=MODEL, stage=stage, batches=batches)


def save_reference(stage: int, count: int, path: str) -> None:
    """In a world of one: run the plain loop and keep its records."""
    torch.save(run_reference(question(stage, count), init_groups(ParallelConfig(device="cpu"))), path)


def compare(stage: int, parallel: ParallelConfig, path: str) -> Comparison:
    """In any world: run a layout beside the records."""
    groups = init_groups(parallel)
    records = torch.load(path, weights_only=False)  # written by this test
    asked = question(stage, micro_batches(groups.world_size, parallel))
    return run_layout(asked, parallel, groups, records, bucket_size=BUCKET_SIZE)
