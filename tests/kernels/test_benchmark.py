"""The profiler's arithmetic against plain formulas, its files, its gate. Times are made up: no GPU is needed."""

import dataclasses
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megavl.kernels import benchmark, records
from megavl.kernels.benchmark import Case, Ceilings, Timing
from megavl.kernels.gate import hold_to_reference

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=4e12, matmul=800e12)
ORIGIN = records.Origin(gpu="Some GPU 9000", date="2001-02-03", commit="abc1234+", torch="2.13.0", triton="3.9.0")


def make_case(**changes) -> Case:
    fields = {
        "op": "double",
        "name": "7b mb1",
        "direction": "forward",
        "make": lambda device, dtype: {},
        "flops": 16e9,
        "bytes": 8e6,
        "share_ms": "7b 30, 1.3b_hybrid 2.5",
    }
    return Case(**{**fields, **changes})  # type: ignore[arg-type]


def timing(p50: float, peak_mib: float = 10.0) -> Timing:
    return Timing(p20=0.9 * p50, p50=p50, p80=1.2 * p50, repeats=60, peak_mib=peak_mib)


def rows_of(case: Case, dtype: torch.dtype = torch.bfloat16, **p50: float) -> list[records.Row]:
    timings = {name: timing(value) for name, value in p50.items()}
    return records.make_rows(case, dtype, timings, CEILINGS, {"7b": 80e12, "1.3b_hybrid": 40e12}, ORIGIN)


def test_percentiles():
    times = [random.random() for _ in range(51)]
    ordered = sorted(times)
    assert benchmark.percentiles(times) == pytest.approx((ordered[10], statistics.median(times), ordered[40]))
    assert benchmark.percentiles([3.0, 1.0]) == pytest.approx((1.4, 2.0, 2.6))


@pytest.mark.parametrize(
    ("flops", "size", "dtype", "floor"),
    [
        (16e9, 8e6, torch.bfloat16, 0.02),  # 16 G / 800 T = 20 us, 8 M / 4 T = 2 us: arithmetic
        (0.0, 8e6, torch.bfloat16, 0.002),  # bytes
        (0.0, 8e6, torch.float32, 0.004),  # twice the bytes
        (1.6e9, 8e6, torch.float16, 0.002),  # exactly at the ridge
    ],
)
def test_floor(flops, size, dtype, floor):
    assert benchmark.floor_ms(make_case(flops=flops, bytes=size), dtype, CEILINGS) == pytest.approx(floor)


def test_rows_are_plain_arithmetic():
    ours, eager = rows_of(make_case(), triton=0.04, eager=0.1)
    assert (ours.percent_of_floor, eager.percent_of_floor) == pytest.approx((50, 20))
    assert ours.gb_per_s == pytest.approx(8e6 / 0.04e-3 / 1e9)
    assert ours.tflop_per_s == pytest.approx(400)
    assert ours.intensity == pytest.approx(2000)
    assert (ours.times_ours, eager.times_ours) == pytest.approx((1, 2.5))
    # a 7b micro-batch at the ceiling: 80 T / 800 T = 100 ms; 30 calls of 0.04 ms are 1.2% of it. 1.3b: 2.5 of 50 ms
    assert ours.step_share == "7b 1.2%, 1.3b_hybrid 0.2%"
    (alone,) = rows_of(make_case(), eager=0.1)
    assert alone.times_ours == 0


@pytest.mark.parametrize(("size", "sets"), [(1e6, 200), (49e6, 5), (50e6, 4), (199e6, 2), (200e6, 1), (1e12, 1)])
def test_inputs_exceed_the_cache_four_times(size, sets):
    assert benchmark.input_sets(size, cache=50e6) == sets
    assert sets * size >= 4 * 50e6


def test_unreadable_share_is_refused():
    assert benchmark.calls_per_step(make_case(share_ms="")) == {}
    with pytest.raises(ValueError, match="double 7b mb1: share_ms has 'many', which is not MODEL CALLS"):
        benchmark.calls_per_step(make_case(share_ms="7b 2, many"))


@pytest.mark.parametrize("op", benchmark.operators())
def test_cases_of_every_operator(op):
    cases = benchmark.cases(op)
    keys = [(case.name, case.direction) for case in cases]
    assert len(set(keys)) == len(keys)
    assert any(case.check for case in cases)
    for case in cases:
        assert case.op == op
        assert case.bytes > 0
        assert case.flops >= 0
        assert set(benchmark.calls_per_step(case)) <= {"1.3b", "1.3b_hybrid", "7b"}
        assert all(0 < calls < 1000 for calls in benchmark.calls_per_step(case).values())


@pytest.mark.parametrize("op", benchmark.operators())
def test_implementations_of_every_operator(op, device, monkeypatch):
    """Every case is made and every implementation called at its real shape, on tensors that have no memory."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda inner: inner))
    for case in benchmark.cases(op):
        with FakeTensorMode():
            calls = case.make(device, torch.float16)
            assert {benchmark.OURS, "eager"} <= set(calls)
            for call in calls.values():
                call()


def test_csv_round_trip(tmp_path):
    path = records.csv_path("NVIDIA H200 (x1)", tmp_path / "new")
    assert path.name == "nvidia_h200_x1.csv"
    first = rows_of(make_case(), triton=1 / 3, eager=0.1) + rows_of(make_case(direction="backward"), triton=2.0)
    assert records.write_rows(path, first) == first
    assert records.read_rows(path) == first
    again = rows_of(make_case(), triton=0.5)
    merged = records.write_rows(path, again)
    assert merged == records.read_rows(path)
    assert {row.key(): row.p50_ms for row in merged} == {
        ("double", "7b mb1", "forward", "bfloat16", "triton"): 0.5,
        ("double", "7b mb1", "forward", "bfloat16", "eager"): 0.1,
        ("double", "7b mb1", "backward", "bfloat16", "triton"): 2.0,
    }
    assert all(row.gpu == ORIGIN.gpu and row.commit == "abc1234+" for row in merged)


def test_every_row_says_where_it_was_measured():
    assert {f.name for f in dataclasses.fields(records.Origin)} <= {f.name for f in dataclasses.fields(records.Row)}


def test_measured_table_and_plot(tmp_path):
    rows = rows_of(make_case(), triton=0.04, eager=0.1) + rows_of(make_case(op="copy", flops=0.0), triton=0.003)
    lines = records.measured_table(rows).splitlines()
    assert sum(line.startswith(("| double", "| copy")) for line in lines) == 2
    assert "0.0360 / 0.0400 / 0.0480 | 200 | 400.0 | 50 | 10 | eager 2.50 (10) | 7b 1.2%" in lines[2]
    assert lines[-1].startswith("Some GPU 9000, 2001-02-03, commit abc1234+, torch 2.13.0, triton 3.9.0. Ceilings")
    records.plot_roofline(rows, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_table_goes_between_its_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- measured -->\nold\n<!-- end of measured -->\nafter\n")
    for _ in range(2):
        records.put_table("measured", "new", page)
    assert page.read_text() == "before\n<!-- measured -->\n\nnew\n\n<!-- end of measured -->\nafter\n"
    with pytest.raises(ValueError, match="has 0 lines <!-- other --> and 0 lines"):
        records.put_table("other", "new", page)


def test_compile_table_has_every_kept_row():
    assert records.compile_table().count("| sm_") == len(records.read_table())


def test_readme_has_both_places(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(records.README.read_text())
    for name in ("compiled", "measured"):
        records.put_table(name, "table", page)


def check_green(device: torch.device, dtype: torch.dtype) -> None:
    hold_to_reference(lambda x: x + x, lambda x: 2 * x, [torch.randn(5, device=device, dtype=dtype)])


def check_red(device: torch.device, dtype: torch.dtype) -> None:
    hold_to_reference(lambda x: 2.01 * x, lambda x: 2 * x, [torch.randn(5, device=device, dtype=dtype)])


def check_wrong_gradient(device: torch.device, dtype: torch.dtype) -> None:
    hold_to_reference(lambda x: x + x.detach(), lambda x: 2 * x, [torch.randn(5, device=device, dtype=dtype)])


def check_not_finite(device: torch.device, dtype: torch.dtype) -> None:
    hold_to_reference(lambda x: 2 * x + math.nan, lambda x: 2 * x, [torch.randn(5, device=device, dtype=dtype)])


def check_does_not_run(device: torch.device, dtype: torch.dtype) -> None:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        ((check_green, check_green), ""),
        ((check_green, None, check_red), "float32: AssertionError: output: relative error 5.00e-03"),
        ((check_wrong_gradient,), "float32: AssertionError: gradient of input 0: relative error 5.00e-01"),
        ((check_not_finite,), "float32: AssertionError: output: not finite"),
        ((check_does_not_run,), "float32: RuntimeError: no such instruction"),
        ((None,), "none of its cases has a check"),
    ],
    ids=["green", "output", "gradient", "nan", "raises", "no check"],
)
def test_gate(checks, reason, monkeypatch):
    monkeypatch.setattr(benchmark, "cases", lambda op: [make_case(check=check) for check in checks])
    outcome = benchmark.gate("double", CPU, (torch.float32, torch.float16))
    assert outcome.startswith(reason) if reason else outcome == ""


def test_backward_calls():
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    call = benchmark.backward_of(torch.mul, [x, y])
    first, second = call()[0], call()[0]
    assert torch.equal(first, second)  # the graph is kept
    assert first.shape == x.shape
    assert x.grad is None


class FakeDevice:
    """A device whose clock and memory move with each call, in place of `torch.cuda`."""

    def __init__(self):
        self.clock, self.memory, self.highest = 0.0, 1000 * 2**20, 0

    def work(self, ms: float, mib: int) -> None:
        self.clock += ms
        self.highest = max(self.highest, self.memory + mib * 2**20)

    def install(self, monkeypatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = device.clock

            def elapsed_time(self, end):
                return end.time - self.time

        for name, value in {
            "Event": Event,
            "synchronize": lambda: None,
            "_sleep": lambda cycles: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda: self.memory,
            "max_memory_allocated": lambda: self.highest,
            "reset_peak_memory_stats": lambda: setattr(self, "highest", self.memory),
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=60_000_000),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_calls_walk_over_sets_of_inputs(monkeypatch):
    device, made, order = FakeDevice(), [], []
    device.install(monkeypatch)

    def make(_device, dtype):
        number = len(made)
        made.append(dtype)

        def ours():
            order.append(number)
            device.work(ms=1.0 + number, mib=7)

        def broken():
            raise RuntimeError("CUDA out of memory\nmore")

        return {"triton": ours, "broken": broken, "unwanted": lambda: device.work(9.0, 9)}

    case = make_case(make=make, bytes=80e6)
    timings = benchmark.time_case(case, CPU, torch.bfloat16, peers=("broken",), repeats=60)
    assert made == [torch.bfloat16] * 3  # 240 MB
    assert order[-60:] == [0, 1, 2] * 20
    found = timings["triton"]
    assert (found.p20, found.p50, found.p80, found.repeats, found.peak_mib) == (1.0, 2.0, 3.0, 60, 7.0)
    assert timings["broken"] == "RuntimeError: CUDA out of memory"
    assert set(timings) == {"triton", "broken"}


def test_a_case_that_cannot_be_made_is_reported(monkeypatch):
    FakeDevice().install(monkeypatch)

    def make(device, dtype):
        raise MemoryError("too large")

    assert benchmark.time_case(make_case(make=make), CPU, torch.float32) == {"triton": "MemoryError: too large"}


def test_ceilings(monkeypatch):
    """Bytes of a copy count twice; a product of n x n matrices has 2 n^3 operations."""
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.empty(size, device="meta"))
    monkeypatch.setattr(benchmark, "_time_calls", lambda calls, repeats: timing(0.5))
    ceilings = benchmark.measure_ceilings(CPU, torch.bfloat16)
    assert ceilings.copy == pytest.approx(2 * 4 * 2**28 / 0.5e-3)
    assert ceilings.matmul == pytest.approx(2 * 8192**3 / 0.5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="times on a GPU")
def test_copy_is_timed_near_the_ceiling():
    device, dtype = torch.device("cuda"), torch.bfloat16
    ceilings = benchmark.measure_ceilings(device, dtype)

    def make(device, dtype):
        source = torch.randn(2**26, device=device).to(dtype)
        return {"triton": source.clone, "broken": lambda: source @ source[1:]}

    case = make_case(make=make, flops=0.0, bytes=2.0**28)
    timings = benchmark.time_case(case, device, dtype)
    assert isinstance(timings["broken"], str)
    found = timings["triton"]
    assert isinstance(found, Timing)
    assert found.p20 <= found.p50 <= found.p80
    assert found.peak_mib == pytest.approx(128, rel=0.1)
    assert 0.5 < benchmark.floor_ms(case, dtype, ceilings) / found.p50 < 1.2
