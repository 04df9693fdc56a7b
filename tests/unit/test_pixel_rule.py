"""Which rank decodes which image: all that its towers will read, and no bad image told of twice or never."""

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavl.config import ParallelConfig
from megavl.model.sizes import SIZES
from megavl.parallel.vision_ahead import encoded_shapes, images_ahead
from megavl.parallel.vision_placement import pixel_rule
from megavl.training.freeze import frozen_components

IMAGES = [3, 0, 5, 1, 7, 4]
"""Of the micro-batches of a step."""
BEFORE = list(accumulate(IMAGES, initial=0))


def decoded(rule: Any) -> list[set[int]]:
    """Images, counted over the step, that a rank decodes of each micro-batch."""
    found = []
    for before, images in zip(BEFORE, IMAGES, strict=False):
        share = rule.of(before, images)
        batch: Any = SimpleNamespace(images_before=before, num_images=images)
        found.append({before + i for i in share.of(batch)} if share is not None else set())
    return found


def needed(vision: str, tensor: int, pipeline: int, t: int, p: int, limit: int, trained: bool) -> list[set[int]]:
    """The same by the rule in words: image k is encoded ahead by rank (k % tp, k // tp % pp)."""
    found = []
    for before, images in zip(BEFORE, IMAGES, strict=False):
        whole = set(range(before, before + images))
        column = {k for k in whole if k % tensor == t} if p == 0 else set()
        ahead = {k for k in whole if (k % tensor, k // tensor % pipeline) == (t, p)}
        if vision == "replicate":
            found.append(whole if p == 0 else set())
        elif vision == "split_tensor" or before + images > limit:
            found.append(column)
        else:
            found.append(ahead | (column if trained else set()))
    return found


def mebibytes_for(images: int, shapes: dict[str, tuple[int, ...]], tensor: int, pipeline: int) -> int:
    """The least budget with room for so many images in fp32: a tensor rank's part of them, and 1/pp of that again."""
    per_image = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    each = -(-images // (tensor * pipeline))
    return -(-each * (pipeline + 1) * per_image // 2**20)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("vision", ["replicate", "split_tensor", "split_model"])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("size", ["7b", "1.3b"])
def test_a_rank_decodes_what_it_reads(size: str, stage: int, vision: Any, tensor: int, pipeline: int) -> None:
    """The 1.3B's one tower is trained in stage 3: nothing runs ahead there."""
    model, frozen = SIZES[size], frozen_components(stage)
    shapes = encoded_shapes(model, frozen)
    budget = mebibytes_for(9, shapes, tensor, pipeline)
    parallel = ParallelConfig(
        tensor=tensor, pipeline=pipeline, vision=vision, vision_ahead_mib=budget if vision == "split_model" else 0
    )
    limit = images_ahead(model, parallel, frozen, 4)
    if vision == "split_model" and shapes:
        assert BEFORE[4] <= limit < BEFORE[-1]  # some micro-batches lie within it
    answered: list[int] = []
    for t in range(tensor):
        for p in range(pipeline):
            groups: Any = SimpleNamespace(
                tensor_rank=t, tensor_size=tensor, pipeline_rank=p, pipeline_size=pipeline, is_first_stage=p == 0
            )
            rule = pixel_rule(model, parallel, groups, frozen=frozen, dtype=torch.float32)
            found = decoded(rule)
            assert found == needed(vision, tensor, pipeline, t, p, limit, trained=stage == 3)
            answered += [image for of_batch in found for image in of_batch if rule.answers]
    assert sorted(answered) == list(range(BEFORE[-1]))


def test_the_budget_holds_this_step_and_the_next() -> None:
    """By hand for the 7B in bf16 at TP2 x PP2: 9.6 MB an image, of which a first-stage rank holds 1/2 and then 1/4."""
    model, frozen = SIZES["7b"], frozen_components(2)
    per_image = 2 * (256 * 64 * 64 + 64 * 64 * 768 + 24 * 24 * 1024)
    parallel = ParallelConfig(tensor=2, pipeline=2, vision="split_model")
    images = images_ahead(model, parallel, frozen, 2)
    assert images % 4 == 0
    assert (images / 2 + images / 4) * per_image <= 4096 * 2**20 < ((images + 4) / 2 + (images + 4) / 4) * per_image
