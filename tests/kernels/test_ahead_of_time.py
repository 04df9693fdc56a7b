"""Every kernel compiles for sm_80 and sm_90 without a GPU: no spills, shared memory fits, expected instructions appear.

The compiler must not see TRITON_INTERPRET, so it runs in a process of its own, one for all operators.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavl.kernels.ahead_of_time import Compiled, operators, problems, read_table, shipped

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_variant_compiles_within_limits():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "megavl.kernels.ahead_of_time"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    expected = sum(len(variant.capabilities) for op in operators() for variant in shipped(op))
    assert len(result.stdout.splitlines()) == expected


def test_the_kept_table_is_that_of_what_is_shipped():
    names = {(op, v.name, capability) for op in operators() for v in shipped(op) for capability in v.capabilities}
    assert set(read_table()) == names


ROW = Compiled(
    op="op",
    variant="forward",
    capability=90,
    num_warps=4,
    num_stages=3,
    registers=111,
    shared_bytes=1000,
    spill_bytes=0,
    instructions=10,
    counts="HGMMA:2 LDGSTS:4",
    triton="3.9.0",
)


@pytest.mark.parametrize(
    ("changes", "kept", "message"),
    [
        ({}, {"registers": "101", "triton": "3.9.0"}, ""),
        ({}, {"registers": "100", "triton": "3.9.0"}, "uses 111 registers, the kept table has 100"),
        ({}, {"registers": "100", "triton": "3.6.0"}, ""),  # another compiler
        ({"spill_bytes": 16}, None, "spills 16 bytes"),
        ({"shared_bytes": 232_449}, None, "needs 232449 bytes of shared memory, a block has 232448"),
        ({"counts": "HGMMA:2"}, None, "was written to use LDGSTS, but has only HGMMA:2"),
        ({"counts": "LDGSTS:4"}, None, "was written to use HGMMA, but has only LDGSTS:4"),
    ],
    ids=["within a tenth", "registers", "other triton", "spills", "shared memory", "no copies", "no tensor cores"],
)
def test_what_is_refused(changes, kept, message):
    row = Compiled(**{**vars(ROW), **changes})
    variant = SimpleNamespace(expects={90: ("HGMMA", "LDGSTS")})
    found = list(problems(variant, row, {("op", "forward", 90): kept} if kept else {}))
    assert len(found) == bool(message)
    assert all(message in sentence for sentence in found)
