"""English text of the running Python: the language corpus of the quickstart.

In: the standard library of the interpreter that runs this file (`pydoc_data.topics` and every docstring of its source
files, found with `ast`, so no module is imported and nothing runs).
Out: documents in a fixed order, each with a name, and the split they belong to.
"""

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from pydoc_data import topics
from typing import Literal, TypeVar

Item = TypeVar("Item")
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
}
_MIN_CHARACTERS = 60
_VALIDATION_PERCENT = 4
_TEST_PERCENT = 5


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of the corpus."""

    name: str
    """What it documents: `topic for`, `json.dumps`, `collections.Counter.most_common`."""
    text: str
    """The text, dedented, without trailing blanks."""

    @property
    def split(self) -> Split:
        """Decided by the hash of the text alone, so equal texts cannot be on both sides."""
        return split_of(self.text)

    @property
    def paragraphs(self) -> list[str]:
        """Its paragraphs, each on one line."""
        return [" ".join(p.split()) for p in re.split(r"\n\s*\n", self.text) if p.strip()]


def split_of(text: str) -> Split:
    """The split of a text: 4% validation, 5% test, the rest for training."""
    percent = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    if percent < _VALIDATION_PERCENT:
        return "validation"
    return "test" if percent < _VALIDATION_PERCENT + _TEST_PERCENT else "train"


def part(items: Sequence[Item], share: float) -> list[Item]:
    """The first items, `share` of all."""
    return list(items[: ceil(share * len(items))])


def documents() -> list[Document]:
    """All documents, each text once, in the order topics, then source files by path.

    Raises:
        ValueError: the interpreter has no readable documentation (a stripped installation).
    """
    found: dict[str, Document] = {}
    for document in (*_topics(), *_docstrings(Path(sysconfig.get_paths()["stdlib"]))):
        if len(document.text) >= _MIN_CHARACTERS:
            found.setdefault(document.text, document)
    characters = sum(len(text) for text in found)
    if characters < 1_000_000:
        raise ValueError(
            f"this Python's documentation has {characters} characters, the quickstart needs 1000000: "
            "its standard library was installed without sources or docstrings"
        )
    return list(found.values())


def _topics() -> Iterator[Document]:
    for name, text in sorted(topics.topics.items()):
        yield Document(name=f"topic {name}", text=_clean(text))


def _docstrings(library: Path) -> Iterator[Document]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED_FOLDERS & set(parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):  # files that exist to be broken
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield from _of_node(tree, module)


def _of_node(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Document]:
    if text := ast.get_docstring(node):
        yield Document(name=name, text=_clean(text))
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _of_node(child, f"{name}.{child.name}")


def _clean(text: str) -> str:
    lines = (line.rstrip() for line in textwrap.dedent(text).expandtabs(4).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
