"""Logits of a model that is laid over tensor and pipeline ranks, for code that asks one model for them.

In: wrapped stages and a micro-batch that every rank of a model copy has alike. Out: the logits over the whole
vocabulary, [t, v], on every one of these ranks, so that greedy decoding takes the same way on all of them.
Shapes: t tokens of the micro-batch, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.nn import functional

from megavl.config import ParallelConfig
from megavl.data.microbatch import IGNORE, MicroBatch
from megavl.generate.decoding import Logits
from megavl.parallel.groups import Groups
from megavl.training.step import logits_only


def parallel_logits(chunks: Sequence[DistributedDataParallel], parallel: ParallelConfig, groups: Groups) -> Logits:
    """The model as a function; all ranks of a model copy must call it with the same micro-batch.

    Args:
        chunks: wrapped stages of this rank.
        parallel: the layout they were built for.
        groups: this rank's groups.
    """
    decoder = chunks[0].module.model.decoder
    multiple = parallel.tensor if parallel.sequence else 1

    @torch.no_grad()
    def logits(batch: MicroBatch) -> Tensor:
        padded = _padded(batch, multiple)
        if groups.is_last_stage:
            (part,) = logits_only(chunks, [padded], groups)
            parts = [torch.empty_like(part) for _ in range(groups.tensor_size)]
            dist.all_gather(parts, part.contiguous(), group=groups.pg.tp)
            whole = torch.cat(parts, dim=1)  # [t, v]
        else:
            logits_only(chunks, [padded], groups)
            dtype = chunks[0].module.config.params_dtype
            whole = torch.empty(padded.tokens.numel(), decoder.vocab, dtype=dtype, device=groups.device)
        dist.broadcast(whole, group=groups.pg.pp, group_src=groups.pipeline_size - 1)
        return whole[: batch.tokens.numel()]

    return logits


def _padded(batch: MicroBatch, multiple: int) -> MicroBatch:
    """The micro-batch with one more document of no meaning, where sequence parallelism cannot cut it evenly."""
    spare = -batch.tokens.numel() % multiple
    if not spare:
        return batch
    return replace(
        batch,
        tokens=functional.pad(batch.tokens, (0, spare)),
        labels=functional.pad(batch.labels, (0, spare), value=IGNORE),
        positions=torch.cat([batch.positions, torch.arange(spare)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + spare]),
        max_document=max(batch.max_document, spare),
    )
