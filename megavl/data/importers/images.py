"""Where records point to images: paths, `data:` URIs, bytes out of a tar. Text with tags: where the images go.

In: a reference from a record, or text with one placeholder per image. Out: the encoded bytes as they were found, once
they have been decoded in full to see that they can be; and content with images in place of placeholders.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavl.data.pixels import decode_image
from megavl.data.sample import Content
from megavl.data.tokenizer import IMAGE_NAME

REFERENCE_TAGS = (IMAGE_NAME,)
"""Placeholder of the reference code."""
ALL_TAGS = (IMAGE_NAME, "<image>")
"""With LLaVA's and ShareGPT's."""


def load_image(reference: Any, folder: Path) -> bytes:
    """Encoded bytes of an image, verified by decoding all of it.

    Args:
        reference: path (relative to `folder` or absolute), `data:image/...;base64,...`, or bytes.
        folder: where relative paths start.

    Raises:
        ValueError: not found, not readable, or not an image that can be decoded.
    """
    if isinstance(reference, bytes):
        name, data = "image", reference
    elif not isinstance(reference, str) or not reference:
        raise ValueError(f"an image is given as {reference!r:.80}, not as a path or a data: URI")
    elif reference.startswith("data:"):
        name, data = "image in a data: URI", _decode_uri(reference)
    elif reference.startswith(("http://", "https://")):
        raise ValueError(f"image {reference} is a URL; download it first")
    else:
        name, data = str(folder / reference), _read(folder / reference)
    decode_image(data, source=name)
    return data


def _decode_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"image {head:.40}: only base64 data: URIs can be read")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"image {head:.40}: broken base64 ({error})") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte in the name
        raise ValueError(f"{str(path)!r}: {error}") from error


def place_images(texts: Sequence[str], references: Sequence[Any], tags: Sequence[str], folder: Path) -> list[Content]:
    """Replace the placeholders of several texts by images, in reading order.

    Args:
        texts: the messages of a conversation, or the one text of a document.
        references: images as `load_image` takes them.
        tags: what counts as a placeholder, `<image_placeholder>` or LLaVA's `<image>`.
        folder: where relative paths start.

    Raises:
        ValueError: placeholders and images differ in number (no image is read then), or an image can not be read.
    """
    pattern = re.compile("|".join(re.escape(tag) for tag in tags))
    pieces = [pattern.split(text) for text in texts]
    wanted = sum(len(p) - 1 for p in pieces)
    if wanted != len(references):
        raise ValueError(f"{wanted} placeholders ({' or '.join(tags)}) in the text, {len(references)} images given")
    images = iter([load_image(reference, folder) for reference in references])
    contents: list[Content] = []
    for first, *rest in pieces:
        content: list[str | bytes] = [first]
        for part in rest:
            content.extend((next(images), part))
        contents.append(tuple(part for part in content if part))
    return contents
