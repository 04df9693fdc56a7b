"""Which gradients are summed over which ranks, and when.

In: the stages of this rank with `requires_grad` set. Out: the same stages in megatron-core's data-parallel wrapper.

The rules, each written here once:

- **Data-parallel copies**: summed, in the wrapper's buffers; `finalize_model_grads` then divides by the supervised
  tokens of the global batch (no mean of means).
- **Towers and adaptor over the tensor group**: averaged, under every `parallel.vision`. With `replicate` every tensor
  rank encodes every image, and the sequence-parallel cut behind them gathers in its backward pass, so each rank has the
  *full* gradient already: the average changes no value and keeps copies from drifting. With `split_tensor` and
  `split_model` each rank has the gradient of its images only, tensor-size times too large (the gather of features sums
  equal full gradients in its backward pass): the average is the sum of the parts. Marking such a parameter
  `sequence_parallel` would sum it (tensor-size times too large); marking it `tensor_model_parallel` would count it
  twice in the norm.
- **Norms of the decoder over the tensor group**: under sequence parallelism each rank saw a part of the tokens: summed
  (the mark `sequence_parallel`, set by `model/norm.py`). Without it they are full and equal.

Overlapped reduction launches a bucket when its last gradient is there, which is not the same order on a rank whose last
micro-batch had images and on one whose had none; nor would overlapped gathering be. So both follow a fixed order here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megavl.config import ParallelConfig
from megavl.model.stage import Stage
from megavl.parallel.groups import Groups
from megavl.parallel.vision_placement import place_vision

REPLICATED_COMPONENTS = ("sam", "sam_adaptor", "siglip", "aligner")
"""Parts of which every tensor rank of the first stage holds a whole copy."""


def wrap_stages(
    stages: Sequence[Stage], parallel: ParallelConfig, groups: Groups, *, bucket_size: int | None = None
) -> list[DistributedDataParallel]:
    """Wrap this rank's stages for data parallelism and tell megatron-core's schedules how to use the wrappers.

    The first stage is told which images are its own, as that decides what its gradients are.

    Args:
        stages: one per virtual chunk, frozen as the training stage asks.
        parallel: overlap and distributed optimizer.
        groups: this rank's groups.
        bucket_size: parameters per bucket of overlapped reduction; None: megatron-core's choice (40 million at least).

    Returns:
        The wrapped stages.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather,  # gathers start in `start_parameter_gather`, not in hooks
        bucket_size=bucket_size,
    )
    place_vision(stages, parallel, groups)
    chunks = []
    for index, stage in enumerate(stages):
        _mark_replicated(stage)
        chunk = DistributedDataParallel(
            stage.config,
            config,
            stage,
            disable_bucketing=index > 0,  # later chunks: their reduction is not on the critical path
            pg_collection=groups.pg,
        )
        if parallel.overlap_grad_reduce:
            _reduce_in_order(chunk)
        chunks.append(chunk)
    shared = stages[0].config  # all chunks of a rank share it
    shared.finalize_model_grads_func = finalize_model_grads
    no_sync = [chunk.no_sync for chunk in chunks]
    shared.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return chunks


def _mark_replicated(stage: Stage) -> None:
    """Ask megatron-core to average the gradients of replicated parameters over the tensor group."""
    for name, parameter in stage.named_parameters():
        if stage.component_of(name) in REPLICATED_COMPONENTS:
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]


def _reduce_in_order(chunk: DistributedDataParallel) -> None:
    """Hold back each bucket group's reduction until those before it were launched.

    Bucket groups lie in reverse order of registration, about the order of the backward pass, so waiting is rare. A
    collective that one data-parallel rank launches earlier than another pairs up with the wrong bucket.
    """
    launches: list[Callable[..., None]] = [group.start_grad_sync for group in chunk.bucket_groups]
    waiting: dict[int, dict[str, Any]] = {}
    launched = 0

    def launch(index: int, **kwargs: Any) -> None:
        nonlocal launched
        waiting[index] = kwargs
        while launched in waiting:
            launches[launched](**waiting.pop(launched))
            launched = (launched + 1) % len(launches)  # after the last one the next step begins

    for index, group in enumerate(chunk.bucket_groups):
        group.start_grad_sync = lambda index=index, **kwargs: launch(index, **kwargs)


def start_parameter_gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Under `overlap_param_gather`: start collecting updated parameters, if not done since the last update.

    To be called by all ranks before any forward pass. The order is that of the forward pass, on every rank; modules
    wait for their own bucket only.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            for group in reversed(chunk.bucket_groups):
                if not group.param_gather_dispatched:
                    group.start_param_sync()


def finish_parameter_gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Wait for buckets that no forward pass asked for (towers of a step without images)."""
    for chunk in chunks:
        for group in chunk.bucket_groups:
            if group.param_gather_handle is not None:
                group.param_gather_handle.wait()
                group.param_gather_handle = None


def synchronise_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Make the modules' parameters current on every rank, before they are saved or read.

    Under `overlap_param_gather` they are one update old until the next forward pass. All ranks must call this.
    """
    start_parameter_gather(chunks)
    finish_parameter_gather(chunks)


@contextmanager
def before_reduction(chunks: Sequence[DistributedDataParallel], action: Callable[[], None]) -> Iterator[None]:
    """While open, `action` is called when a step has launched this rank's last backward pass.

    What follows in the step, finishing the reductions and the update, makes the host wait for the device.
    """
    config = chunks[0].module.config
    finalize = config.finalize_model_grads_func

    def act_and_finalize(*args: Any, **kwargs: Any) -> None:
        action()
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = act_and_finalize
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def zero_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Clear the gradient buffers before a step, and `.grad`, where the plain optimizer puts a view of them."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.grad = None  # otherwise the backward pass adds to it, and the wrapper adds it to the buffer again


def unwrap(chunks: Sequence[DistributedDataParallel]) -> list[Stage]:
    """The stages inside the wrappers."""
    return [chunk.module for chunk in chunks]


def replicas_differ(stages: Sequence[Stage], group: torch.distributed.ProcessGroup) -> list[str]:
    """Names of parameters that should be equal on all ranks of `group` and are not, bit for bit.

    Args:
        stages: this rank's stages.
        group: the tensor group; all of its ranks must call this.
    """
    different = []
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                continue
            mine: Tensor = parameter.detach().clone()
            torch.distributed.broadcast(mine, group_src=0, group=group)
            equal = torch.tensor([int(torch.equal(mine, parameter.detach()))], device=parameter.device)
            torch.distributed.all_reduce(equal, op=torch.distributed.ReduceOp.MIN, group=group)
            if not equal.item():
                different.append(name)
    return different
