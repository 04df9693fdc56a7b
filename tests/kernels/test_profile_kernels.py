"""The command: gate only without a GPU, a red gate is not timed, a training step is traced on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megavl.kernels import records
from megavl.kernels.benchmark import Ceilings, Timing

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tools" / "profile_kernels.py"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens on a machine without a GPU")


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("profile_kernels", COMMAND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_no_gpu
def test_without_a_gpu_the_gate_alone_runs():
    before = set(records.RESULTS.iterdir())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the command sets it
    result = subprocess.run(
        [sys.executable, COMMAND, "--op", "rmsnorm", "--op", "rope"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    first, *gates = result.stdout.splitlines()
    assert first.startswith("No GPU: ")
    assert [line.split(maxsplit=1) for line in gates] == [
        [op, "agrees with its reference"] for op in ("rmsnorm", "rope")
    ]
    assert set(records.RESULTS.iterdir()) == before


@needs_no_gpu
def test_a_red_gate_fails_the_command(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "gate", lambda op, device, dtypes: "wrong" if op == "rope" else "")
    assert tool.main(["--op", "rope", "--op", "rmsnorm"]) == 1
    assert "red, not timed: wrong" in capsys.readouterr().out


def test_a_red_gate_is_not_timed(tool, monkeypatch, tmp_path):
    """With a made-up GPU: the green operator gets rows, in the file of that GPU; the red one is never called."""
    timed = []

    def time_case(case, device, dtype, peers, repeats):
        timed.append((case.op, case.name))
        assert (peers, repeats) == (("eager",), 70)
        time = Timing(p20=1.0, p50=2.0, p80=3.0, repeats=repeats, peak_mib=4.0)
        return {"triton": time, "eager": "OutOfMemoryError: too large"}

    monkeypatch.setattr(tool.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool.torch.cuda, "get_device_name", lambda device: "Made-up GPU")
    monkeypatch.setattr(tool, "gate", lambda op, device, dtypes: "wrong" if op == "rope" else "")
    monkeypatch.setattr(tool, "measure_ceilings", lambda device, dtype: Ceilings(copy=4e12, matmul=8e14))
    monkeypatch.setattr(tool, "time_case", time_case)
    options = ["--op", "rope", "--op", "rmsnorm", "--shape", "7b mb8", "--peer", "eager", "--repeats", "70"]
    options += ["--out", str(tmp_path)]
    assert tool.main(options) == 1
    assert {op for op, _ in timed} == {"rmsnorm"}
    assert all("7b mb8" in name for _, name in timed)
    rows = records.read_rows(tmp_path / "made_up_gpu.csv")
    assert [(row.op, row.implementation, row.direction) for row in rows] == [
        ("rmsnorm", "triton", "forward"),
        ("rmsnorm", "triton", "backward"),
    ]
    assert all(row.step_share.startswith("7b ") and row.commit for row in rows)
    page = (tmp_path / "README.md").read_text()
    assert "| rmsnorm | 7b mb8" in page
    assert "![roofline](made_up_gpu.png)" in page
    assert (tmp_path / "made_up_gpu.png").exists()


def test_a_kernel_that_does_not_run_at_the_timed_shape_fails_the_command(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "time_case", lambda *_: {"triton": "RuntimeError: illegal address"})
    monkeypatch.setattr(tool.torch.cuda, "get_device_name", lambda device: "Made-up GPU")
    options = SimpleNamespace(peer=None, shape=["7b mb1"], repeats=60, out=tmp_path)
    ceilings = Ceilings(copy=4e12, matmul=8e14)
    assert not tool.time_operator("rope", torch.device("cpu"), torch.bfloat16, ceilings, options)
    assert "triton did not run: RuntimeError: illegal address" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "--op nothing: operators are "),
        (["--repeats", "5"], "--repeats 5 is below 50"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_refusals(tool, arguments, message, capsys):
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert message in capsys.readouterr().err


def test_shares_refer_to_a_plausible_step(tool):
    """A micro-batch of the 7B costs 42 GF a token and 1.5 TF an image; of the 1.3B 9.9 GF a token."""
    flops = tool.micro_batch_flops()
    assert flops["7b"] == pytest.approx(4096 * 41.96e9 + 4 * 1.50e12, rel=0.02)
    assert flops["1.3b"] == pytest.approx(4096 * 9.865e9 + 4 * 0.40e12, rel=0.02)


def event(name: str, start: float, us: float, number: int = -1, parent=None, backward: bool = False) -> SimpleNamespace:
    """An operator on the host that keeps the device busy for `us`, all of it by itself."""
    return SimpleNamespace(
        name=name,
        device_type=torch.autograd.DeviceType.CPU,
        self_device_time_total=0.0 if name.startswith("module ") else us,
        device_time_total=us,
        sequence_nr=number,
        scope=int(backward),
        cpu_parent=parent,
        time_range=SimpleNamespace(start=start),
    )


def test_backward_time_goes_to_the_module_that_made_it():
    from megavl.training.trace import module_table, summarise

    stage = event("module stage", 0, 6000)
    layers = [event(f"module layers.{i}.mlp", 1 + i, 2000, parent=stage) for i in range(2)]
    view = event("aten::view", 1.2, 0, number=7, parent=stage)  # shows the number of what comes next
    forward = [event("aten::mm", 1.5 + i, 2000, number=7 + i, parent=layer) for i, layer in enumerate(layers)]
    own = event("aten::add", 4, 2000, number=9, parent=stage)
    name = "autograd::engine::evaluate_function: XBackward0"
    backward = [event(name, 9 + n, 1000 * (n + 1), number=7 + n, backward=True) for n in range(3)]
    kernel = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, name="mm_kernel")
    found = summarise([stage, layers[0], view, *forward, layers[1], own, *backward, kernel], on_device=True)
    assert found.total_ms == 12
    assert found.modules == [("stage", 1, 6, 6), ("layers.*.mlp", 2, 4, 3)]
    assert found.operators[:2] == [(name, 3, 6), ("aten::mm", 2, 4)]
    assert module_table(found).splitlines()[-1].endswith(" 0.0%")


@pytest.mark.slow
def test_trace_of_a_training_step(tmp_path):
    recipe = ROOT / "examples" / "quickstart" / "stage2.py"
    layout = ["--parallel.tensor", "1", "--parallel.pipeline", "1", "--parallel.device", "cpu"]
    command = [sys.executable, COMMAND, "--trace", recipe, "--trace-folder", tmp_path, *layout]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    events = json.loads((tmp_path / "stage2_rank0.json").read_text())["traceEvents"]
    assert any(event.get("name") == "module decoder" for event in events)
    operators, modules = result.stdout.split("\n\n")[1:3]
    assert "aten::mm" in operators
    table = {
        line.split()[0]: list(map(float, line.replace("%", "").split()[1:])) for line in modules.splitlines()[1:-1]
    }
    calls, forward, backward, portion = table["decoder.layers.*.mlp.linear_fc1"]
    assert calls == 8  # four layers, two micro-batches
    assert 0 < forward < table["decoder.layers.*.mlp"][1] < table["decoder"][1] < table["stage"][1]
    assert 0 < backward < table["decoder.layers.*.mlp"][2] < table["decoder"][2] < table["stage"][2]
    assert table["first_stage.towers.sam.blocks.*"][2] == 0  # frozen
    assert 50 < table["stage"][3] <= 100
    assert 0 < portion < 50


def test_trace_refuses_a_layout_that_does_not_fit(tool, capsys):
    assert tool.main(["--trace", str(ROOT / "examples" / "quickstart" / "stage2.py")]) == 1
    assert capsys.readouterr().err.startswith("profile_kernels: ")
