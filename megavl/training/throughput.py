"""How fast a step was: rates, operations per second and their share of the peak, counted in three ways.

In: what a step held, and its time. Out: a `Throughput`, per rank.
Model operations are what the arithmetic of the model needs (`mfu`); those of the language model alone compare with
counters that know nothing of images (`llm_mfu`); hardware operations are what was carried out (`hfu`: padding,
recomputation, images encoded on several ranks).
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from megavl.config import ModelConfig, ParallelConfig
from megavl.training.flops import StepCounts, hardware_flops, step_flops


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
