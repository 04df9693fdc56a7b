"""A recipe with its data for each file, and calls of the real `main` in the process of the tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import make_data

from megavl.parallel.groups import destroy_groups
from megavl.training import stopping


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe in a folder of its own, which holds its data too."""
    return make_data(tmp_path_factory.mktemp("small"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Call `main` here: leave signals and process groups as they were."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(stopping, "FAREWELL_S", 0.0)
    yield
    for number, handler in before:
        signal.signal(number, handler)
    destroy_groups()
