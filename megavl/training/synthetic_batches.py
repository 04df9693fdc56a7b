"""Made-up global batches that exercise a layout: text, images, images in some micro-batches only, packed rows.

In: sizes and a case. Out: the micro-batches of a whole global batch, the same whatever the layout; `share` picks those
of one data-parallel rank. Labels are spread very unevenly, some micro-batches have none: a mean of means would show.
Shapes: t tokens of a micro-batch, p positions per image.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from megavl.config import ModelConfig
from megavl.data.microbatch import IGNORE, MicroBatch

Case = Literal["text", "image", "mixed", "packed"]
CASES: tuple[Case, ...] = ("text", "image", "mixed", "packed")
"""`mixed`: images in micro-batches 1 and 5 only, 2 and 6 for an odd seed; at data-parallel size 2 one rank has none."""


def global_batch(
    model: ModelConfig, case: Case, *, micro_batches: int = 8, tokens: int = 64, seed: int = 0
) -> list[MicroBatch]:
    """The micro-batches of a global batch, in global order.

    Args:
        model: sizes; the placeholder's id is the last of the vocabulary.
        case: what they hold.
        micro_batches: how many, over all data-parallel ranks.
        tokens: t, of every micro-batch; must hold three images.
        seed: of tokens and pixels.
    """
    return [_micro_batch(model, case, index, tokens, seed) for index in range(micro_batches)]


def share(batch: Sequence[MicroBatch], data_rank: int, data_size: int) -> tuple[MicroBatch, ...]:
    """The micro-batches of one data-parallel rank, dealt round-robin."""
    own = batch[data_rank::data_size]
    before = accumulate((b.num_images for b in own), initial=0)
    return tuple(replace(b, images_before=images) for b, images in zip(own, before, strict=False))


def _micro_batch(model: ModelConfig, case: Case, index: int, tokens: int, seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    documents = _document_images(case, index, seed)
    lengths = _document_lengths(documents, tokens, model.tokens_per_image)
    ids = torch.randint(0, model.decoder.vocab - 1, (tokens,), generator=generator)
    labels = torch.randint(0, model.decoder.vocab - 1, (tokens,), generator=generator)
    learnt = torch.rand(tokens, generator=generator) < (0.9, 0.0, 0.02)[index % 3]  # of labels: most, none, few
    learnt[-1] = index % 3 == 2  # so that "few" is at least one
    slots = _image_slots(documents, lengths, model.tokens_per_image)
    ids[slots], learnt[slots] = model.decoder.vocab - 1, False
    side, images = model.image_size, sum(documents)
    pixels = torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    return MicroBatch(
        tokens=ids,
        labels=labels.masked_fill(~learnt, IGNORE),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        max_document=max(lengths),
        pixels=pixels if images else None,
        image_slots=slots,
        num_images=images,
        modality=None if case == "packed" else ("multimodal" if images else "language"),
        sample_ids=tuple((case, index) for _ in documents),
    )


def _document_images(case: Case, index: int, seed: int) -> list[int]:
    """Images of each document of a micro-batch."""
    if case == "packed":
        return [[1, 0, 1], [0, 0], [2, 0, 0, 0]][index % 3]
    return [{"text": 0, "image": 1 + index % 3, "mixed": 2 * int(index - seed % 2 in (1, 5))}[case]]


def _document_lengths(documents: list[int], tokens: int, slots_per_image: int) -> list[int]:
    """Lengths that hold the images, the text shared out unevenly; they sum to `tokens`."""
    text = tokens - sum(documents) * slots_per_image
    assert text >= 2 * len(documents), f"{sum(documents)} images do not fit into {tokens} tokens"
    lengths = [images * slots_per_image + 2 + position for position, images in enumerate(documents)]
    lengths[0] += tokens - sum(lengths)
    return lengths


def _image_slots(documents: list[int], lengths: list[int], slots_per_image: int) -> Tensor:
    """Positions of the images, which stand after the first token of their document."""
    slots, start = [torch.zeros(0, dtype=torch.int64)], 0
    for images, length in zip(documents, lengths, strict=True):
        slots.append(torch.arange(start + 1, start + 1 + images * slots_per_image))
        start += length
    return torch.cat(slots)
