"""Samples that exist only in memory, as micro-batches: what evaluation and generation feed the model.

In: conversations or documents, or token ids with their images. Out: micro-batches, made by the very code that makes
those of training, so expansion, labels and pixels cannot differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megavl.config import ModelConfig
from megavl.data.collate import CollateSettings, build_microbatch
from megavl.data.microbatch import EVERY_PIXEL, NO_PIXELS, MicroBatch
from megavl.data.mixture import RowSpec
from megavl.data.prompt import SYSTEM_PROMPT, render_conversation, to_tokens
from megavl.data.rows import Part
from megavl.data.sample import Content, Message
from megavl.data.sequence import expanded_length
from megavl.data.tokenizer import Tokenizer

_SOURCE = "samples"


@dataclass(frozen=True)
class Sample:
    """One sequence with its images."""

    tokens: NDArray[np.int32]
    """Ids with one placeholder per image, [n]."""
    learn: NDArray[np.bool_]
    """Which ids are scored, [n]."""
    images: tuple[bytes, ...]
    """Encoded images in reading order."""


def question_sample(question: Content, answer: str, tokenizer: Tokenizer, system: str = SYSTEM_PROMPT) -> Sample:
    """One turn in the chat template; with an empty answer it is a prompt that asks for one.

    Args:
        question: text and encoded images.
        answer: what the assistant says; its tokens and the end mark are scored.
        tokenizer: of the model.
        system: system prompt; empty for none.
    """
    reply = (answer,) if answer else ()
    segments = render_conversation([Message("User", question), Message("Assistant", reply)], system=system)
    tokens, learn = to_tokens(segments, tokenizer)
    return Sample(tokens, learn, tuple(part for part in question if isinstance(part, bytes)))


def evaluation_settings(model: ModelConfig, tokenizer: Tokenizer, load_pixels: bool = True) -> CollateSettings:
    """How samples become micro-batches for `model`; ranks without towers need no pixels."""
    return CollateSettings(
        image_id=tokenizer.image_id,
        pad_id=tokenizer.eos_id,
        tokens_per_image=model.tokens_per_image,
        image_size=model.image_size,
        background=model.background,
        separate_documents=True,
        pixels=EVERY_PIXEL if load_pixels else NO_PIXELS,
    )


def sample_microbatch(samples: Sequence[Sample], settings: CollateSettings) -> MicroBatch:
    """All `samples` in one micro-batch, each a document of its own, in order.

    Raises:
        ValueError: an image cannot be decoded. Scoring a blank in its place would be a wrong figure.
    """
    store = _Samples(samples)
    rows = [
        RowSpec(
            source=_SOURCE,
            modality="multimodal" if sample.images else "language",
            epoch=0,
            index=index,
            parts=(Part(index, 0, len(sample.tokens)),),
            length=expanded_length(len(sample.tokens), len(sample.images), settings.tokens_per_image),
            num_images=len(sample.images),
        )
        for index, sample in enumerate(samples)
    ]
    batch, failed = build_microbatch(rows, {_SOURCE: store}, settings)
    if failed:
        raise ValueError(failed[0])
    return batch


def batched(samples: Sequence[Sample], settings: CollateSettings, max_tokens: int) -> Iterator[list[int]]:
    """Indices of `samples` in order, cut into groups of at most `max_tokens` expanded tokens (at least one sample)."""
    group: list[int] = []
    total = 0
    for index, sample in enumerate(samples):
        length = expanded_length(len(sample.tokens), len(sample.images), settings.tokens_per_image)
        if group and total + length > max_tokens:
            yield group
            group, total = [], 0
        group.append(index)
        total += length
    if group:
        yield group


class _Samples:
    """`megavl.data.rows.SampleStore` over a list."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.manifest: dict[str, Any] | None = {"kind": "samples"}
        self.num_samples = len(samples)
        self.lengths = np.array([len(sample.tokens) for sample in samples], dtype=np.int64)
        self.image_counts = np.array([len(sample.images) for sample in samples], dtype=np.int32)

    def tokens_slice(self, i: int, start: int, stop: int, /) -> NDArray[np.int32]:
        return self._samples[i].tokens[start:stop]

    def learn(self, i: int, /) -> NDArray[np.bool_]:
        return self._samples[i].learn

    def images(self, i: int, /) -> list[bytes]:
        return list(self._samples[i].images)
