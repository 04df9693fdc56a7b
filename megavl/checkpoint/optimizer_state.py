"""The optimizer's state as sharded tensors in the shape of the parameters, whatever kind of optimizer holds it.

In: megatron-core's optimizer and the sharded state of the model. Out: for each trained parameter `exp_avg`,
`exp_avg_sq` and, where it is not the parameter itself, the fp32 copy `param`, named
`optimizer.state.<kind>.<parameter>`. The plain and the distributed optimizer use the same names, so either loads what
the other saved.

What is not a tensor of a parameter is one number, Adam's step; learning rates, betas and weight decay come from the
recipe. So megatron-core's own `state_dict` and `load_state_dict` of the optimizers are passed by. With torch's Adam
they fail on a rank that trains nothing and on an optimizer that has not stepped yet, and they leave one shared `step`
tensor in all parameters, which then advances once per parameter (measured: loss off by 6% to 12% in three steps).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megavl.checkpoint.state import state_metadata
from megavl.parallel.groups import Groups

PREFIX = "optimizer.state."
"""Start of the names of optimizer tensors."""
MASTER_PREFIX = f"{PREFIX}param."
"""Start of the names of fp32 copies of parameters."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state(optimizer: Any, model: ShardedStateDict, groups: Groups, *, loading: bool) -> ShardedStateDict:
    """What to save of the optimizer, or what to load into it. All ranks call this.

    Args:
        optimizer: megatron-core's optimizer, plain or distributed; an optimizer that has not stepped counts as zeros.
        model: the model's sharded state, made of the parameters that the optimizer updates.
        groups: this rank's groups.
        loading: the result receives values; it then always has `param`.

    Returns:
        Part of the optimizer -> index of the parameter -> kind -> sharded tensor. Empty on a rank that trains nothing.
    """
    state: dict[str, Any] = {}
    for index, part in enumerate(_parts(optimizer)):
        _seed_moments(part)
        if isinstance(part, DistributedOptimizer):
            tensors = part.sharded_param_state_fully_reshardable(model, loading, state_metadata(groups))
        else:
            tensors = _plain_state(part, model, with_param=loading)
        if tensors:
            state[f"o{index}"] = tensors
    return state


def load_optimizer_state(optimizer: Any, loaded: dict[str, Any], step: int) -> None:
    """Put loaded tensors, in the form of `optimizer_state`, into the optimizer, and set Adam's step.

    Args:
        optimizer: the optimizer that `optimizer_state` was called with.
        loaded: the loaded tensors.
        step: updates that Adam has done.
    """
    for index, part in enumerate(_parts(optimizer)):
        tensors = loaded.get(f"o{index}", {})
        if isinstance(part, DistributedOptimizer):
            for state in part.optimizer.state.values():
                state.pop("step", None)  # not among the loaded tensors; megatron-core would look for it there
            part.load_parameter_state_from_fully_reshardable(tensors)
        else:
            _load_plain_state(part, tensors)
        _set_step(part.optimizer, step)


def adam_step(optimizer: Any, groups: Groups) -> int:
    """Updates that Adam has done: the same for every parameter; 0 if there is none yet. All ranks call this."""
    steps = {int(step) for part in _parts(optimizer) for step in _steps(part.optimizer)}
    found: list[set[int]] = [set()] * groups.world_size
    dist.all_gather_object(found, steps, group=groups.gloo_world)
    steps = set().union(*found)
    assert len(steps) <= 1, f"parameters differ in Adam's step: {sorted(steps)}"
    return steps.pop() if steps else 0


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers inside a chain that train something."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part is not None and not getattr(part, "is_stub_optimizer", False)]


def _seed_moments(part: Any) -> None:
    """Give parameters that were never updated the zeros that Adam starts from."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            for kind in _MOMENTS:
                if kind not in part.optimizer.state[parameter]:
                    part.optimizer.state[parameter][kind] = torch.zeros_like(parameter, dtype=torch.float32)
    _set_step(part.optimizer, None)


def _pairs(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter in the model, tensor that Adam updates) of a plain optimizer; the latter is a copy under bf16."""
    if not hasattr(part, "float16_groups"):
        yield from ((parameter, parameter) for group in part.optimizer.param_groups for parameter in group["params"])
        return
    for of_model, copies in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        yield from zip(of_model, copies, strict=True)
    yield from ((parameter, parameter) for group in part.fp32_from_fp32_groups for parameter in group)


def _plain_state(part: Any, model: ShardedStateDict, *, with_param: bool) -> dict[int, dict[str, Any]]:
    sharded = {id(s.data): s for s in nested_values(extract_sharded_tensors_and_factories(model)[0])}
    state: dict[int, dict[str, Any]] = {}
    for index, (parameter, updated) in enumerate(_pairs(part)):
        tensors = {kind: part.optimizer.state[updated][kind] for kind in _MOMENTS}
        if with_param or updated is not parameter:
            tensors["param"] = updated.detach()
        state[index] = {
            kind: make_sharded_optimizer_tensor(sharded[id(parameter)], tensor, PREFIX + kind)
            for kind, tensor in tensors.items()
        }
    return state


@torch.no_grad()
def _load_plain_state(part: Any, tensors: dict[int, dict[str, Tensor]]) -> None:
    for index, (_, updated) in enumerate(_pairs(part)):
        updated.copy_(tensors[index]["param"])
        for kind in _MOMENTS:
            part.optimizer.state[updated][kind].copy_(tensors[index][kind])


def _steps(adam: torch.optim.Optimizer) -> Iterator[Any]:
    """The steps that an Adam has noted: torch's with each parameter, fused ones of other libraries with each group."""
    for group in adam.param_groups:
        if group["params"] and "step" in group:
            yield group["step"]
        yield from (adam.state[p]["step"] for p in group["params"] if "step" in adam.state[p])


def _set_step(adam: torch.optim.Optimizer, step: int | None) -> None:
    """Note `step` where this Adam looks for it; None notes 0 where nothing is noted."""
    of_torch = isinstance(adam, torch.optim.Adam | torch.optim.AdamW)
    for group in adam.param_groups:
        if not of_torch:
            group["step"] = group.get("step", 0) if step is None else step
            continue
        on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            if step is None and "step" in adam.state[parameter]:
                continue
            # One tensor for each: Adam advances it in place.
            device = parameter.device if on_device else torch.device("cpu")
            adam.state[parameter]["step"] = torch.tensor(float(step or 0), dtype=torch.float32, device=device)
