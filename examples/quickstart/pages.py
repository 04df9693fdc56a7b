"""Text rendered as small pages, each with its transcript: the document-OCR pairs of the quickstart.

In: documents of one split of the corpus. Out: grey PNG pages of 64x64 pixels in several layouts and sizes, drawn with
the scalable font inside PIL, and the text that is on them.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from corpus import Document
from digits import SIDE, encode
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How text is set on a page."""

    name: str
    """How the report calls it."""
    sizes: tuple[int, ...]
    """Font sizes to choose from, in pixels."""
    lines: int
    """Most lines on the page."""
    centred: bool
    """Lines centred, or flush left with a margin."""


LAYOUTS = (
    Layout(name="one word", sizes=(20, 22, 24), lines=1, centred=True),
    Layout(name="two lines", sizes=(15, 16, 18), lines=2, centred=False),
    Layout(name="small print", sizes=(10, 11), lines=5, centred=False),
)
"""From large and easy to what a real page looks like at this resolution."""

QUESTIONS = ("Transcribe the page.", "What does the page say?", "Read the text.")
"""Questions about a page; the answer is the transcript."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A rendered page."""

    png: bytes
    """Encoded grey image, 64x64."""
    text: str
    """What is on it; lines of the page are joined with a space."""
    layout: str
    """Name of its layout."""


def pages(documents: Sequence[Document], layout: Layout, count: int, seed: int = 0) -> list[Page]:
    """`count` pages cut from random places of `documents`.

    Args:
        documents: what to take the words from; held-out pages come from held-out documents.
        layout: how the words are set.
        count: pages wanted.
        seed: of places, sizes and shades.
    """
    rng = random.Random(f"{seed} {layout.name}")
    words = [re.findall(r"[A-Za-z]{2,}", document.text) for document in documents]
    words = [w for w in words if len(w) >= 12]
    made: list[Page] = []
    while len(made) < count:
        source = rng.choice(words)
        start = rng.randrange(len(source) - 8)
        if page := _render(source[start : start + 20], layout, rng):
            made.append(page)
    return made


def _render(words: Sequence[str], layout: Layout, rng: random.Random) -> Page | None:
    """Set as many of `words` as fit; None where the first does not fit on a line."""
    size = rng.choice(layout.sizes)
    font = ImageFont.load_default(size)
    margin = rng.randint(2, 4)
    width = SIDE - 2 * margin
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and layout.lines > 1 and font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < layout.lines and font.getlength(word) <= width:
            lines.append(word)
        else:
            break
    if len(lines) < min(layout.lines, 2):
        return None
    image = Image.new("L", (SIDE, SIDE), rng.randint(235, 255))
    draw = ImageDraw.Draw(image)
    pitch = size + rng.randint(1, 3)
    spare = SIDE - pitch * len(lines)
    top = spare // 2 + rng.randint(-3, 3) if layout.centred else max(0, min(margin, spare))
    ink = rng.randint(0, 60)
    for number, line in enumerate(lines):
        left = (SIDE - font.getlength(line)) / 2 if layout.centred else margin
        draw.text((left, top + number * pitch), line, font=font, fill=ink)
    return Page(png=encode(image), text=" ".join(lines), layout=layout.name)
