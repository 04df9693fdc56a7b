"""What the ranks of the conversion tests run: real stages, asked what the converter knows from names alone."""

from pathlib import Path

import torch
from torch import Tensor

from megavl.checkpoint.convert.rank_layout import Cut, Slab, cut_of, local_shape, rank_layout, slabs
from megavl.checkpoint.reader import load_model
from megavl.config import ModelConfig, ParallelConfig
from megavl.data.microbatch import MicroBatch
from megavl.generate.parallel_logits import parallel_logits
from megavl.model.build import build_stages
from megavl.model.shards import full_name, full_shape, is_sharded, take_shard
from megavl.parallel.gradients import wrap_stages
from megavl.parallel.groups import init_groups
from megavl.parallel.random_state import seed_everything

Facts = tuple[int, str, Cut | None, tuple[int, ...], list[int]]
"""Place, local name, cut, local shape, and where each value of this rank's part lies in the full tensor."""


def compare_layout(model: ModelConfig, parallel: ParallelConfig) -> tuple[dict[str, Facts], dict[str, Facts]]:
    """What this rank's stages say of their parameters, and what the converter's tables say; by full name."""
    groups = init_groups(parallel)
    stages = build_stages(model, parallel, dtype=torch.float32, seed=1, pg=groups.pg, device=groups.device)
    layout = rank_layout(model, parallel)
    built: dict[str, Facts] = {}
    table: dict[str, Facts] = {}
    for place, stage in zip(layout.places_of(groups.pg.pp.rank()), stages, strict=True):
        for local, parameter in stage.named_parameters():
            name, shape = full_name(stage, local), full_shape(stage, parameter)
            marks = Cut(parameter.partition_dim, parameter.partition_stride) if is_sharded(parameter) else None
            values = torch.arange(torch.Size(shape).numel()).view(shape)
            mine = take_shard(values, stage, parameter)
            built[name] = (place, local, marks, tuple(parameter.shape), mine.flatten().tolist())
            cut, size, rank = cut_of(name), groups.tensor_size, groups.pg.tp.rank()
            part = take_slabs(values, slabs(shape, cut, size, rank))
            table[name] = (*layout.place_of(name), cut, local_shape(shape, cut, size), part.flatten().tolist())
    return built, table


def take_slabs(values: Tensor, rows: list[Slab]) -> Tensor:
    """The slabs one below the other."""
    values = values if values.dim() else values[None]
    parts = [values[slab.first : slab.stop] for slab in rows]
    return torch.cat([p[:, s.columns] if s.columns else p for p, s in zip(parts, rows, strict=True)])


def converted_logits(model: ModelConfig, parallel: ParallelConfig, folder: str, batch: MicroBatch) -> Tensor:
    """Logits [t, v] of a micro-batch with the weights of a checkpoint, under a layout."""
    groups = init_groups(parallel)
    seed_everything(9, groups)
    stages = build_stages(model, parallel, dtype=torch.float32, seed=9, pg=groups.pg, device=groups.device)
    chunks = wrap_stages(stages, parallel, groups)
    load_model(Path(folder), chunks, groups)
    return parallel_logits(chunks, parallel, groups)(batch.to(groups.device)).cpu()
