"""A pipeline without what real ones have besides: the closed form of its step, and links that cost nothing."""

import dataclasses
import math
from collections.abc import Sequence

from megavl.planning.hardware import Hardware


def closed_form(stage_seconds: Sequence[float], micro_batches: int) -> float:
    """Seconds of a 1F1B step of equal micro-batches: sum(t) + (m - 1) * max(t), t forward and backward of a stage."""
    return sum(stage_seconds) + (micro_batches - 1) * max(stage_seconds)


def ideal_links(hardware: Hardware) -> Hardware:
    """The same machine with communication that costs nothing."""
    return dataclasses.replace(hardware, fast_link=math.inf, slow_link=math.inf, latency_s=0.0)
