"""The adaptors of DeepSeek-VL: the 7B's and our 1.3B hybrid, and the released 1.3B's MLP. 576 rows an image."""

import torch
from torch import Tensor

from megavl.kernels.adaptor.op import hybrid_adaptor, mlp_adaptor
from megavl.kernels.adaptor.reference import adaptor_reference
from megavl.kernels.benchmark import Call, Case, Direction, backward_of
from megavl.kernels.gate import hold_to_reference

MODELS = {"1.3b": (2048, None), "1.3b_hybrid": (2048, 1024), "7b": (4096, 1024)}
"""Model -> (hidden size, width of the high-resolution features or None)."""
LOW, POSITIONS = 1024, 576


def cases() -> list[Case]:
    """1, 4 and 8 images, each direction by itself; 4 are those of one packed row."""
    return [
        _case(model, images, direction)
        for model in MODELS
        for images in (1, 4, 8)
        for direction in ("forward", "backward")
    ]


def _case(model: str, images: int, direction: Direction) -> Case:
    hidden, high = MODELS[model]
    rows = images * POSITIONS
    branches = 1 if high is None else 2
    weights = hidden * LOW + hidden * hidden  # two half-width branches cost as much as one of full width
    macs = rows * weights
    features = rows * LOW * branches

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        inputs = [x.to(device, dtype) for x in example(rows, high, LOW, hidden)]
        found = {"triton": ours, "eager": eager, "compile": torch.compile(eager)}
        if direction == "forward":
            return {name: lambda f=f: f(*inputs) for name, f in found.items()}  # type: ignore[misc]
        return {name: backward_of(f, [x.clone().requires_grad_() for x in inputs]) for name, f in found.items()}

    forward = features + weights + rows * hidden  # read features and weights, write the result
    backward = 2 * features + 2 * weights + 2 * rows * hidden  # their gradients, the kept product, dy
    return Case(
        op="adaptor",
        name=f"{model} images{images} rows{rows} h{hidden}",
        direction=direction,
        make=make,
        flops=2.0 * macs if direction == "forward" else 4.0 * macs,
        bytes=2.0 * (forward if direction == "forward" else backward),
        check=check,
        share_ms=f"{model} {4 / images}",
    )


def example(rows: int, high: int | None, low: int, hidden: int) -> list[Tensor]:
    """Random features and parameters in the order of `adaptor_reference`, without those of an absent tower."""
    width = hidden if high is None else hidden // 2
    layers = [(width, c) for c in (high, low) if c is not None]
    features = [torch.randn(rows, c) for c in (high, low) if c is not None]
    parameters = [p for n, c in [*layers, (hidden, hidden)] for p in (torch.randn(n, c) / c**0.5, torch.randn(n))]
    return features + parameters


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and every gradient at small odd shapes, both kinds."""
    for high in (None, 19):
        hold_to_reference(ours, eager, [x.to(device, dtype) for x in example(7, high, 13, 22)])


def ours(*inputs: Tensor) -> Tensor:
    """The operator for 8 inputs (hybrid) or 5 (one tower)."""
    return hybrid_adaptor(*inputs) if len(inputs) == 8 else mlp_adaptor(*inputs)


def eager(*inputs: Tensor) -> Tensor:
    """The reference for 8 inputs (hybrid) or 5 (one tower)."""
    if len(inputs) == 8:
        return adaptor_reference(*inputs)
    return adaptor_reference(None, inputs[0], None, None, *inputs[1:])
