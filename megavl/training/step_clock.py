"""How long each part of a step takes on this rank, without waiting for the device.

In: marks around the parts; megatron-core's schedules set most of them, through `config.timers`. Out: seconds by part.
On CUDA a mark is an event in the current stream, read when the device has passed it, so nothing is waited for: what
the device has not finished when a step is reported is counted with the next one. On the CPU a mark is a clock reading.
A pair of marks costs 3 microseconds there (100,000 pairs, busy 2-core machine, Python 3.11); a step has three pairs per
micro-batch and a few more.

Parts are exclusive: time inside an inner part does not count in the outer one. So `schedule` is what is left of the
pipeline schedule when forward, backward and vision are taken out: waiting for neighbours, and sending. Collectives of
the tensor group lie inside `forward` and `backward`; reduction that overlaps with the backward pass does too. Frozen
towers that run ahead have a stream of their own on CUDA: their time counts as `vision` of the step in which they run,
beside parts that run meanwhile, so that there the parts may sum up to more than the step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from resource import RUSAGE_SELF, getrusage
from time import perf_counter
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

PARTS = ("vision", "forward", "backward", "schedule", "reduction", "optimizer")
"""`forward` and `backward` are those of micro-batches, `vision` the forward pass of towers and adaptor and the wait for
features of other ranks, `reduction` the end of the step's reductions of gradients, `optimizer` the gradient norm and
the update."""

_OF_MEGATRON = {"forward-compute": "forward", "backward-compute": "backward", "forward-backward": "schedule"}
"""megatron-core's names; its others (messages between stages, parts of the reduction) are left inside the parts."""


class StepClock:
    """Collects the parts of a step. Stands where megatron-core expects its own timers, which wait for the device."""

    def __init__(self, device: torch.device) -> None:
        """Start with nothing collected; see `attach`."""
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._open: list[tuple[str, Any]] = []
        self._closed: list[tuple[str, str, Any, Any]] = []  # part, part around it, start, end
        self._spare: list[torch.cuda.Event] = []

    def attach(self, chunks: Sequence[DistributedDataParallel]) -> None:
        """Have megatron-core, the reduction of gradients and the vision modules set their marks.

        Args:
            chunks: wrapped stages of this rank, which share one configuration.
        """
        config = chunks[0].module.config
        config.timers = self
        config.finalize_model_grads_func = self._timed(config.finalize_model_grads_func, "reduction")
        for chunk in chunks:
            first = chunk.module.first_stage
            for module in (first.towers, first.adaptor) if first is not None else ():
                module.register_forward_pre_hook(lambda *_: self.start("vision"))
                module.register_forward_hook(lambda *_: self.stop("vision"))

    def __call__(self, name: str, log_level: int = 0) -> "_Mark":
        """megatron-core's way to ask for a timer."""
        return _Mark(self, _OF_MEGATRON.get(name, ""))

    def start(self, part: str) -> None:
        """The part begins here."""
        self._open.append((part, self._now()))

    def stop(self, part: str) -> None:
        """The part that was begun last ends here."""
        opened, start = self._open.pop()
        assert opened == part, f"{part} ends inside {opened}"
        around = self._open[-1][0] if self._open else ""
        self._closed.append((part, around, start, self._now()))

    @contextmanager
    def part(self, name: str, *, beside: bool = False) -> Iterator[None]:
        """Mark a block; `beside`: on CUDA it runs on another stream than the part around, and is not inside that."""
        if beside and self._on_cuda:
            start = self._now()
            yield
            self._closed.append((name, "", start, self._now()))
            return
        self.start(name)
        yield
        self.stop(name)

    def read(self) -> dict[str, float]:
        """Seconds of every part since the last reading, as far as the device has come."""
        seconds = dict.fromkeys(PARTS, 0.0)
        done = 0
        for part, around, start, end in self._closed:
            if self._on_cuda and not end.query():
                break
            took = start.elapsed_time(end) / 1e3 if self._on_cuda else end - start
            seconds[part] += took
            if around:
                seconds[around] -= took
            if self._on_cuda:
                self._spare += [start, end]
            done += 1
        del self._closed[:done]
        return seconds

    def peak_memory(self) -> float:
        """Most bytes in use: by tensors on the device since the last call; of the process so far on the CPU."""
        if not self._on_cuda:
            return getrusage(RUSAGE_SELF).ru_maxrss * 1024.0
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return float(peak)

    def _now(self) -> Any:
        if not self._on_cuda:
            return perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed_function(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return timed_function


class _Mark:
    """What megatron-core calls a timer."""

    def __init__(self, clock: StepClock, part: str) -> None:
        self._clock, self._part = clock, part

    def start(self, barrier: bool = False) -> None:
        """Begin; never with a barrier."""
        if self._part:
            self._clock.start(self._part)

    def stop(self, barrier: bool = False) -> None:
        """End."""
        if self._part:
            self._clock.stop(self._part)


def timed(
    chunks: Sequence[DistributedDataParallel], part: str, *, beside: bool = False
) -> AbstractContextManager[None]:
    """Mark a block on the clock that is attached to `chunks`, if one is; see `StepClock.part`."""
    clock = chunks[0].module.config.timers
    return clock.part(part, beside=beside) if isinstance(clock, StepClock) else nullcontext()
