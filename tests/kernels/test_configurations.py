"""Launch configurations: the table counts on its device alone; tuning keeps what is faster and nothing wrong."""

import json
from types import SimpleNamespace

import pytest
import torch

from megavl.kernels import ahead_of_time, benchmark, configurations, tuning
from megavl.kernels.ahead_of_time import variants
from megavl.kernels.benchmark import Timing
from megavl.kernels.configurations import configuration, trying
from megavl.kernels.swiglu.op import swiglu
from megavl.kernels.swiglu.reference import swiglu_reference
from tests.kernels.compare import hold_to_reference

DEFAULT = {"BLOCK": 1024, "num_warps": 4}
GPU = torch.device("cuda")


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of our own, on a made-up GPU."""
    path = tmp_path / "configurations.json"
    path.write_text(json.dumps({"H0": {"capability": 90, "configurations": {"swiglu/forward any f": {"BLOCK": 512}}}}))
    monkeypatch.setattr(configurations, "TABLE", path)
    monkeypatch.setattr(configurations, "_device_name", lambda device: "H0")
    configurations.entries.cache_clear()
    yield path
    configurations.entries.cache_clear()


def chosen(device: torch.device, dtype: torch.dtype, shape: str = "any f") -> dict[str, int]:
    return configuration("swiglu", "forward", shape, DEFAULT, SimpleNamespace(device=device, dtype=dtype))


@pytest.mark.usefixtures("table")
def test_the_entry_of_this_device_and_shape_else_the_default(monkeypatch):
    assert chosen(GPU, torch.bfloat16) == {"BLOCK": 512, "num_warps": 4}
    assert chosen(GPU, torch.bfloat16, "f7") == DEFAULT
    assert chosen(GPU, torch.float32) == DEFAULT
    assert chosen(torch.device("cpu"), torch.bfloat16) == DEFAULT
    monkeypatch.setattr(configurations, "_device_name", lambda device: "another")
    assert chosen(GPU, torch.bfloat16) == DEFAULT


def test_values_stay_right_with_other_blocks(device):
    with trying("swiglu", "forward", {"BLOCK": 32}), trying("swiglu", "backward", {"BLOCK": 64}):
        hold_to_reference(swiglu, swiglu_reference, [torch.randn(3, 2 * 97, device=device)])
    assert chosen(torch.device("cpu"), torch.float32) == DEFAULT


@pytest.mark.parametrize("op", [op for op in ahead_of_time.operators() if any(v.tries for v in variants(op))])
def test_operators_ask_for_what_can_be_tuned(op, device, monkeypatch):
    asked = set()

    def recording(name: str, kernel: str, shape: str, default: dict[str, int], tensor: torch.Tensor) -> dict[str, int]:
        asked.add((name, kernel))
        return configuration(name, kernel, shape, default, tensor)

    monkeypatch.setattr(f"megavl.kernels.{op}.op.configuration", recording)
    assert benchmark.gate(op, device, (torch.float32,)) == ""
    assert {(op, tuning._kernel(variant)) for variant in variants(op) if variant.tries} <= asked


@pytest.mark.parametrize("op", ahead_of_time.operators())
def test_what_is_tried_can_be_compiled_and_timed(op):
    """Options exist, and each variant has its case."""
    for variant in variants(op):
        for tried in variant.tries:
            assert variant.with_configuration(tried) != variant
        if variant.tries:
            assert tuning._case_of(variant).op == op


def test_every_entry_is_compiled(table):
    (variant,) = [v for v in ahead_of_time.shipped("swiglu") if " on " in v.name]
    assert (variant.name, variant.capabilities, variant.constants) == ("forward any f on H0", (90,), {"BLOCK": 512})
    table.write_text(json.dumps({"H0": {"capability": 90, "configurations": {"swiglu/forward any f": {"BLOK": 1}}}}))
    with pytest.raises(AssertionError, match="swiglu/forward any f has no option BLOK"):
        ahead_of_time.shipped("swiglu")


def test_tuning_keeps_the_fastest_that_is_right(table, monkeypatch):
    """512 spills, 2048 is wrong, 4096 is faster; backward has nothing beyond the noise."""
    times = {"{}": 1.0, str({"BLOCK": 4096, "num_warps": 8}): 0.8, str({"BLOCK": 2048, "num_warps": 8}): 0.9}

    def time_case(case, device, dtype, peers, repeats):
        tried = configurations._trials[("swiglu", case.direction)]
        p50 = times.get(str(tried), 2.0) if case.direction == "forward" else 1.0
        return {"triton": Timing(p20=p50, p50=p50, p80=p50, repeats=repeats, peak_mib=0.0)}

    spills = SimpleNamespace(spill_bytes=8)

    def gate(op, device, dtypes):
        assert dtypes == (torch.bfloat16,)  # what is timed is what is held to the reference
        return "wrong" if 2048 in [tried["BLOCK"] for tried in configurations._trials.values()] else ""

    monkeypatch.setattr(tuning, "compile_variant", lambda variant, _: spills if variant.num_warps == 4 else None)
    monkeypatch.setattr(tuning, "problems", lambda variant, row, kept: iter(["spills"] if row else []))
    monkeypatch.setattr(tuning, "gate", gate)
    monkeypatch.setattr(tuning, "time_case", time_case)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H0")
    lines = list(tuning.tune("swiglu", GPU))
    kept = json.loads(table.read_text())["H0"]["configurations"]
    assert kept == {"swiglu/forward any f": {"BLOCK": 4096, "num_warps": 8}}
    assert "swiglu/forward any f: {'BLOCK': 2048, 'num_warps': 8} refused: wrong" in lines
    assert "swiglu/forward any f: {'BLOCK': 512} refused: spills" in lines
    assert not configurations._trials


def test_tuning_needs_a_device_that_is_compiled_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ValueError, match="--tune: the device is sm_89; supported are 80, 90"):
        next(tuning.tune("swiglu", GPU))


def test_the_kept_table_names_known_variants():
    for device, entry in configurations.read_table().items():
        assert entry["capability"] in ahead_of_time.SHARED_LIMIT, device
        names = {f"{op}/{v.name}" for op in benchmark.operators() for v in ahead_of_time.variants(op)}
        assert set(entry["configurations"]) <= names
