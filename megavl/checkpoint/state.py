"""The state of a run as sharded tensors: the form in which megatron-core saves and loads under any layout.

In: this rank's model chunks, its optimizer, its random state. Out: dictionaries of `ShardedTensor`, each of which says
which part of which full tensor it is. Names are those of the whole model, so no layout shows in a checkpoint:
`decoder.layers.7...`, `optimizer.state.exp_avg.decoder.layers.7...`, `random_state`.

Chunks of one rank have equal local names, so they are kept apart as `m0`, `m1`, ...
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch import Tensor, nn

from megavl.parallel.groups import Groups

RANDOM_KEY = "random_state"
"""Name of the tensor that holds the random state of all ranks, uint8 [ranks, bytes]."""

_LENGTH_BYTES = 8
"""A row starts with the length of its content; the rest of it is padding."""


def state_metadata(groups: Groups) -> dict[str, Any]:
    """What megatron-core wants to be told when it describes model and optimizer.

    Layers are kept one tensor each (stacked ones cannot be saved when some are frozen), and the distributed optimizer
    in the shape of the parameters (its other formats cannot be saved here, or not be loaded under another layout).
    """
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.pg.dp_cp,
    }


def model_state(chunks: Sequence[nn.Module], groups: Groups) -> ShardedStateDict:
    """All parameters and buffers of this rank, frozen or not: `m<chunk>` -> name -> sharded tensor."""
    metadata = state_metadata(groups)
    return {f"m{i}": unwrap(c).sharded_state_dict(metadata=dict(metadata)) for i, c in enumerate(chunks)}


def load_model_state(chunks: Sequence[nn.Module], loaded: dict[str, Any]) -> None:
    """Put loaded tensors, in the form of `model_state`, into the chunks."""
    for index, chunk in enumerate(chunks):
        stage = unwrap(chunk)
        answer = stage.load_state_dict(loaded[f"m{index}"], strict=False)
        wrong = [name for name in (*answer.missing_keys, *answer.unexpected_keys) if not name.endswith("_extra_state")]
        assert not wrong, f"names that differ between checkpoint and stage: {wrong}"


def sharded_tensors(state: ShardedStateDict) -> list[ShardedTensor]:
    """Every sharded tensor in `state`, with composite parameters (gate and up projection) taken apart."""
    return [value for value in nested_values(load_preprocess(state)[0]) if isinstance(value, ShardedTensor)]


def random_state_tensor(state: dict[str, Any], groups: Groups) -> ShardedTensor:
    """This rank's random state as its row of one tensor.

    Args:
        state: tensors, numbers and strings, from `capture_random_state`.
        groups: this rank's groups; rows are as long as the longest rank's.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    longest = torch.tensor([len(content)])
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=groups.gloo_world)
    row = len(content).to_bytes(_LENGTH_BYTES, "little") + content.ljust(int(longest), b"\0")
    return _random_row(torch.frombuffer(bytearray(row), dtype=torch.uint8), groups)


def random_state_request(shape: tuple[int, ...], groups: Groups) -> ShardedTensor:
    """What to ask a checkpoint for whose random states have `shape` [ranks, bytes]; ranks must be ours."""
    return _random_row(torch.zeros(shape[1], dtype=torch.uint8), groups)


def read_random_state(row: Tensor) -> dict[str, Any]:
    """The random state from a loaded row; no pickled code is run."""
    content = row.cpu().numpy().tobytes()
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    return torch.load(io.BytesIO(content[_LENGTH_BYTES : _LENGTH_BYTES + length]), weights_only=True)


def layout_of(groups: Groups) -> dict[str, int]:
    """The layout as numbers; random states can be given back to ranks only where it is the same."""
    return {
        "ranks": groups.world_size,
        "tensor": groups.tensor_size,
        "pipeline": groups.pipeline_size,
        "virtual_pipeline": groups.virtual_size,
        "data": groups.data_size,
    }


def unwrap(chunk: nn.Module) -> Any:
    """The stage inside megatron-core's data-parallel wrapper, if there is one."""
    return getattr(chunk, "module", chunk)


def _random_row(row: Tensor, groups: Groups) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(RANDOM_KEY, row[None], (0, groups.rank, groups.world_size))
