"""AdamW over this rank's parameters: megatron-core's optimizer, its learning rates, clipping, and the update.

In: wrapped stages and the optimizer section of the recipe. Out: an optimizer, and `update`, which measures the gradient
of each component, clips by the global norm and steps, or refuses when that norm is not finite. With bf16 parameters it
keeps fp32 master weights; gradients are fp32 in either case. `distributed_optimizer` shards its state over
data-parallel ranks.

Weight decay leaves biases and other one-dimensional tensors alone (megatron-core's rule). Each component has parameter
groups of its own: SigLIP's learning rate may differ, and may be changed in a resumed run.

Adam's momentum on zero gradients: where a step leaves a trained tower without images its gradient is zero, not absent,
and the update is Adam's own: both moments decay, and what is left of the first still moves the weights. So a text-only
step in stage 3 moves SigLIP, by about beta1 / sqrt(beta2) = 0.92 of the step before. That is megatron-core's behaviour
in every layout and it is kept: holding the weights still would make the result depend on how samples fall into steps.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate, ParamWithNamePredicate
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch.nn.utils import get_total_norm

from megavl.config import OptimConfig, ParallelConfig
from megavl.model.stage import Stage
from megavl.parallel.groups import Groups
from megavl.training.freeze import COMPONENTS

_NOT_DECAYED = ParamKey(name="*.bias", predicate=ParamPredicate(name="vector", fn=lambda p: len(p.shape) == 1))


def make_optimizer(
    chunks: Sequence[DistributedDataParallel], optim: OptimConfig, parallel: ParallelConfig, groups: Groups
) -> ChainedOptimizer:
    """Build the optimizer of this rank; all ranks must call it, those that train nothing too.

    Args:
        chunks: wrapped stages.
        optim: AdamW's settings. Learning rates are set by each update.
        parallel: whether the state is sharded over data-parallel ranks.
        groups: this rank's groups.

    Returns:
        The optimizer. What megatron-core's own `state_dict` lacks is made up for in `checkpoint/optimizer_state.py`.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip,
        bf16=any(p.dtype is torch.bfloat16 for chunk in chunks for p in chunk.parameters()),
        params_dtype=next((p.dtype for chunk in chunks for p in chunk.parameters()), torch.float32),
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    overrides = {_NOT_DECAYED: {"wd_mult": 0.0}, **{_parameters_of(c): {"component": c} for c in COMPONENTS}}
    optimizer = get_megatron_optimizer(
        config, list(chunks), config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups.pg
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    return optimizer


def _parameters_of(component: str) -> ParamKey:
    """What tells megatron-core the parameters of a component."""
    named = ParamWithNamePredicate(name=component, fn=lambda _, name: Stage.component_of(name) == component)
    return ParamKey(with_name_predicate=named)


def set_learning_rate(optimizer: ChainedOptimizer, lr: float, vision_lr: float | None = None) -> None:
    """Set the learning rate of the next update.

    Args:
        optimizer: from `make_optimizer`.
        lr: of everything but SigLIP.
        vision_lr: of SigLIP; None: the same.
    """
    for group in optimizer.param_groups:
        group["lr"] = vision_lr if vision_lr is not None and group["component"] == "siglip" else lr


@torch.no_grad()
def update(optimizer: ChainedOptimizer, device: torch.device, *, allowed: bool) -> tuple[float, dict[str, float], bool]:
    """Clip the gradients by their global norm and step, unless that norm is not finite.

    The norms are reduced over all ranks that hold part of the model, so they decide alike.

    Args:
        optimizer: from `make_optimizer`, with finalized gradients in the wrapped stages' buffers.
        device: where the gradients are.
        allowed: False: compute the norms only; must be the same on all ranks.

    Returns:
        The norm before clipping, the norm by trained component, and whether the parameters were updated.
    """
    optimizer.prepare_grads()
    norms = _gradient_norms(optimizer, device)
    grad_norm = math.hypot(*norms.values())
    if not (allowed and math.isfinite(grad_norm)):
        return grad_norm, norms, False
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm, norms, True


def _gradient_norms(optimizer: ChainedOptimizer, device: torch.device) -> dict[str, float]:
    """Norm of the gradient of each component that some rank trains, the same on all ranks.

    megatron-core's `get_grad_norm`, which sees one list of gradients, with a list for each component: every parameter
    or shard once, and still one reduction and one wait for the device.
    """
    trained = {group["component"] for group in optimizer.param_groups}  # megatron-core aligns groups over all ranks
    squares = {name: torch.zeros((), dtype=torch.float64, device=device) for name in COMPONENTS if name in trained}
    for part in optimizer.chained_optimizers:
        for group in part.param_groups:
            counted = [
                parameter.grad
                for parameter in group["params"]
                if parameter.grad is not None
                and param_is_not_shared(parameter)
                and param_is_not_tensor_parallel_duplicate(parameter, part.tp_group)
            ]
            if counted:
                squares[group["component"]] += get_total_norm(counted).double().square()
    if not squares:
        return {}
    summed = torch.stack(list(squares.values()))
    dist.all_reduce(summed, group=optimizer.get_grad_stats_parallel_group())
    return dict(zip(squares, summed.sqrt().tolist(), strict=True))
