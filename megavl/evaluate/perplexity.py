"""Perplexity of a held-out source under the model as it stands.

In: the wrapped stages of a run and a validation source. Out: loss per supervised token in nats, its exponential, and
how many tokens that is, the same on every rank and, but for the order of summation, under every layout.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megavl.config import Recipe, SourceConfig
from megavl.data.loader import validation_batches
from megavl.data.microbatch import IGNORE
from megavl.data.tokenizer import Tokenizer
from megavl.parallel.groups import Groups
from megavl.training.step import forward_only


def held_out_perplexities(
    chunks: Sequence[DistributedDataParallel], recipe: Recipe, tokenizer: Tokenizer, groups: Groups
) -> dict[str, dict[str, float]]:
    """`held_out_perplexity` of every validation source, by its name; all ranks must call it."""
    sources = recipe.data.validation
    return {source.name: held_out_perplexity(chunks, recipe, tokenizer, source, groups) for source in sources}


def held_out_perplexity(
    chunks: Sequence[DistributedDataParallel],
    recipe: Recipe,
    tokenizer: Tokenizer,
    source: SourceConfig,
    groups: Groups,
) -> dict[str, float]:
    """Score the first `logging.validation_rows` rows of a source; all ranks must call it.

    Args:
        chunks: wrapped stages of this rank.
        recipe: the run.
        tokenizer: of the run.
        source: one of `recipe.data.validation`.
        groups: this rank's groups.

    Returns:
        `loss` (mean over supervised tokens, nats), `ppl`, `tokens` (supervised).

    Raises:
        ValueError: the source cannot be read.
    """
    batches = validation_batches(
        recipe,
        tokenizer,
        source,
        dp_rank=groups.data_rank,
        dp_size=groups.data_size,
        first_stage=groups.is_first_stage,
        length_multiple=length_multiple(recipe),
        equal_lengths=groups.pipeline_size > 1,
    )
    sums = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    for batch in batches:
        losses = forward_only(chunks, batch.micro_batches, groups)
        if groups.is_last_stage and groups.tensor_rank == 0:  # one rank per data-parallel copy counts
            sums[0] += sum(float(loss.double().sum()) for loss in losses)
            sums[1] += sum(int((m.labels != IGNORE).sum()) for m in batch.micro_batches)
    dist.all_reduce(sums, group=groups.gloo_world)
    total, tokens = sums.tolist()
    mean = total / tokens if tokens else math.nan
    return {"loss": mean, "ppl": math.exp(min(mean, 700.0)) if tokens else math.nan, "tokens": tokens}


def length_multiple(recipe: Recipe) -> int:
    """Tokens of a micro-batch must be a multiple of this: sequence parallelism cuts them over the tensor group."""
    return recipe.parallel.tensor if recipe.parallel.sequence else 1
