"""What holds for every test: an interpreter for Triton where there is no GPU, fixed draws, and no unknown skip.

Read first by pytest: Triton must know before kernels are imported that it is to interpret them.
"""

import os
import random
import re
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.10 changes the default

# The same examples on every run, whatever the machine does beside: a failure is always the change's own.
settings.register_profile(
    "megavl", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("megavl")

ALLOWED_SKIPS = (
    # without a GPU
    "no CUDA device",
    "only a device can be waited for",
    "times on a GPU",
    "the interpreter gets bf16 wrong",
    # with one
    "compiled kernels take bf16",
    "what happens on a machine without a GPU",
    r"\d+ GPU for \d+ ranks",
)
"""Reasons, as regular expressions. A test that is skipped for another one fails: it would be missed by nobody."""


@pytest.fixture(autouse=True)
def fixed_draws() -> None:
    """Global generators start alike in every test, so that none depends on those before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Tests, and marks on them."""
    report = yield
    return refuse_unknown_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Files that skip themselves as they are imported."""
    report = yield
    return refuse_unknown_skip(report)


def refuse_unknown_skip(report: Any) -> Any:
    """The report, failed if it tells of a skip (or an expected failure) that is not allowed."""
    if report.skipped:
        where = report.longrepr
        reason = where[2].removeprefix("Skipped: ") if isinstance(where, tuple) else str(where)
        if not any(re.fullmatch(allowed, reason) for allowed in ALLOWED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that tests/conftest.py does not allow: {reason}"
    return report
