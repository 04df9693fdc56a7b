"""Make a rank compute like a device that is a given number of times slower, so that several share a core unnoticed.

In: a factor. Out: a `StepClock` that, after each part of a step, sleeps until the part has taken that many times the
seconds for which its thread computed. With more ranks than cores, each is then at rest most of the time, and a step
takes as long as it would on as many devices: who waits for whom is that of a real run, and another load on the machine
is not seen as long as it leaves a core free now and then.

On the CPU torch runs the backward pass in the thread that asks for it, and gloo moves messages in threads of its own,
so the thread's clock has all that is computed and nothing that is waited for. It needs one torch thread per process.
Collectives inside a pass (those of a tensor group) take place before the sleep and vanish in it.
"""

from time import perf_counter, sleep, thread_time
from typing import NamedTuple

import torch

from megavl.training.step_clock import StepClock

PASSES = ("forward", "backward")
"""Parts that wait for nobody but the tensor group: they last `factor` times what they compute, waiting included.
Other parts, which wait for other ranks, are followed by a sleep that makes up for what they computed."""


class Pass(NamedTuple):
    """One forward or backward pass of a micro-batch."""

    backward: bool
    computed_s: float
    """Seconds for which the thread computed."""
    took_s: float
    """Seconds that passed, the sleep included."""


class DilatedClock(StepClock):
    """A clock that sleeps at the end of parts; parts within a part sleep with it."""

    def __init__(self, factor: float) -> None:
        """Start with nothing collected.

        Args:
            factor: times slower, at least 1.
        """
        super().__init__(torch.device("cpu"))
        self.factor = factor
        self.passes: list[Pass] = []
        """In the order in which they ran; to be emptied by the reader."""
        self._computing: list[tuple[str, float, float]] = []  # part, wall clock, thread's clock, outermost first

    def start(self, part: str) -> None:
        """The part begins here."""
        super().start(part)
        if part != "schedule":  # holds the passes and the waiting between them
            self._computing.append((part, perf_counter(), thread_time()))

    def stop(self, part: str) -> None:
        """The part that was begun last ends here, after a sleep."""
        if part != "schedule":
            _, began, thread_began = self._computing.pop()
            if not self._computing:
                self._rest(part, began, thread_time() - thread_began)
        super().stop(part)

    def _rest(self, part: str, began: float, computed: float) -> None:
        left = began + self.factor * computed - perf_counter() if part in PASSES else (self.factor - 1) * computed
        if left > 0:
            sleep(left)
        if part in PASSES:
            self.passes.append(Pass(part == "backward", computed, perf_counter() - began))
