"""Launch configurations: a safe default for every shape, and what was measured to be faster on a device.

In: an operator's default. Out: the default, or in its place the entry of `results/configurations.json` for this device,
kernel and shape. Nothing is tuned while a model runs: winners vary by machine and moment and change the order of sums,
so two ranks could differ. `tools/profile_kernels.py --tune` measures and writes the table; every entry is compiled by
the ahead-of-time check like the defaults.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).parent / "results" / "configurations.json"
Configuration = dict[str, int]
"""Launch option (`BLOCK_M`, `num_warps`, ...) -> value; what an entry leaves out is as in the default."""

_trials: dict[tuple[str, str], Configuration] = {}


def configuration(op: str, kernel: str, shape: str, default: Configuration, tensor: Tensor) -> Configuration:
    """Options of one launch.

    Args:
        op: folder of the operator.
        kernel: which of its kernels.
        shape: what the best configuration depends on; `kernel shape` is the name of the compiled variant.
        default: options that are right everywhere.
        tensor: an input. The table is for CUDA and 16-bit types.
    """
    if (op, kernel) in _trials:
        return {**default, **_trials[op, kernel]}
    if tensor.device.type != "cuda" or tensor.dtype is torch.float32:
        return default
    return {**default, **entries(_device_name(tensor.device)).get(f"{op}/{kernel} {shape}", {})}


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def entries(device_name: str) -> dict[str, Configuration]:
    """`operator/kernel shape` -> configuration on a device; empty where nothing was measured."""
    return read_table().get(device_name, {}).get("configurations", {})


def read_table() -> dict[str, dict[str, Any]]:
    """Device name -> its `capability` (80, 90, ...) and `configurations`."""
    return json.loads(TABLE.read_text())


def write_entry(device_name: str, capability: int, variant: str, chosen: Configuration) -> None:
    """Keep a configuration for `operator/kernel shape` on a device."""
    table = read_table()
    table.setdefault(device_name, {"capability": capability, "configurations": {}})
    table[device_name]["configurations"][variant] = chosen
    TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    entries.cache_clear()


@contextmanager
def trying(op: str, kernel: str, tried: Configuration) -> Iterator[None]:
    """Launch a kernel with other options, whatever the shape; for measuring alone."""
    _trials[op, kernel] = tried
    try:
        yield
    finally:
        del _trials[op, kernel]
