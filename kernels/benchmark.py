"""What an operator's bench.py describes, and how it is timed: gate first, then percentiles, roofline, memory, peers.

In: the `cases()` of each operator. Out: one `Row` per case and implementation (`megavl.kernels.records` keeps them).
A case is timed only if its operator's gate is green in the type that is timed. Command: tools/profile_kernels.py.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

KERNELS = Path(__file__).parent
OURS = "triton"
"""Name of the project's own kernel among a case's implementations."""

Call = Callable[[], object]
"""One run of one implementation on inputs that it already holds."""
Direction = Literal["forward", "backward", "forward+backward"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one shape in one direction."""

    op: str
    """Folder of the operator."""
    name: str
    """Model, sizes and micro-batch, such as `7b mb8 rows 32768 h4096`; `--shape` looks for parts of it."""
    direction: Direction
    """What a call computes; `backward` alone runs over a graph that `make` has built (`backward_of`)."""
    make: Callable[[torch.device, torch.dtype], dict[str, Call]]
    """Fresh random inputs -> one call per implementation: `triton`, `eager`, `compile`, ...; what is not installed is
    absent. Called several times, so that timing walks over inputs which together exceed the cache."""
    flops: float
    """Floating-point operations that the result needs, those of matrix products alone."""
    bytes: float
    """Device memory traffic in a 16-bit type with each input read once and each output written once; doubled for
    fp32."""
    check: Callable[[torch.device, torch.dtype], None] | None = None
    """The gate: the operator against its reference at a small shape (`megavl.kernels.gate.hold_to_reference`); raises
    AssertionError. Cases of an operator share it. None: another case of the operator has it."""
    share_ms: str = ""
    """How often this call runs in one micro-batch of 4,096 tokens with 4 images, `MODEL CALLS` separated by commas:
    `7b 61`, or `7b 7.625` where the case holds eight micro-batches. Empty: no part of a step."""


def operators() -> list[str]:
    """Folders that hold a bench.py."""
    return sorted(path.parent.name for path in KERNELS.glob("*/bench.py"))


def cases(op: str) -> list[Case]:
    """The cases of an operator."""
    return importlib.import_module(f"megavl.kernels.{op}.bench").cases()


def backward_of(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    """The backward pass of `function` alone, as a call; `inputs` that need a gradient require one.

    The graph is built here and kept, so a function that overwrites what it saved cannot be timed like this.
    """
    leaves = [x for x in inputs if x.requires_grad]
    output = function(*inputs)
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this device reached in this run; floors are relative to it, not to a data sheet."""

    copy: float
    """Bytes per second of a large device-to-device copy, read plus written."""
    matmul: float
    """Floating-point operations per second of a large matrix product on random data, in the type that is timed."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one implementation of one case, in milliseconds, and the memory that a call takes."""

    p20: float
    p50: float
    p80: float
    repeats: int
    peak_mib: float
    """Largest amount of device memory held during a call beyond what was held before."""


def gate(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """Run the checks of an operator.

    Returns:
        Why the operator must not be timed, or empty.
    """
    checks = list(dict.fromkeys(case.check for case in cases(op) if case.check is not None))
    if not checks:
        return "none of its cases has a check"
    for check in checks:
        for dtype in dtypes:
            try:
                check(device, dtype)
            except Exception as error:  # an assertion, or a kernel that does not run
                return f"{str(dtype).removeprefix('torch.')}: {type(error).__name__}: {error}"
    return ""


def time_case(
    case: Case, device: torch.device, dtype: torch.dtype, peers: tuple[str, ...] | None = None, repeats: int = 60
) -> dict[str, Timing | str]:
    """Time every implementation of a case on a CUDA device.

    Calls walk over as many sets of inputs as exceed the cache four times, so that no call finds its inputs there.

    Args:
        case: what is timed; its gate must have been green.
        device: a CUDA device.
        dtype: type of the inputs.
        peers: implementations beside our own; None: all.
        repeats: timed calls.

    Returns:
        Timing by implementation; a sentence instead where it could not run (under our own name if the case could not be
        made).
    """
    torch.compiler.reset()  # else torch.compile would turn to sizes left open, or give up, after a few cases
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    timings: dict[str, Timing | str] = {}
    try:
        sets = [case.make(device, dtype) for _ in range(input_sets(case_bytes(case, dtype), cache))]
    except Exception as error:
        return {OURS: _sentence(error)}
    for name in sets[0]:
        if name != OURS and peers is not None and name not in peers:
            continue
        try:
            timings[name] = _time_calls([calls[name] for calls in sets], repeats)
        except Exception as error:  # a peer that refuses a shape or runs out of memory leaves the others to be timed
            timings[name] = _sentence(error)
            torch.cuda.empty_cache()
    return timings


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def input_sets(size: float, cache: float, times: int = 4) -> int:
    """How many sets of `size` bytes exceed `times` caches; 1 where one does."""
    return max(1, -int(-times * cache // size))


def _time_calls(calls: list[Call], repeats: int) -> Timing:
    """Events around each call, all of them in flight before the first is read."""
    for call in calls:  # compilation, tuning, workspaces
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls:
        call()
    queueing = (time.perf_counter() - begin) / len(calls)  # seconds of host time a call, or more
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calls[0]()
    peak = torch.cuda.max_memory_allocated() - held
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    # The device spins, about a second at most, while the host queues: else a short kernel is timed at the host's pace.
    torch.cuda._sleep(int(2e9 * min(1.0, 1.5 * repeats * queueing)))
    for index, (start, end) in enumerate(pairs):
        start.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in pairs]
    p20, p50, p80 = percentiles(times)
    return Timing(p20=p20, p50=p50, p80=p80, repeats=repeats, peak_mib=peak / 2**20)


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, linear between neighbours."""
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return p20, p50, p80


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy 1 GiB and multiply 8192 x 8192 random matrices on a CUDA device; fp32 products in IEEE fp32."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    copy = _time_calls([lambda: target.copy_(source)], 50).p50
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    product = _time_calls([lambda: torch.mm(a, b)], 50).p50
    return Ceilings(copy=2 * source.nbytes / copy * 1e3, matmul=2 * 8192**3 / product * 1e3)


def case_bytes(case: Case, dtype: torch.dtype) -> float:
    """Traffic of a case in `dtype`; cases state it for 16-bit types."""
    return case.bytes * dtype.itemsize / 2


def floor_ms(case: Case, dtype: torch.dtype, ceilings: Ceilings) -> float:
    """The roofline: no implementation takes less than its arithmetic or its traffic needs, whichever is longer."""
    return 1e3 * max(case.flops / ceilings.matmul, case_bytes(case, dtype) / ceilings.copy)


def calls_per_step(case: Case) -> dict[str, float]:
    """Model -> how often the case's call runs in one micro-batch (`Case.share_ms`).

    Raises:
        ValueError: the field is not of the form `MODEL CALLS, MODEL CALLS`.
    """
    found = {}
    for part in filter(None, (part.strip() for part in case.share_ms.split(","))):
        model, _, calls = part.partition(" ")
        try:
            found[model] = float(calls)
        except ValueError:
            raise ValueError(f"{case.op} {case.name}: share_ms has {part!r}, which is not MODEL CALLS") from None
    return found
