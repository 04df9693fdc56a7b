"""One spawned world for every test of this folder, and the table of differences at the end."""

from collections.abc import Iterator

import pytest
from world import World

DIFFERENCES: dict[str, list[float]] = {}
"""Layout and stage -> worst relative difference per step; filled by test_layouts.py."""


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Four CPU processes with gloo, started by the first call; smaller worlds are calls with `ranks=`."""
    with World(4) as world:
        yield world


@pytest.fixture(scope="session")
def differences() -> dict[str, list[float]]:
    """Where tests leave what they measured."""
    return DIFFERENCES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    if DIFFERENCES:
        from layouts import STEP_NAMES

        from megavl.training.parity import difference_table

        terminalreporter.section("worst relative difference from one process")
        terminalreporter.write_line(difference_table(DIFFERENCES, STEP_NAMES))
