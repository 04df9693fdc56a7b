"""WebDataset tars: files that share a name up to the first dot are one sample.

In: paths of tars, read as a stream and never unpacked to disk. Out: one item per sample, its members in the order of
the tar; then a `Document` (image and `.txt`, or `.json` with a caption) or a `Conversation` (`.json` with messages).
A name that points outside, or a link, is refused together with its sample. A tar that ends too early loses what is
missing, no more.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from megavl.data.importers.conversations import to_conversation
from megavl.data.importers.documents import to_caption_document
from megavl.data.importers.records import Item, decode_text, parse
from megavl.data.sample import Rejected, Sample

_IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
MAX_MEMBER = 256 * 2**20
"""Largest file that is read out of a tar, in bytes: a few kilobytes of a compressed tar may unpack to any size."""
Members = tuple[tuple[str, bytes], ...]
"""(suffix in lower case, content) of each file of a sample."""


def read_tar(path: Path) -> Iterator[Item | Rejected]:
    """Samples of a tar, in order; consecutive files with one key belong together."""
    key, members, refused = "", [], ""  # type: str, list[tuple[str, bytes]], str
    try:
        with tarfile.open(path, mode="r|*") as tar:
            for member in tar:
                if member.isdir():
                    continue
                reason = _refusal(member)
                stem, suffix = _split(member.name)
                if stem != key:
                    yield from _sample(path, key, members, refused)
                    key, members, refused = stem, [], ""
                refused = refused or reason
                if not reason:
                    members.append((suffix, _read(tar, member)))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        yield Rejected(f"{path}:{key}" if key else str(path), f"the tar is damaged or cut short ({error})")
        return
    yield from _sample(path, key, members, refused)


def _sample(path: Path, key: str, members: list[tuple[str, bytes]], refused: str) -> Iterator[Item | Rejected]:
    if refused:
        yield Rejected(f"{path}:{key}", refused)
    elif members:
        yield Item(f"{path}:{key}", path.parent, tuple(members))


def _refusal(member: tarfile.TarInfo) -> str:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        return f"the tar holds a name that points outside: {member.name!r}"
    if not member.isreg():
        return f"{member.name!r} is a link or device, not a file"
    if member.size > MAX_MEMBER:
        return f"{member.name!r} has {member.size} bytes, the limit is {MAX_MEMBER}"
    return ""


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = file.read() if file else b""
    if len(content) != member.size:
        raise EOFError(f"{member.name}: {len(content)} bytes of {member.size}")
    return content


def to_webdataset_sample(members: Members, folder: Path) -> Sample:
    """Read the members of a sample.

    Raises:
        ValueError: no image, no text, or one of them can not be read.
    """
    images = [content for suffix, content in members if suffix.rpartition(".")[2] in _IMAGE_SUFFIXES]
    files = dict(members)
    if "json" in files:
        record: Any = parse(files["json"])
        if isinstance(record, list) or (isinstance(record, dict) and {"conversations", "messages"} & set(record)):
            return to_conversation(record, folder, images)
        if "txt" not in files:
            return to_caption_document(record, folder, images)
    if "txt" not in files:
        raise ValueError(f"neither .txt nor .json beside {', '.join(suffix for suffix, _ in members)}")
    return to_caption_document({"caption": decode_text(files["txt"])}, folder, images)
