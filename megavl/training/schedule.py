"""Learning rate of a step in closed form: nothing is stored, so a resumed run needs only its step number.

In: the optimizer section of the recipe, the number of steps, a step. Out: the learning rate of that step's update.

Steps count from 0 to `steps - 1`. With W warm-up steps, step t < W has (t+1)/(W+1) of the peak: the first update is
already larger than zero (a rate of 0 would waste a global batch) and step W is the first with the full peak. Then

- cosine: (t-W)/(steps-W) of the way from the peak to `final * peak`, which step `steps` would reach;
- multistep: the peak, 31.6% of it once 80% of all steps (warm-up included) are done, 10% once 90% are (DeepSeek-LLM);
- constant: the peak.
"""

import math

from megavl.config import OptimConfig

AFTER_80_PERCENT = 0.316
"""Second level of the multi-step schedule: sqrt(0.1), as DeepSeek-LLM rounds it."""
AFTER_90_PERCENT = 0.1
"""Third level of the multi-step schedule."""


def learning_rate(optim: OptimConfig, steps: int, step: int, peak: float | None = None) -> float:
    """The learning rate of one update.

    Args:
        optim: peak, schedule, warm-up and floor.
        steps: optimizer steps of the whole run.
        step: the update, from 0.
        peak: another peak on the same curve (SigLIP's own rate); None: `optim.lr`.
    """
    return (optim.lr if peak is None else peak) * schedule_factor(optim, steps, step)


def schedule_factor(optim: OptimConfig, steps: int, step: int) -> float:
    """The learning rate of a step as a fraction of the peak."""
    warmup = optim.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "multistep":
        # Whole numbers: 0.9 * steps in floating point would move a milestone by one step for some run lengths.
        if 10 * step >= 9 * steps:
            return AFTER_90_PERCENT
        return AFTER_80_PERCENT if 10 * step >= 8 * steps else 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return optim.final + (1.0 - optim.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
