"""Run megatron-core's real pipeline schedule with stages that only wait, and time it: a check of `simulate.py`.

In: seconds of every stage for every micro-batch, the groups of a started world. Out: seconds of the step as it ran,
with real messages between real processes. Stages sleep instead of computing, so ranks do not compete for the cores of
a small machine, and what is measured is the schedule alone.
Shapes: m micro-batches, s stages, t tokens, h hidden.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megavl.config import ModelConfig, ParallelConfig
from megavl.model.build import transformer_config
from megavl.parallel.groups import Groups

TOKENS = 64
"""Of a message; small, so that only the waiting counts."""

LAYOUTS: tuple[tuple[int, int, str], ...] = (
    (4, 1, "8,8,7,7"),
    (4, 1, "8,8,8,6"),
    (4, 1, "6,9,9,6"),
    (2, 1, "15,15"),
    (2, 1, "16,14"),
    (4, 2, "4,4,4,4,4,4,4,2"),
)
"""(pipeline, chunks per rank, layers per stage) that are checked, 30 layers each."""
KINDS: dict[str, tuple[float, ...]] = {"text": (0.0,), "image": (2.2,), "mixed": (0.0, 3.9, 1.7)}
"""Vision of successive micro-batches, in layers."""

Seconds = list[list[float]]
"""[m][s]."""


def example_seconds(layout: str, kind: str, *, unit_s: float, micro_batches: int = 8) -> tuple[Seconds, Seconds]:
    """Forward and backward seconds of a made-up model: equal layers, a head worth two, vision on the first stage.

    Args:
        layout: decoder layers per stage.
        kind: of `KINDS`.
        unit_s: seconds of one layer, forward and backward.
        micro_batches: m.
    """
    layers = [int(count) for count in layout.split(",")]
    layers[-1] += 2
    forward = [[unit_s * n / 3 for n in layers] for _ in range(micro_batches)]
    for number, row in enumerate(forward):
        row[0] += unit_s * KINDS[kind][number % len(KINDS[kind])]
    return forward, [[unit_s * 2 * n / 3 for n in layers] for _ in range(micro_batches)]


def emulate_step(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: Groups,
) -> float:
    """Seconds of one step on the slowest rank; all ranks must call it.

    Args:
        forward: [m][s] seconds of the forward pass of a micro-batch on a stage.
        backward: [m][s] seconds of its backward pass.
        model: sizes; only the width of the messages and the number of layers are used.
        parallel: layout that `groups` was formed for.
        groups: this rank's groups.
    """
    config = transformer_config(model, parallel, dtype=torch.float32, device=groups.device)
    stages = parallel.pipeline * parallel.virtual_pipeline
    chunks = []
    for chunk in range(parallel.virtual_pipeline):
        stage = chunk * parallel.pipeline + groups.pipeline_rank
        seconds = [(f[stage], b[stage]) for f, b in zip(forward, backward, strict=True)]
        last = stage == stages - 1
        chunks.append(_WaitingStage(config, seconds, chunk, first=stage == 0, last=last).to(groups.device))
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    schedule = get_forward_backward_func(pp_size=parallel.pipeline, vp_size=virtual)
    dist.barrier(groups.gloo_world)
    start = time.perf_counter()
    schedule(
        forward_step_func=_forward_step,
        data_iterator=[iter(range(len(forward))) for _ in chunks],
        model=chunks,
        num_microbatches=len(forward),
        seq_length=TOKENS,
        micro_batch_size=1,
        p2p_communicator=P2PCommunicator(pp_group=groups.pg.pp, config=config),
        pg_collection=groups.pg,
    )
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=groups.gloo_world)
    return float(taken)


def _forward_step(micro_batches: Iterator[int], chunk: "_WaitingStage") -> tuple[Tensor, Any]:
    return chunk(next(micro_batches)), _loss


def _loss(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the schedule wants it: a sum, the number of tokens, a report."""
    total = hidden.sum()
    return total, torch.tensor(1, dtype=torch.int), total.detach()


class _WaitingStage(torch.nn.Module):
    """A stage that sleeps as long as it would compute."""

    def __init__(
        self, config: Any, seconds: Sequence[tuple[float, float]], chunk: int, *, first: bool, last: bool
    ) -> None:
        """Takes (forward, backward) seconds of each micro-batch, and what megatron-core's schedules look for."""
        super().__init__()
        self.config, self.seconds, self.vp_stage = config, seconds, chunk
        self.pre_process, self.post_process = first, last
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.input: Tensor | None = None
        self.start = torch.nn.Parameter(torch.zeros(TOKENS, 1, config.hidden_size))  # what the first stage begins with

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the hidden states of the previous stage from the schedule."""
        self.input = input_tensor[0]

    def forward(self, micro_batch: int) -> Tensor:
        """Hidden states [t, 1, h], later."""
        before = self.start if self.pre_process or self.input is None else self.input
        return _Wait.apply(before, *self.seconds[micro_batch])


class _Wait(torch.autograd.Function):
    """Identity that takes its time in both directions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.seconds = backward_s
        time.sleep(forward_s)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradients[0], None, None
