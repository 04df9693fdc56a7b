"""Which implementation of each operator the model runs: the only importer of `megavl.kernels`.

In: the recipe's `kernels` section, device and compute type. Out: `Ops`, handed to the model's constructors, and a line
per operator for start-up. "reference" is plain PyTorch and stands in the model files themselves, so without the
folder `kernels/` (or without Triton) everything still runs.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from megavl.config import KernelsConfig

Operator = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The fused operators that the model calls; None: the model's own plain PyTorch. See `kernels/<name>/op.py`."""

    sam_attention: Operator | None = None
    """Attention of a SAM block on the unpadded patch grid."""
    rmsnorm: Operator | None = None
    """The decoder's norms."""
    swiglu: Operator | None = None
    """Activation of the decoder's feed-forward networks."""
    rope: Operator | None = None
    """Rotation of query and key."""
    linear_cross_entropy: Operator | None = None
    """Output head and loss."""
    image_scatter: Operator | None = None
    """Image features into the embedded text."""
    hybrid_adaptor: Operator | None = None
    """Adaptor of two towers."""
    mlp_adaptor: Operator | None = None
    """Adaptor of one tower."""
    interpolate: Operator | None = None
    """Resizing behind SAM's necks."""
    strided_conv: Operator | None = None
    """The two convolutions behind that."""
    interpolate_conv: Operator | None = None
    """Resizing and the first of the two convolutions, in place of `interpolate` and `strided_conv` there."""


PLAIN = Ops()
"""No kernel at all."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs for one operator, and why."""

    implementation: Literal["triton", "reference"]
    reason: str


FUNCTIONS = {
    "sam_attention": ("sam_attention", "sam_attention"),
    "rmsnorm": ("rmsnorm", "rms_norm"),
    "swiglu": ("swiglu", "swiglu"),
    "rope": ("rope", "rotate"),
    "linear_cross_entropy": ("linear_cross_entropy", "linear_cross_entropy"),
    "image_scatter": ("image_scatter", "image_scatter"),
    "hybrid_adaptor": ("adaptor", "hybrid_adaptor"),
    "mlp_adaptor": ("adaptor", "mlp_adaptor"),
    "interpolate": ("interpolate", "interpolate"),
    "strided_conv": ("strided_conv", "strided_conv"),
    "interpolate_conv": ("interpolate_conv", "interpolate_conv"),
}
"""Field of `Ops` -> the folder in `kernels/`, which is the recipe's name for it, and the function there."""

NOT_BY_DEFAULT = {
    "interpolate": "not measured to be faster than torch",
    "strided_conv": "not measured to be faster than cuDNN",
    "interpolate_conv": "not measured to be faster than torch and cuDNN",
}
"""Operator -> why `auto` takes the reference also on CUDA."""


def make_ops(kernels: KernelsConfig, device: torch.device, dtype: torch.dtype) -> Ops:
    """The operators that the recipe asks for.

    Args:
        kernels: the recipe's section.
        device: where the model runs.
        dtype: type of activations.

    Raises:
        ValueError: `triton` is asked for where it cannot run.
    """
    chosen = choose(kernels, device, dtype)
    fused = {name for name, choice in chosen.items() if choice.implementation == "triton"}
    return Ops(**{field: _load(*place) for field, place in FUNCTIONS.items() if place[0] in fused})


def choose(kernels: KernelsConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Choice]:
    """Implementation and reason by operator; arguments and errors as in `make_ops`."""
    wanted = {field.name: getattr(kernels, field.name) for field in fields(kernels)}
    obstacles = {name: _obstacle(name, device, dtype) for name, value in wanted.items() if value == "triton"}
    refused: dict[str, list[str]] = {}
    for name, obstacle in obstacles.items():
        if obstacle:
            refused.setdefault(obstacle, []).append(f"kernels.{name}")
    if refused:
        parts = [f"{', '.join(names)}: triton is asked for, but {why}" for why, names in refused.items()]
        raise ValueError("; ".join(parts))
    return {name: _choose_one(name, value, device, dtype) for name, value in wanted.items()}


def operator_lines(kernels: KernelsConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What runs, a line per operator, for start-up."""
    chosen = choose(kernels, device, dtype)
    lines = ["operator               runs        because"]
    return lines + [f"{name:20}   {choice.implementation:9}   {choice.reason}" for name, choice in chosen.items()]


def _choose_one(name: str, wanted: str, device: torch.device, dtype: torch.dtype) -> Choice:
    if wanted == "triton":
        interpreted = ", in Triton's interpreter" if _interpreting() else ""
        return Choice(implementation="triton", reason=f"the recipe asks for it{interpreted}")
    if wanted == "reference":
        return Choice(implementation="reference", reason="the recipe asks for it")
    if device.type != "cuda":
        return Choice(implementation="reference", reason="auto: kernels are for CUDA")
    if name in NOT_BY_DEFAULT:
        return Choice(implementation="reference", reason=f"auto: {NOT_BY_DEFAULT[name]}")
    obstacle = _obstacle(name, device, dtype)
    if obstacle:
        return Choice(implementation="reference", reason=f"auto: {obstacle}")
    return Choice(implementation="triton", reason="auto")


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel of an operator cannot run, or nothing."""
    if device.type != "cuda" and not _interpreting():
        return f"the device is {device.type} and Triton needs CUDA (or, to test, TRITON_INTERPRET=1 when started)"
    if _interpreting() and dtype is torch.bfloat16:
        return "stage.dtype is bf16, which Triton's interpreter computes wrongly"
    try:
        _import(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.split(".")[0] != "triton" and not missing.startswith("megavl.kernels"):
            raise
        return f"the package {missing} is missing"
    return ""


def _load(name: str, function: str) -> Operator:
    return getattr(_import(name), function)


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"megavl.kernels.{name}.op")


def _interpreting() -> bool:
    """Triton reads the same variable when a kernel is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
