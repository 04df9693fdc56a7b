"""What one forward pass reads: rows flattened into one stream of tokens in which documents are told apart.

Every micro-batch has this one form, packed or not: its rows are joined end to end, `cu_seqlens` marks where documents
start, and padding (if the pipeline needs equal lengths) is a last document without labels. So there is one attention
path, and no row is padded to another's length.

Shapes: t tokens of the micro-batch, k of them with a label, d documents, i images, p positions per image (576), S side
of an image in pixels.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megavl.config import Modality

IGNORE = -100
"""Label of a position that is not learnt."""


@dataclass(frozen=True, kw_only=True)
class ImageShare:
    """Every `every`-th image of a step, from image `first` on, counted over the micro-batches of a rank."""

    every: int = 1
    """Ranks that share the images."""
    first: int = 0
    """Place among them."""

    def of(self, batch: "MicroBatch") -> range:
        """The images of a micro-batch that belong to this share, counted from 0 in the micro-batch."""
        return range((self.first - batch.images_before) % self.every, batch.num_images, self.every)


EVERY_IMAGE = ImageShare()
"""The share of a rank that encodes alone."""


@dataclass(frozen=True, kw_only=True)
class PixelRule:
    """Which images of a step a rank decodes, and whether it is the one to tell that one of them could not be."""

    rest: ImageShare | None
    """Of micro-batches with an image beyond the first `limit` of the step; None: none."""
    ahead: ImageShare | None = None
    """Of the others."""
    limit: int = 0
    """Images of the step, counted over the micro-batches of a data-parallel rank."""
    answers: bool = True
    """Off on a rank all of whose images are decoded by another rank of the data-parallel copy that answers for them."""

    def of(self, images_before: int, images: int) -> ImageShare | None:
        """The share to decode of a micro-batch with so many images."""
        return self.ahead if images_before + images <= self.limit else self.rest


EVERY_PIXEL = PixelRule(rest=EVERY_IMAGE)
"""The rule of a rank that encodes alone."""
NO_PIXELS = PixelRule(rest=None, answers=False)
"""The rule of a rank without towers."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch of one data-parallel rank."""

    tokens: Tensor
    """Token ids, int64 [t]; image positions hold the placeholder id."""
    labels: Tensor
    """The id that follows each position, or `IGNORE`, int64 [t]. Shifted within each document, never across."""
    positions: Tensor
    """Rotary position of each token, int64 [t]; restarts with each document when documents are separate."""
    cu_seqlens: Tensor
    """Start of each document in the stream and its end, int32 [d+1], strictly increasing from 0 to t."""
    max_document: int
    """Tokens of the longest document."""
    pixels: Tensor | None
    """Images in reading order, uint8 [i, 3, S, S], or those of `pixel_share`; None where there is none of them."""
    image_slots: Tensor
    """Positions in the stream that image features fill, int64 [i*p], in reading order."""
    num_images: int
    """i; known on every rank, also where `pixels` is not loaded."""
    modality: Modality | None
    """The one modality of its rows, or None if mixed."""
    sample_ids: tuple[tuple[str, int], ...]
    """(source name, sample index in the source's store) of every sample, in order."""
    learnt: Tensor | None = None
    """Positions that have a label, int64 [k]: rows that the output head computes. None until `to` fills it in."""
    images_before: int = 0
    """Images in the earlier micro-batches of the step on this data-parallel rank."""
    pixel_share: ImageShare = EVERY_IMAGE
    """The images that `pixels` holds."""
    encoded: dict[str, Tensor] | None = None
    """What frozen towers made of this tensor rank's share of the images before the step began, on the device."""

    def pixels_of(self, share: ImageShare) -> Tensor:
        """Pixels of the images of `share`, a view; not to be called for none.

        Raises:
            ValueError: they were not loaded on this rank.
        """
        wanted, held = share.of(self), self.pixel_share.of(self)
        if self.pixels is None or share.every % self.pixel_share.every or wanted[0] not in held:
            raise ValueError(f"samples {self.sample_ids}: images {wanted} are wanted, pixels hold {held}")
        return self.pixels[held.index(wanted[0]) :: share.every // self.pixel_share.every]

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on `device`; pinned memory is copied without waiting.

        Fills in `learnt`: here labels are still on the host, while their number on a GPU must be waited for.
        """
        tensors = dict(self._tensors())
        if self.learnt is None and not self.labels.is_cuda:
            learnt = (self.labels != IGNORE).nonzero().squeeze(1)
            tensors["learnt"] = learnt.pin_memory() if device.type == "cuda" else learnt
        moved: dict[str, Any] = {name: v.to(device, non_blocking=True) for name, v in tensors.items()}
        return replace(self, **moved)

    def pin_memory(self) -> "MicroBatch":
        """A copy in pinned memory (called by torch's DataLoader)."""
        pinned: dict[str, Any] = {name: v.pin_memory() for name, v in self._tensors()}
        return replace(self, **pinned)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return [(name, v) for name, v in pairs if isinstance(v, Tensor)]


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """All micro-batches of one global step for one data-parallel rank."""

    step: int
    """Global step, from 0."""
    language_rows: int
    """Language rows in the whole global batch (every data-parallel rank)."""
    micro_batches: tuple[MicroBatch, ...]
    """In order of execution; equal in t, as the pipeline's buffers need."""
    failed: tuple[str, ...] = ()
    """A sentence for each undecodable image that this rank answers for; its pixels are the background colour."""

    def pin_memory(self) -> "StepBatch":
        """A copy in pinned memory (called by torch's DataLoader)."""
        return replace(self, micro_batches=tuple(m.pin_memory() for m in self.micro_batches))
