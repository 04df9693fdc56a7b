"""How fast a step was: rates, operations per second and their share of the peak, counted in three ways.

In: what a step held, and its time. Out: a `Throughput`, per rank.
Model operations are what the arithmetic of the model needs (`mfu`); those of the language model alone compare with
counters that know nothing of images (`llm_mfu`); hardware operations are what was carried out (`hfu`: padding,
recomputation, images encoded on several ranks).
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from megavl.config import ModelConfig, ParallelConfig, Recipe
from megavl.ops import choose
from megavl.training.flops import StepCounts, hardware_flops, step_flops
from megavl.training.rank_report import StepTotals
from megavl.training.step import StepResult


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of one step, or of a step of median time."""

    tokens_per_s: float
    """Tokens read, padding included, per second, all ranks together."""
    images_per_s: float
    """Images encoded (once per data-parallel copy) per second, all ranks together."""
    tflops: float
    """Model operations per second and rank, in 1e12."""
    llm_tflops: float
    """The same of the language model alone, with the head over every token."""
    hardware_tflops: float
    """Operations carried out per second and rank, in 1e12."""
    mfu: float | None
    """`tflops` over the device's peak, or None where that is not known; so with the next two."""
    llm_mfu: float | None
    """`llm_tflops` over the peak."""
    hfu: float | None
    """`hardware_tflops` over the peak."""


def head_skips_unlabelled(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the head computes the positions with a label alone, as the fused operator does, or all of them."""
    return choose(recipe.kernels, device, dtype)["linear_cross_entropy"].implementation == "triton"


def step_counts(result: StepResult, totals: StepTotals, *, head_skips: bool) -> tuple[StepCounts, StepCounts]:
    """What a step held, without padding and with it.

    Args:
        result: of the step.
        totals: of the same step.
        head_skips: from `head_skips_unlabelled`.
    """
    counts = StepCounts(
        images=result.images,
        tokens=totals.tokens,
        squared_lengths=totals.squared_lengths,
        logits=result.supervised_tokens if head_skips else totals.tokens,
    )
    padded = replace(counts, tokens=result.tokens, squared_lengths=totals.padded_squared_lengths)
    return counts, padded if head_skips else replace(padded, logits=result.tokens)


def throughput(
    model: ModelConfig,
    parallel: ParallelConfig,
    trained: Collection[str],
    *,
    counts: StepCounts,
    padded: StepCounts,
    seconds: float,
    ranks: int,
    peak: float | None,
) -> Throughput:
    """Rates of a step.

    Args:
        model: sizes.
        parallel: recomputation and vision placement.
        trained: names of the trained components.
        counts: what the step holds, padding excluded.
        padded: the same, padding included.
        seconds: its time.
        ranks: that shared the work.
        peak: operations per second of one device, where known.
    """
    terms = step_flops(model, trained, counts)
    # Counters to compare with have the head compute every token, whether it does or not.
    language = step_flops(model, trained, replace(counts, images=0, logits=counts.tokens))
    hardware = sum(hardware_flops(model, trained, padded, parallel).values())
    rates = [operations / seconds / ranks for operations in (sum(terms.values()), sum(language.values()), hardware)]
    shares = [None if peak is None else rate / peak for rate in rates]
    return Throughput(
        tokens_per_s=padded.tokens / seconds,
        images_per_s=counts.images / seconds,
        tflops=rates[0] / 1e12,
        llm_tflops=rates[1] / 1e12,
        hardware_tflops=rates[2] / 1e12,
        mfu=shares[0],
        llm_mfu=shares[1],
        hfu=shares[2],
    )
