"""What the search tries: sizes and cuts of the batch that divide, vision placements, recomputation.

In: a `Case` and which fields of its `ParallelConfig` are fixed. Out: the choices for the others, cheapest or simplest
first. None of them changes what a step computes, only where and when.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from megavl.planning.costs import TOWERS, Case, images_ahead
from megavl.planning.estimate import Batch

CHUNKS = (1, 2, 3, 4, 5)
"""Chunks per rank that are tried."""
MICRO_BATCHES = (1, 2, 4, 8)
"""Rows per forward pass that are tried."""
PLACEMENTS = ("replicate", "split_tensor", "split_model")
"""`parallel.vision`, simplest first."""
RECOMPUTE = ("none", "selective", "full")
"""`parallel.recompute`, least first."""
Recomputation = tuple[int, bool]
"""(index in `RECOMPUTE`, `parallel.recompute_vision`)."""


def layouts(
    case: Case, gpus: int, global_batch: int, fixed: Collection[str], micro_batch: int | None
) -> Iterator[tuple[Case, Batch]]:
    """Every layout and cut of the batch that divides; arguments as in `search`."""
    decoder, given = case.model.decoder, case.parallel
    shared = (decoder.heads, decoder.kv_heads, decoder.ffn, decoder.vocab)
    tensors = [given.tensor] if "tensor" in fixed else range(1, case.hardware.node + 1)
    for tensor in (t for t in tensors if not any(size % t for size in shared)):
        pipelines = [given.pipeline] if "pipeline" in fixed else range(1, decoder.layers + 1)
        for pipeline in (p for p in pipelines if gpus % (tensor * p) == 0):
            data = gpus // (tensor * pipeline)
            chunks = [given.virtual_pipeline] if "virtual_pipeline" in fixed else CHUNKS if pipeline > 1 else (1,)
            for virtual in (v for v in chunks if v * pipeline <= decoder.layers):
                sizes = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "layout": ""}
                sizes["sequence"] = given.sequence and tensor > 1
                for rows in [micro_batch] if micro_batch else MICRO_BATCHES:
                    count, rest = divmod(global_batch, rows * data)
                    if not rest and count and (virtual == 1 or count % pipeline == 0):
                        batch = Batch(micro_batch=rows, micro_batches=count, data=data)
                        yield with_parallel(case, **sizes), batch


def placements(case: Case, images: int, fixed: Collection[str]) -> list[Case]:
    """Vision placements that differ under the sizes of `case`, simplest first.

    Args:
        case: the setting.
        images: most that a data-parallel rank has in a step.
        fixed: names of fields to keep.
    """
    if "vision" in fixed or not images:
        return [case]
    parallel = case.parallel
    found = ["replicate"] + (["split_tensor"] if parallel.tensor > 1 else [])
    ahead = with_parallel(case, vision="split_model")
    frozen = any(tower not in case.trained for tower in TOWERS if tower != "sam" or case.model.sam is not None)
    # Images beyond `vision_ahead_mib` would stay in the schedule, which the estimate of a step does not know.
    if frozen and parallel.tensor * parallel.pipeline > 1 and images_ahead(ahead, images) == images:
        found.append("split_model")
    return [with_parallel(case, vision=name) for name in found]


def recomputations(case: Case, images: int, fixed: Collection[str]) -> list[Recomputation]:
    """Recomputation from least to most."""
    parallel, matters = case.parallel, images and "siglip" in case.trained
    kinds = [RECOMPUTE.index(parallel.recompute)] if "recompute" in fixed else range(len(RECOMPUTE))
    vision = (False, True) if matters and "recompute_vision" not in fixed else (parallel.recompute_vision,)
    return sorted(((kind, again) for kind in kinds for again in vision), key=lambda choice: (sum(choice), choice))


def with_parallel(case: Case, **fields: Any) -> Case:
    """`case` with other fields of its layout."""
    return dataclasses.replace(case, parallel=dataclasses.replace(case.parallel, **fields))
