"""A `StepBatch` in three tensors, for the way out of a loader process.

In: a `StepBatch` of any number of micro-batches. Out: the same, after `open()`. Every tensor that leaves a process
takes a file descriptor and a system call; a step of 36 packed micro-batches has 250 tensors, which would exhaust the
usual limit of 1024 descriptors while four steps are ahead. Joined by type they are three, and pinning them is three
calls.

Shapes: per micro-batch t tokens, d documents, l image slots, i images; S side of an image in pixels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavl.data.microbatch import MicroBatch, StepBatch

_LONGS = ("tokens", "labels", "positions", "image_slots")


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A step whose tensors are joined by type."""

    longs: Tensor
    """tokens, labels, positions and image_slots of each micro-batch in turn, int64."""
    ints: Tensor
    """cu_seqlens of each micro-batch in turn, int32."""
    pixels: Tensor
    """Images of all micro-batches, uint8 [sum of i, 3, S, S], or empty."""
    sizes: tuple[tuple[int, int, int, int], ...]
    """(t, d+1, l, images with pixels) of each micro-batch."""
    rest: StepBatch
    """Everything else; its tensors are None."""

    def pin_memory(self) -> "Parcel":
        """A copy in pinned memory (called by torch's DataLoader)."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("longs", "ints", "pixels")}
        return replace(self, **pinned)

    def open(self) -> StepBatch:
        """The step; its tensors are views, nothing is copied."""
        longs, ints, images = 0, 0, 0
        microbatches = []
        for (t, bounds, slots, count), rest in zip(self.sizes, self.rest.micro_batches, strict=True):
            parts = torch.split(self.longs[longs : longs + 3 * t + slots], [t, t, t, slots])
            tokens, labels, positions, image_slots = parts
            microbatches.append(
                replace(
                    rest,
                    tokens=tokens,
                    labels=labels,
                    positions=positions,
                    image_slots=image_slots,
                    cu_seqlens=self.ints[ints : ints + bounds],
                    pixels=self.pixels[images : images + count] if count else None,
                )
            )
            longs, ints, images = longs + 3 * t + slots, ints + bounds, images + count
        return replace(self.rest, micro_batches=tuple(microbatches))


def wrap(batch: StepBatch) -> Parcel:
    """Joins the tensors of a step."""
    microbatches = batch.micro_batches
    pixels = [m.pixels for m in microbatches if m.pixels is not None]
    return Parcel(
        longs=torch.cat([getattr(m, name) for m in microbatches for name in _LONGS]),
        ints=torch.cat([m.cu_seqlens for m in microbatches]),
        pixels=torch.cat(pixels) if pixels else torch.empty(0, dtype=torch.uint8),  # [sum of i, 3, S, S]
        sizes=tuple(_sizes(m) for m in microbatches),
        rest=replace(batch, micro_batches=tuple(_without_tensors(m) for m in microbatches)),
    )


def _sizes(m: MicroBatch) -> tuple[int, int, int, int]:
    return len(m.tokens), len(m.cu_seqlens), len(m.image_slots), 0 if m.pixels is None else len(m.pixels)


def _without_tensors(m: MicroBatch) -> MicroBatch:
    return replace(m, **dict.fromkeys((*_LONGS, "cu_seqlens"), None), pixels=None)  # type: ignore[arg-type]
