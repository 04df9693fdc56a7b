"""Image scatter in one micro-batch of 4,096-token rows with 4 images each. Shapes: h hidden, 576 positions an image."""

import torch
from torch import Tensor

from megavl.kernels.benchmark import Call, Case, Direction, backward_of
from megavl.kernels.gate import hold_to_reference
from megavl.kernels.image_scatter.op import image_scatter
from megavl.kernels.image_scatter.reference import image_scatter_reference

HIDDEN = {"1.3b": 2048, "7b": 4096}
"""Model -> hidden size."""
TOKENS, IMAGES, POSITIONS = 4096, 4, 576


def cases() -> list[Case]:
    """Micro-batches of 1 and 8 rows, each direction by itself."""
    return [
        _case(model, micro_batch, direction)
        for model in HIDDEN
        for micro_batch in (1, 8)
        for direction in ("forward", "backward")
    ]


def _case(model: str, micro_batch: int, direction: Direction) -> Case:
    hidden, tokens, features = HIDDEN[model], TOKENS * micro_batch, IMAGES * POSITIONS * micro_batch

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
        text = torch.randn(tokens, hidden, device=device, dtype=dtype)
        images = torch.randn(features, hidden, device=device, dtype=dtype)
        slots = torch.cat([row * TOKENS + 8 + torch.arange(IMAGES * POSITIONS) for row in range(micro_batch)])
        slots = slots.to(device)
        peers = {"triton": image_scatter, "eager": _eager, "compile": torch.compile(_eager)}
        if direction == "forward":
            # The released model's way, which waits for the device; it has no place for a gradient in `text`.
            calls = {name: lambda f=f: f(text, images, slots) for name, f in peers.items()}  # type: ignore[misc]
            mask = torch.zeros(tokens, dtype=torch.bool, device=device).index_fill(0, slots, True)
            return {**calls, "masked": lambda: _masked(text, images, mask)}
        return {
            name: backward_of(
                lambda a, b, f=f: f(a, b, slots),  # type: ignore[misc]
                [text.clone().requires_grad_(), images.clone().requires_grad_()],
            )
            for name, f in peers.items()
        }

    rows = 2 * tokens if direction == "forward" else 2 * tokens + features  # backward: read dy, write both gradients
    return Case(
        op="image_scatter",
        name=f"{model} mb{micro_batch} tokens{tokens} h{hidden}",
        direction=direction,
        make=make,
        flops=0.0,
        bytes=2.0 * rows * hidden,
        check=check,
        share_ms=f"{model} {1 / micro_batch}",
    )


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradients at a small odd shape, with features outside the slice."""
    inputs = [torch.randn(11, 97, device=device, dtype=dtype), torch.randn(5, 97, device=device, dtype=dtype)]
    slots = torch.tensor([1, 7, 3, 12, 15], device=device)
    hold_to_reference(
        lambda a, b: image_scatter(a, b, slots, 3), lambda a, b: image_scatter_reference(a, b, slots, 3), inputs
    )


def _eager(text: Tensor, images: Tensor, slots: Tensor) -> Tensor:
    return text.index_copy(0, slots, images)


def _masked(text: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    filled = text.clone()
    filled[mask] = images
    return filled
