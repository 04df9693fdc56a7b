"""What a machine can do, as the planner reads it: assumed rates by name, or measured ones from a calibration file.

In: a name, or the JSON that `megavl/planning/calibrate.py` writes. Out: `Hardware`. Assumed rates are round numbers to
plan with, not measurements; whatever is computed from them is printed as an estimate.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Measured work per second of one part of the model; the unit of work is that of `planning/costs.py`."""

    forward: float
    """In the forward pass."""
    backward: float
    """In the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One rank's device and its links."""

    name: str
    """As in `HARDWARE`, or the device's own name after calibration."""
    gpu: bool
    """Whether `auto` kernels are fused ones here."""
    memory_gib: float
    """Of one device."""
    bf16_flops: float
    """Operations per second that large matrix products reach."""
    fp32_flops: float
    """The same in fp32."""
    bandwidth: float
    """Bytes per second of device memory."""
    node: int
    """Ranks that share the fast link."""
    fast_link: float
    """Bytes per second between two ranks of a node, one direction."""
    slow_link: float
    """Bytes per second between two ranks of different nodes, one direction."""
    latency_s: float
    """Seconds until a message or a collective starts to move."""
    measured: Mapping[str, Rate] = field(default_factory=dict)
    """Part of the model -> what was measured; other parts use the rates above."""
    origin: str = "assumed rates"
    """Where the rates come from, in words."""

    def flops(self, dtype: Literal["bf16", "fp32"]) -> float:
        """Operations per second of matrix products in a type."""
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops

    def link(self, span: int) -> float:
        """Bytes per second within a group that spans `span` neighbouring ranks."""
        return self.fast_link if span <= self.node else self.slow_link


# Data sheets (NVIDIA, per device): A100 80GB SXM, H100 SXM and H200 have 312, 989, 989 TFLOP/s of dense bf16 products,
# 19.5, 67, 67 of fp32, 2.0, 3.35, 4.8 TB/s of memory, and 300, 450, 450 GB/s of NVLink in one direction. Links between
# nodes: one adapter per device of 200 Gbit/s (DGX A100) or 400 Gbit/s (DGX H100, H200), that is 25 and 50 GB/s.
# Measured on an H200: 4.3 TB/s of a copy, 790 TFLOP/s of one large bf16 product.
# Assumed: everything else. A training step reaches 45% of an H100's or H200's peak and 51% of an A100's; fp32 reaches
# 60% and 77%; memory of the H100 and the A100 about 86%, links 73 to 80%.
_HOPPER = Hardware(
    name="h200",
    gpu=True,
    memory_gib=139,  # as the driver reports it; sold as 141 GB
    bf16_flops=450e12,
    fp32_flops=40e12,
    bandwidth=4.3e12,
    node=8,
    fast_link=350e9,
    slow_link=40e9,
    latency_s=20e-6,
)

HARDWARE: dict[str, Hardware] = {
    "h200": _HOPPER,
    "h100": dataclasses.replace(_HOPPER, name="h100", memory_gib=79, bandwidth=2.9e12),
    "a100": dataclasses.replace(
        _HOPPER,
        name="a100",
        memory_gib=79,
        bf16_flops=160e12,
        fp32_flops=15e12,
        bandwidth=1.7e12,
        fast_link=220e9,
        slow_link=20e9,
    ),
    "cpu": Hardware(
        name="cpu",
        gpu=False,
        memory_gib=16,
        bf16_flops=3e10,
        fp32_flops=3e10,
        bandwidth=1e10,
        node=64,
        fast_link=1e9,
        slow_link=1e9,
        latency_s=3e-4,
    ),
}
"""Assumed rates by name."""


def read_calibration(path: str | Path, base: Hardware) -> Hardware:
    """`base` with the rates that were measured on a machine.

    Args:
        path: JSON file of `megavl/planning/calibrate.py`.
        base: links, memory and parts that were not measured.

    Raises:
        ValueError: the file is not there, not such a file, or holds a time that is not above 0.
    """
    try:
        found = json.loads(Path(path).read_text())
        measured = measured_rates(found["parts"])
        origin = f"measured on {found['device']}, {found['dtype']}, {found['date']}"
        return dataclasses.replace(
            base, name=found["device"], gpu=bool(found["cuda"]), measured=measured, origin=f"{origin} ({path})"
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"calibration {path}: {reason}; `tools/plan_pipeline.py --calibrate` writes one") from error


def measured_rates(parts: Mapping[str, Any]) -> dict[str, Rate]:
    """Part of the model -> work per second.

    Args:
        parts: `parts` of a calibration: name -> `work` and `seconds`, each `forward` and `backward`.

    Raises:
        ValueError: a time is not above 0.
    """
    rates = {}
    for name, part in parts.items():
        work, seconds = part["work"], part["seconds"]
        for direction in ("forward", "backward"):
            if not float(seconds[direction]) > 0:
                raise ValueError(f"{name} has {seconds[direction]} s {direction}, which is not above 0")
        rates[name] = Rate(**{d: float(work[d]) / float(seconds[d]) for d in ("forward", "backward")})
    return rates
