"""From an item to what the store keeps: the work of one worker process.

In: an `Item`. Out: `Encoded` (token ids, learn flags, verified images) or `Rejected` with one sentence. It depends on
the item alone, so the number of processes does not show in the store.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megavl.data.importers.conversations import to_caption, to_conversation
from megavl.data.importers.documents import to_caption_document, to_interleaved
from megavl.data.importers.records import Item, decode_text, parse
from megavl.data.importers.webdataset import to_webdataset_sample
from megavl.data.prompt import render, to_tokens
from megavl.data.sample import Conversation, Rejected, Sample, images_of
from megavl.data.sequence import expanded_length
from megavl.data.tokenizer import Tokenizer

Kind = Literal["text", "conversations", "captions", "interleaved", "webdataset"]
DEFAULT_TEMPLATE: dict[str, str] = {
    "text": "plain",
    "conversations": "deepseek",
    "captions": "alignment",
    "interleaved": "plain",
    "webdataset": "alignment",
}


@dataclass(frozen=True)
class Encoded:
    """A sample as the store keeps it."""

    origin: str
    """Where it comes from."""
    tokens: NDArray[np.int32]
    """Ids, [n], one placeholder per image."""
    learn: NDArray[np.bool_]
    """Targets, [n]."""
    images: tuple[bytes, ...]
    """Encoded images in reading order."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What all items of a build have in common; pickled once per worker."""

    kind: Kind
    """What the inputs are."""
    tokenizer: Tokenizer
    """Makes the ids."""
    template: str
    """`deepseek`, `alignment` or `plain`."""
    text_key: str
    """Field of a JSON record of kind `text`."""
    max_length: int
    """Longest sample in tokens after expansion; 0: any length."""
    tokens_per_image: int
    """Positions that an image takes, for `max_length`."""

    def __call__(self, item: Item | Rejected) -> Encoded | Rejected:
        """Encode one item; every fault of the input becomes a `Rejected`."""
        if isinstance(item, Rejected):
            return item
        try:
            return self._text(item) if self.kind == "text" else self._multimodal(item)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            # ValueError is a finding; the others are records whose fields have types nobody meant.
            named = (
                str(error) if isinstance(error, ValueError) else f"malformed record ({type(error).__name__}: {error})"
            )
            return Rejected(item.origin, named)

    def _text(self, item: Item) -> Encoded:
        content = item.content
        if isinstance(content, bytes) and _is_json(item.origin):
            content = parse(content)
        if isinstance(content, bytes):
            text = decode_text(content).replace("\r\n", "\n").rstrip("\n")
        else:
            if not isinstance(content, dict) or not isinstance(content.get(self.text_key), str):
                raise ValueError(f"no text under the field {self.text_key!r}")
            text = content[self.text_key]
        if not text.strip():
            raise ValueError("empty document")
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text), self.tokenizer.eos_id]
        return Encoded(item.origin, np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool), ())

    def _multimodal(self, item: Item) -> Encoded:
        sample = self._sample(item)
        if isinstance(sample, Conversation) and self.template != "deepseek":
            sample = to_caption(sample)
        tokens, learn = to_tokens(render(sample, self.template), self.tokenizer)
        images = images_of(sample)
        length = expanded_length(len(tokens), len(images), self.tokens_per_image)
        if self.max_length and length > self.max_length:
            raise ValueError(f"{length} tokens with {len(images)} images, the longest allowed is {self.max_length}")
        return Encoded(item.origin, tokens, learn, tuple(images))

    def _sample(self, item: Item) -> Sample:
        if self.kind == "webdataset":
            return to_webdataset_sample(item.content, item.folder)
        record = parse(item.content)
        if self.kind == "conversations":
            return to_conversation(record, item.folder)
        return (
            to_caption_document(record, item.folder) if self.kind == "captions" else to_interleaved(record, item.folder)
        )


def _is_json(origin: str) -> bool:
    return origin.rpartition(":")[0].lower().endswith((".json", ".jsonl", ".ndjson"))
