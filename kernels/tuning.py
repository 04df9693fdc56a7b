"""Measure other launch configurations on this device, and keep those that are faster. Asked for explicitly, never else.

In: the `tries` of an operator's variants. Out: entries of `results/configurations.json`. A configuration is compiled
first (one that spills or needs too much shared memory is not tried), then held to the reference, then timed in the
benchmark case that the variant names; a variant stays with its default unless another is faster by `MARGIN`.
"""

from collections.abc import Iterator

import torch

from megavl.kernels.ahead_of_time import SHARED_LIMIT, Variant, compile_variant, problems, variants
from megavl.kernels.benchmark import OURS, Case, Timing, cases, gate, time_case
from megavl.kernels.configurations import Configuration, trying, write_entry

MARGIN = 0.97
"""Median over that of the default below which a configuration is kept: less is within the noise of two runs."""


def tune(op: str, device: torch.device, repeats: int = 60) -> Iterator[str]:
    """Try the configurations of an operator in bf16 and keep the fastest; yields a line for each.

    Raises:
        ValueError: a device for which nothing can be compiled ahead of time.
    """
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    if capability not in SHARED_LIMIT:
        raise ValueError(f"--tune: the device is sm_{capability}; supported are {', '.join(map(str, SHARED_LIMIT))}")
    for variant in variants(op):
        if not variant.tries:
            continue
        case = _case_of(variant)
        default = _median(variant, {}, case, device, repeats)
        yield f"{op}/{variant.name}: default {default:.4f} ms"
        best: tuple[float, Configuration] = (MARGIN * default, {})
        for tried in variant.tries:
            refused = _refusal(variant, tried, capability, device)
            if refused:
                yield f"{op}/{variant.name}: {tried} refused: {refused}"
                continue
            median = _median(variant, tried, case, device, repeats)
            yield f"{op}/{variant.name}: {tried} {median:.4f} ms"
            best = min(best, (median, tried), key=lambda pair: pair[0])
        if best[1]:
            name = torch.cuda.get_device_name(device)
            write_entry(name, capability, f"{op}/{variant.name}", best[1])
            yield f"{op}/{variant.name}: {best[1]} kept for {name}"


def _case_of(variant: Variant) -> Case:
    """The first case in which the variant runs."""
    name, direction = variant.measured_by
    return next(case for case in cases(variant.op) if name in case.name and case.direction == direction)


def _kernel(variant: Variant) -> str:
    """What `configuration` calls the kernel: the variant's name without the shape."""
    words = variant.name.split()
    return " ".join(words[:3]) if words[1:2] == ["parity"] else words[0]


def _refusal(variant: Variant, tried: Configuration, capability: int, device: torch.device) -> str:
    """Why a configuration must not be timed, or nothing."""
    changed = variant.with_configuration(tried)
    found = next(problems(changed, compile_variant(changed, capability), {}), "")
    if found:
        return found
    with trying(variant.op, _kernel(variant), tried):
        return gate(variant.op, device, (torch.bfloat16,))


def _median(variant: Variant, tried: Configuration, case: Case, device: torch.device, repeats: int) -> float:
    """Milliseconds of our implementation; infinite where it does not run."""
    with trying(variant.op, _kernel(variant), tried):
        timing = time_case(case, device, torch.bfloat16, (), repeats)[OURS]
    return timing.p50 if isinstance(timing, Timing) else float("inf")
