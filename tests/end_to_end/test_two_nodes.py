"""Two nodes of one run, started by the shipped launcher on this machine; one process alone gives the same losses."""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from small_run import finish, lines, make_data, start

from megavl.parallel.groups import destroy_groups
from megavl.train import main

LAUNCHER = Path(__file__).parents[2] / "examples" / "launch" / "torchrun.sh"


def free_port() -> int:
    """Below the range from which the kernel serves whoever wants any port, so that it stays free."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise AssertionError("no free port")


@pytest.mark.slow
def test_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_data(tmp_path)
    settings = {"NODES": "2", "HEAD": f"localhost:{free_port()}", "GPUS_PER_NODE": "1", "PYTHON": sys.executable}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    options = ("--parallel.tensor", "2", "--parallel.sequence", "True", "--stage.steps", "3")
    nodes = [start([str(LAUNCHER), str(recipe), *options]) for _ in range(2)]
    results = [finish(node) for node in nodes]
    assert [code for code, _, _ in results] == [0, 0], [err[-2000:] for _, _, err in results]
    assert sum("2 ranks on cpu (gloo): tensor 2" in out for _, out, _ in results) == 1  # rank 0 alone talks
    alone = tmp_path / "alone"
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert main([str(recipe), "--stage.steps", "3", "--data.workers", "0", "--run_dir", str(alone)]) == 0
    finally:
        destroy_groups()
        for number, handler in before:
            signal.signal(number, handler)
    for shared, single in zip(lines(tmp_path / "run"), lines(alone), strict=True):
        assert shared["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert shared["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
