"""Captions and interleaved documents.

In: a record. Out: a `Document`.

- caption: `{"image": "a.jpg", "caption": "..."}`; the text may also be called `text`;
- interleaved: a list of `{"text": "..."}` and `{"image": "a.jpg"}` entries (or plain strings), alone or under
  `content` or `documents`; joined as they are, so the text itself holds its line breaks;
- MMC4: `{"text_list": [...], "image_info": [{"image_name": "a.png", "matched_text_index": 3}]}`: sentences are joined
  by a space, each image stands before the sentence that it was matched to.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavl.data.importers.images import load_image
from megavl.data.sample import Content, Document


def to_caption_document(record: Any, folder: Path, images: Sequence[bytes] = ()) -> Document:
    """Read a caption record; `images` came beside it (WebDataset) and replace those it names.

    Raises:
        ValueError: not exactly one image, no caption, or the image can not be read.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a caption record is an object with image and caption, not {type(record).__name__}")
    caption: Any = next((record[key] for key in ("caption", "text") if key in record), None)
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("empty caption" if isinstance(caption, str) else f"no field caption in {sorted(record)}")
    listed = record.get("image") or record.get("images") or []
    references = list(images) or (listed if isinstance(listed, list) else [listed])
    if len(references) != 1:
        raise ValueError(f"{len(references)} images for one caption")
    return Document(content=(load_image(references[0], folder), caption.strip()))


def to_interleaved(record: Any, folder: Path) -> Document:
    """Read an interleaved document.

    Raises:
        ValueError: unknown form, no text, or an image can not be read.
    """
    entries: Any = record
    if isinstance(record, dict) and "text_list" in record:
        entries = _mmc4_entries(record)
    elif isinstance(record, dict):
        entries = next((record[key] for key in ("content", "documents") if key in record), None)
    if not isinstance(entries, list):
        raise ValueError("an interleaved document is a list of text and image entries, or MMC4's text_list")
    parts = [_part(entry, folder) for entry in entries]
    content: Content = tuple(part for part in parts if part)
    if not any(isinstance(part, str) and part.strip() for part in content):
        raise ValueError("empty document: there is no text in it")
    return Document(content=content)


def _part(entry: Any, folder: Path) -> str | bytes:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return entry["text"]
    if isinstance(entry, dict) and "image" in entry:
        return load_image(entry["image"], folder)
    raise ValueError(f"the entry {entry!r:.60} is neither text nor image")


def _mmc4_entries(record: dict[str, Any]) -> list[Any]:
    sentences = record["text_list"]
    before: dict[int, list[Any]] = {}
    for info in record.get("image_info") or ():
        index = info.get("matched_text_index", 0)
        if not isinstance(index, int) or not 0 <= index < len(sentences):
            raise ValueError(f"an image is matched to sentence {index} of {len(sentences)}")
        before.setdefault(index, []).append({"image": info.get("image_name")})
    entries: list[Any] = []
    for index, sentence in enumerate(sentences):
        entries.extend(before.get(index, ()))
        entries.append(sentence if index == len(sentences) - 1 else f"{sentence} ")
    return entries
