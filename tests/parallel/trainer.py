"""What the ranks of tests hold to take single steps: stages, optimizer and groups, on made-up batches."""

from typing import Any

import torch
from layouts import MODEL
from torch import Tensor

from megavl.config import ParallelConfig
from megavl.data.microbatch import StepBatch
from megavl.model.build import build_stages
from megavl.model.shards import full_parameters
from megavl.parallel.gradients import synchronise_parameters, wrap_stages
from megavl.parallel.groups import Groups, init_groups
from megavl.parallel.random_state import seed_everything
from megavl.training.freeze import apply_freeze
from megavl.training.optimizer import make_optimizer
from megavl.training.reference_steps import PARITY_OPTIM
from megavl.training.step import StepResult, train_step
from megavl.training.synthetic_batches import Case, global_batch, share


class Trainer:
    """Stages, optimizer and groups of a worker, and a step of a made-up case."""

    def __init__(self, parallel: ParallelConfig, stage: int = 3, dtype: torch.dtype = torch.float32) -> None:
        self.groups: Groups = init_groups(parallel)
        seed_everything(1, self.groups)
        pg, device = self.groups.pg, self.groups.device
        self.stages = build_stages(MODEL, parallel, dtype=dtype, seed=1, pg=pg, device=device)
        apply_freeze(self.stages, stage)
        self.chunks = wrap_stages(self.stages, parallel, self.groups)
        self.optimizer = make_optimizer(self.chunks, PARITY_OPTIM, parallel, self.groups)

    def step(self, case: Case, micro_batches: int = 4, **options: Any) -> StepResult:
        whole = global_batch(MODEL, case, micro_batches=micro_batches)
        batch = share(whole, self.groups.data_rank, self.groups.data_size)
        step = StepBatch(step=0, language_rows=0, micro_batches=batch)
        result = train_step(self.chunks, self.optimizer, step, self.groups, **{"lr": 1e-2, **options})
        synchronise_parameters(self.chunks)
        return result

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, _, p in full_parameters(self.stages)}
