"""Input files to items: one JSON record, one document of text, or one WebDataset sample each.

In: paths of `.json`, `.jsonl`, text files or folders of them. Out: items in file order, each with a name for messages.
A line is parsed later, in a worker process, so a broken line costs that line and nothing else. JSON Lines are read line
by line; a `.json` file is read whole.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megavl.data.sample import Rejected


@dataclass(frozen=True)
class Item:
    """One input, not parsed yet."""

    origin: str
    """Where it comes from: `file:line`, `file[index]`, `tar:key`, or a file name."""
    folder: Path
    """Where relative image paths start."""
    content: Any
    """A JSON line or a text as bytes, a parsed record, or the members of a WebDataset sample."""


def find_files(inputs: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Input files, folders replaced by the files in them (sorted, by suffix).

    Raises:
        ValueError: no input is given, one does not exist, or a folder holds nothing of the kind.
    """
    if not inputs:
        raise ValueError("no input file or folder is given")
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            if not inside:
                raise ValueError(f"{path}: no {' or '.join(suffixes)} file in this folder")
            files.extend(inside)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    return files


def read_records(path: Path, image_root: Path | None = None) -> Iterator[Item | Rejected]:
    """Records of a JSON or JSON Lines file."""
    folder = image_root or path.parent
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _read_lines(path, folder)
        return
    try:
        loaded = json.loads(decode_text(path.read_bytes()))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one record a line, under the name .json
            yield from _read_lines(path, folder)
        else:
            yield Rejected(str(path), f"not JSON ({error})")
        return
    except (ValueError, RecursionError) as error:  # the latter: brackets a thousand deep
        yield Rejected(str(path), str(error))
        return
    if _is_record(loaded):
        yield Item(str(path), folder, loaded)
        return
    for index, record in enumerate(loaded):
        yield Item(f"{path}[{index}]", folder, record)


def _is_record(loaded: Any) -> bool:
    # A list of messages is one conversation (the reference code's format), any other list holds records.
    if not isinstance(loaded, list):
        return True
    return bool(loaded) and isinstance(loaded[0], dict) and bool({"role", "from"} & set(loaded[0]))


def _read_lines(path: Path, folder: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Item(f"{path}:{number}", folder, line)


def read_texts(path: Path, split: Literal["files", "lines"]) -> Iterator[Item | Rejected]:
    """Documents: the records of a JSON Lines file; otherwise the whole file, or each line that is not blank."""
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        yield from read_records(path)
    elif split == "lines":
        yield from _read_lines(path, path.parent)
    else:
        yield Item(str(path), path.parent, path.read_bytes())


def parse(content: Any) -> Any:
    """A record from a JSON line; a record that is parsed already stays as it is.

    Raises:
        ValueError: broken UTF-8 or JSON.
    """
    if not isinstance(content, bytes):
        return content
    try:
        return json.loads(decode_text(content))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error


def decode_text(content: bytes) -> str:
    """UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: broken UTF-8; says where.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"broken UTF-8 at byte {error.start} of {len(content)}") from error
