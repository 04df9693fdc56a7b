"""Process groups of a run: who is next to whom in the tensor, pipeline and data grid, and on which device.

In: the recipe's `ParallelConfig` and the environment of `torchrun` (or none: one process). Out: `Groups`, which is
handed to everything else. This is the only file that reads megatron-core's `parallel_state`: two places inside
megatron-core (the vocabulary-parallel loss and sequence-parallel linear layers) read that global whatever one hands
them, so it is initialised here, once, and the same groups are passed on as a `ProcessGroupCollection`.

The grid: rank = tensor_rank + tensor_size * (data_rank + data_size * pipeline_rank).
"""

import gc
import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megavl.config import ParallelConfig
from megavl.parallel.cpu_mode import enter_cpu_mode

_FIELDS = (
    *("tp", "pp", "dp", "cp", "ep", "mp", "tp_cp", "dp_cp", "intra_dp_cp", "tp_dp_cp", "embd", "pos_embd"),
    *("expt_dp", "intra_expt_dp", "expt_tp", "tp_ep", "tp_ep_pp", "intra_dist_opt"),
)
"""Groups that some part of megatron-core asks a collection for (facts: the optimizer and checkpoints ask for most)."""
_small_messages: list[ProcessGroup] = []
"""The gloo groups beside NCCL's, to be destroyed with them."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's place in the grid and the groups it belongs to."""

    device: torch.device
    """Where tensors of this rank live."""
    backend: str
    """`nccl` or `gloo`."""
    world_size: int
    """Ranks of the run."""
    rank: int
    """This rank, from 0."""
    tensor_size: int
    """Ranks that share each layer."""
    tensor_rank: int
    """Place among them."""
    pipeline_size: int
    """Ranks that share the depth of the model."""
    pipeline_rank: int
    """Place among them; 0 owns the vision towers."""
    data_size: int
    """Copies of the model."""
    data_rank: int
    """Which copy this rank is part of."""
    virtual_size: int
    """Model chunks on this rank."""
    pg: ProcessGroupCollection
    """The groups, as megatron-core wants them handed in."""
    gloo_world: ProcessGroup
    """All ranks, for small messages of CPU tensors and Python objects."""
    gloo_model: ProcessGroup
    """The tensor and pipeline ranks of this copy of the model, for the same."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first stage (towers, adaptor, embedding) in one of its chunks."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last stage (head, loss) in one of its chunks."""
        return self.pipeline_rank == self.pipeline_size - 1

    def describe(self) -> str:
        """One line for the start of the log."""
        virtual = f" x {self.virtual_size} chunks" if self.virtual_size > 1 else ""
        return (
            f"{self.world_size} ranks on {self.device.type} ({self.backend}): "
            f"tensor {self.tensor_size}, pipeline {self.pipeline_size}{virtual}, data {self.data_size}"
        )


def init_groups(parallel: ParallelConfig) -> Groups:
    """Join the run and form its groups.

    `torch.distributed` is initialised from the environment that `torchrun` sets; without one this is a run of one
    process; a process group that exists already is used as it is. All ranks must call this.

    Args:
        parallel: layout; the data-parallel size is world_size / (tensor * pipeline).

    Returns:
        This rank's groups.

    Raises:
        ValueError: the world does not divide by tensor * pipeline, or the device asked for is not there.
    """
    device = _choose_device(parallel.device)
    timeout = timedelta(seconds=parallel.timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        _join_world(backend, timeout)
    world_size, model_size = dist.get_world_size(), parallel.tensor * parallel.pipeline
    if world_size % model_size:
        raise ValueError(
            f"parallel: {world_size} ranks do not divide by tensor * pipeline = "
            f"{parallel.tensor} * {parallel.pipeline} = {model_size}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=parallel.timeout_s / 60,  # type: ignore[arg-type]
        create_gloo_process_groups=False,
    )
    groups = _collect(parallel, device, backend, timeout)
    if groups.rank == 0:
        logging.getLogger(__name__).info(groups.describe())
    return groups


def destroy_groups(*, leave_world: bool = True) -> None:
    """Take the groups down, after which `init_groups` may form another layout. All ranks call it.

    megatron-core forgets its groups without destroying them, and a gloo group's threads, which wake 100 times a second,
    end with the last reference to it: 50 threads a layout that wrappers and optimizers, which refer to each other, keep
    until they are collected.

    Args:
        leave_world: also leave `torch.distributed`; a world made from torchrun's environment can be joined once only.
    """
    formed = [*(parallel_state._global_process_group_list or ()), *_small_messages]
    parallel_state.destroy_model_parallel()
    _small_messages.clear()
    for group in formed:
        if group is not None:  # None: the world
            dist.destroy_process_group(group)
    if leave_world and dist.is_initialized():
        dist.destroy_process_group()
    formed.clear()
    gc.collect()


def _choose_device(wish: str) -> torch.device:
    """The device of this rank; entering CPU mode where that is the CPU."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise ValueError("parallel.device is `cuda`, but torch finds no CUDA device; use `cpu` or `auto`")
    if wish == "cpu" or not torch.cuda.is_available():
        enter_cpu_mode()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no CUDA device: this machine has {torch.cuda.device_count()}; "
            "start fewer processes per node or set parallel.device to `cpu`"
        )
    torch.cuda.set_device(local_rank)
    # fp32 is fp32: unless told, cuDNN rounds what it multiplies to TF32 (by 5e-4; layouts are held to 1e-5).
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", local_rank)


def _join_world(backend: str, timeout: timedelta) -> None:
    """Initialise `torch.distributed` from torchrun's environment, or alone.

    Without `device_id`, which would have NCCL connect every group at once: megatron-core forms 2,593 of them over 512
    ranks (tensor 2, pipeline 4), all ranks would take part in each, and unbatched messages, as interleaved stages send
    them, would wait for each other on the one communicator of their group.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _collect(parallel: ParallelConfig, device: torch.device, backend: str, timeout: timedelta) -> Groups:
    """Read the groups that `parallel_state` formed into a `Groups`."""
    pg = ProcessGroupCollection.use_mpu_process_groups(list(_FIELDS))
    gloo_world, gloo_model = dist.group.WORLD, pg.mp
    if backend != "gloo":  # small CPU messages must not go through NCCL
        gloo_world = dist.new_group(backend="gloo", timeout=timeout)
        gloo_model = _gloo_model_group(parallel, timeout)
        _small_messages.extend(group for group in (gloo_world, gloo_model) if group is not None)
    assert gloo_world is not None
    assert gloo_model is not None
    return Groups(
        device=device,
        backend=backend,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor_size=pg.tp.size(),
        tensor_rank=pg.tp.rank(),
        pipeline_size=pg.pp.size(),
        pipeline_rank=pg.pp.rank(),
        data_size=pg.dp.size(),
        data_rank=pg.dp.rank(),
        virtual_size=parallel.virtual_pipeline,
        pg=pg,
        gloo_world=gloo_world,
        gloo_model=gloo_model,
    )


def _gloo_model_group(parallel: ParallelConfig, timeout: timedelta) -> ProcessGroup | None:
    """The gloo group of this rank's copy of the model; every rank takes part in forming every copy's group."""
    grid = torch.arange(dist.get_world_size()).view(parallel.pipeline, -1, parallel.tensor)  # [pipeline, data, tensor]
    own = None
    for data_rank in range(grid.shape[1]):
        ranks = grid[:, data_rank].flatten().tolist()
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    return own
