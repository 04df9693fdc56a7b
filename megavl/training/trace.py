"""Where the time of one training step goes: a Chrome trace, and tables by operator and by module.

In: a recipe, whose model, layout and training stage are run on made-up batches, so no data is needed. Out: a `Trace`.
Times are those of the device where there is one, else of the CPU. The backward pass of a module is found through the
sequence numbers that autograd gives to the operators of the forward pass.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megavl.config import Recipe
from megavl.data.microbatch import StepBatch
from megavl.model.stage import Stage
from megavl.parallel.gradients import unwrap
from megavl.parallel.groups import Groups
from megavl.training.synthetic_batches import Case, global_batch, share
from megavl.training.synthetic_run import build_run

STAGE = "stage"
"""Name of a whole stage among the modules."""
_PREFIX = "module "
_BACKWARD = "autograd::engine::evaluate_function: "


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One step of one rank."""

    total_ms: float
    """Time of all operators; on a device the sum over its kernels."""
    operators: list[tuple[str, int, float]]
    """(name, calls, ms of the operator itself), longest first."""
    modules: list[tuple[str, int, float, float]]
    """(name with layer numbers as `*`, calls, forward ms, backward ms), in the order of the model. A module's
    time holds that of the modules inside it."""


def trace_step(recipe: Recipe, groups: Groups, path: Path, *, micro_batches: int = 2) -> Trace:
    """Profile one step after two that warm up; all ranks must call it.

    Args:
        recipe: model, layout, stage and type; rows have its length, or three images' where that is longer.
        groups: this rank's groups.
        path: where the Chrome trace goes (open it in chrome://tracing or Perfetto).
        micro_batches: of each data-parallel rank.
    """
    run = build_run(recipe, groups)
    batch = _batch(recipe, groups, micro_batches)
    on_device = groups.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    for _ in range(2):
        run.step(batch)
    with _module_ranges(unwrap(run.chunks)), profile(activities=activities) as profiler:
        run.step(batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return summarise(list(profiler.events() or ()), on_device=on_device)


def _batch(recipe: Recipe, groups: Groups, micro_batches: int) -> StepBatch:
    """This rank's made-up micro-batches: one, two or three images each, or text alone in stage 0."""
    model = recipe.model
    tokens = max(recipe.data.seq_length * recipe.stage.micro_batch, 3 * model.tokens_per_image + 8)
    tokens += -tokens % (2 * recipe.parallel.tensor)
    case: Case = "image" if recipe.stage.number else "text"
    batch = global_batch(model, case, micro_batches=micro_batches * groups.data_size, tokens=tokens)
    return StepBatch(step=0, language_rows=0, micro_batches=share(batch, groups.data_rank, groups.data_size))


@contextmanager
def _module_ranges(stages: Sequence[Stage]) -> Iterator[None]:
    """While open, each forward pass of a module is a range of the profile."""
    handles = []
    for stage in stages:
        for name, module in stage.named_modules():
            open_ranges: list[Any] = []

            def enter(*_: Any, name: str = name or STAGE, ranges: list[Any] = open_ranges) -> None:
                ranges.append(record_function(_PREFIX + name))
                ranges[-1].__enter__()

            def leave(*_: Any, ranges: list[Any] = open_ranges) -> None:
                ranges.pop().__exit__(None, None, None)

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    yield
    for handle in handles:
        handle.remove()


def summarise(events: Sequence[Any], *, on_device: bool) -> Trace:
    """Tables of a profile.

    Args:
        events: `profiler.events()`, recorded under `_module_ranges`.
        on_device: count device time instead of CPU time.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    own, whole = (
        ("self_device_time_total", "device_time_total") if on_device else ("self_cpu_time_total", "cpu_time_total")
    )
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in host:
        name = "(Python between operators)" if event.name.startswith(_PREFIX) else event.name
        times[name] += getattr(event, own) / 1e3
        calls[name] += 1
    forward: defaultdict[str, list[float]] = defaultdict(list)
    for event in host:
        if event.name.startswith(_PREFIX):
            forward[event.name.removeprefix(_PREFIX)].append(getattr(event, whole) / 1e3)
    backward = _backward_times(host, whole)
    rows: dict[str, list[float]] = {}
    for name, parts in forward.items():
        row = rows.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), [0, 0.0, 0.0])
        row[0] += len(parts)
        row[1] += sum(parts)
        row[2] += sum(ms for other, ms in backward.items() if name in (STAGE, other) or other.startswith(name + "."))
    return Trace(
        total_ms=sum(times.values()),
        operators=[(name, calls[name], ms) for name, ms in times.most_common()],
        modules=[(name, int(count), *passes) for name, (count, *passes) in rows.items()],  # type: ignore[misc]
    )


def _backward_times(host: Sequence[Any], whole: str) -> Counter[str]:
    """Innermost module -> ms of the gradients of its operators."""
    makers: dict[int, Any] = {}
    for event in host:
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD) and event.scope == 0:
            # Operators without a gradient show the number of the next that has one, which is the last to show it.
            makers[event.sequence_nr] = max(
                makers.get(event.sequence_nr, event), event, key=lambda e: e.time_range.start
            )
    found: Counter[str] = Counter()
    for event in host:
        if event.name.startswith(_BACKWARD) and event.sequence_nr in makers:
            parent = makers[event.sequence_nr]
            while parent is not None and not parent.name.startswith(_PREFIX):
                parent = parent.cpu_parent
            if parent is not None:
                found[parent.name.removeprefix(_PREFIX)] += getattr(event, whole) / 1e3
    return found


def operator_table(trace: Trace, rows: int = 25) -> str:
    """The longest operators as text."""
    lines = [f"{'operator':60} {'calls':>7} {'ms':>10} {'share':>6}"]
    for name, calls, ms in trace.operators[:rows]:
        lines.append(f"{name[:60]:60} {calls:7} {ms:10.3f} {ms / trace.total_ms:6.1%}")
    return "\n".join([*lines, f"{'all':60} {'':7} {trace.total_ms:10.3f}"])


def module_table(trace: Trace, least: float = 0.005) -> str:
    """Modules that take at least the share `least`, as text."""
    lines = [f"{'module':60} {'calls':>7} {'forward ms':>11} {'backward ms':>11} {'share':>6}"]
    inside = 0.0
    for name, calls, forward, backward in trace.modules:
        inside += (forward + backward) * (name == STAGE)
        portion = (forward + backward) / trace.total_ms
        if portion >= least:
            lines.append(f"{name[-60:]:60} {calls:7} {forward:11.3f} {backward:11.3f} {portion:6.1%}")
    rest = 1 - inside / trace.total_ms
    return "\n".join([*lines, f"{'(optimizer, reduction of gradients, schedule)':60} {'':31} {rest:6.1%}"])
