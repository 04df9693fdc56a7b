"""Which slice of which full tensor a parameter of a stage is.

In: stages under any layout. Out: layout-free ("full") names and shapes, and the way from a full tensor to a slice.
Full names are those of the whole model on one rank: `first_stage...`, `decoder.layers.N...` with N counted over the
whole model from 0, `decoder.final_layernorm.weight`, `last_stage.head.weight`. Initial values, tests and converters
speak of parameters by these names.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from megavl.model.stage import Stage

_SHARDED_DIM = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
"""The dimension that each parallel layer cuts over the tensor group."""


def mark_shards(stage: Stage) -> None:
    """Write on each parameter how it is cut, where megatron-core's optimizer looks for it.

    megatron-core does this while it initialises weights, which we do ourselves. `linear_fc1` holds gate and up
    projections one above the other, and each is cut on its own: stride 2.
    """
    for name, module in stage.named_modules():
        dim = next((dim for kind, dim in _SHARDED_DIM.items() if isinstance(module, kind)), None)
        if dim is not None:
            stride = 2 if name.endswith("linear_fc1") else 1
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=stride)
    for parameter in stage.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


def full_name(stage: Stage, name: str) -> str:
    """The name that a stage's parameter has in the whole model: local layer numbers become global ones."""
    layers = "decoder.layers."
    if not name.startswith(layers):
        return name
    index, rest = name.removeprefix(layers).split(".", 1)
    return f"{layers}{stage.decoder.layers[int(index)].layer_number - 1}.{rest}"


def full_parameters(stages: Sequence[Stage]) -> Iterator[tuple[str, Stage, torch.nn.Parameter]]:
    """(full name, stage, local parameter) of every parameter of this rank."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            yield full_name(stage, name), stage, parameter


def full_shape(stage: Stage, parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Shape of the parameter on one rank."""
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[parameter.partition_dim] *= stage.tp_group.size()  # type: ignore[attr-defined]
    return tuple(shape)


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether the tensor group shares this parameter (otherwise each of its ranks has a whole copy)."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def take_shard(full: Tensor, stage: Stage, parameter: torch.nn.Parameter) -> Tensor:
    """This rank's slice of `full`, in the shape of `parameter`."""
    if not is_sharded(parameter):
        return full
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    size, rank = stage.tp_group.size(), stage.tp_group.rank()
    return torch.cat([part.chunk(size, dim)[rank] for part in full.chunk(stride, dim)], dim)


def join_shards(shards: Sequence[Tensor], parameter: torch.nn.Parameter) -> Tensor:
    """The full tensor from the slices of all tensor ranks in order; the inverse of `take_shard`."""
    if not is_sharded(parameter):
        return shards[0]
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    parts = [shard.chunk(stride, dim) for shard in shards]
    return torch.cat([parts[rank][part] for part in range(stride) for rank in range(len(shards))], dim)


@torch.no_grad()
def load_full_state(stages: Sequence[Stage], tensors: Mapping[str, Tensor]) -> None:
    """Fill every parameter of this rank from full tensors; names of other ranks' parameters are passed over.

    Args:
        stages: the chunks of this rank.
        tensors: full tensors by full name; each is read once, so the mapping may load them on demand.

    Raises:
        ValueError: a parameter has no tensor, or one of another shape.
    """
    for name, stage, parameter in full_parameters(stages):
        if name not in tensors:
            raise ValueError(f"no tensor for parameter {name}")
        full, expected = tensors[name], full_shape(stage, parameter)
        if tuple(full.shape) != expected:
            raise ValueError(f"{name}: tensor of shape {tuple(full.shape)}, the model has {expected}")
        parameter.copy_(take_shard(full, stage, parameter))
