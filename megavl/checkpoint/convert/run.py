"""A conversion from start to end: recognise, check, write beside, verify, rename.

In: a checkpoint of any format and what the target should be. Out: the target, complete, or nothing. Everything is
written into a hidden folder beside the target, which gets its name when it has been verified; what an interruption
leaves there is removed by the next run. While one conversion makes a target, others refuse.
"""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megavl.checkpoint.convert import carried, hf_files
from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import Format, FormatName, Progress, Slice, WriteOptions
from megavl.checkpoint.convert.lazy import cast
from megavl.checkpoint.convert.shapes import check_types
from megavl.checkpoint.convert.target_lock import locked
from megavl.checkpoint.convert.verify import all_tensors, compare
from megavl.checkpoint.folder import CheckpointError, check_space

_HOMES: dict[FormatName, tuple[str, str]] = {
    "hf-deepseek": ("hf_folder", "DEEPSEEK"),
    "hf-transformers": ("hf_folder", "TRANSFORMERS"),
    "megatron-ranks": ("ranks", "FORMAT"),
    "megatron-dist": ("dist", "FORMAT"),
}
"""Where each format is defined, in the order in which a path is tried; megatron-core (6 s) is imported only if used."""
FORMATS = tuple(_HOMES)
"""Names of all formats."""

RECORD = "conversion.json"
"""What was done, in the target's folder."""

Bar = Callable[[str, int], AbstractContextManager[Progress]]
"""(what is going on, bytes in all) -> where progress is reported."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for."""

    source: Path
    """Checkpoint of any format."""
    target: Path
    """Folder that does not exist yet."""
    to: FormatName
    """Format of the target."""
    options: WriteOptions = field(default_factory=WriteOptions)
    """Layout, names, unused tensors."""
    dtype: torch.dtype | None = None
    """Type of the weights in the target; None: as they are."""
    tokenizer: Path | None = None
    """Tokenizer that replaces the source's."""
    verify: bool = True
    """Read the target back and compare it with the source."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion that can be done."""

    source: dict[str, Any]
    """`format` and whatever else tells where it comes from, for `conversion.json`."""
    target: Format
    """Format of the target."""
    contents: Contents
    """What will be written."""
    slices: list[Slice]
    """Where it goes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the target."""
        return sum(torch.Size(part.shape).numel() * part.dtype.itemsize for part in self.slices)


def get_format(name: FormatName) -> Format:
    """A format by its name."""
    module, attribute = _HOMES[name]
    return getattr(import_module(f"megavl.checkpoint.convert.{module}"), attribute)


def find_format(path: Path) -> Format:
    """The format of a checkpoint.

    Raises:
        CheckpointError: it is none that is known.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    for name in FORMATS:
        known = get_format(name)
        if known.detect(path):
            return known
    raise CheckpointError(f"{path}: not a checkpoint of any known format ({', '.join(FORMATS)})")


def open_checkpoint(path: Path) -> tuple[Format, Contents]:
    """A checkpoint of any format, with what lies beside it.

    Raises:
        CheckpointError: unknown or damaged.
    """
    found = find_format(path)
    contents = found.read(path)
    if not found.carries:
        folder = found.folder(path)
        contents = replace(contents, unused=carried.read_unused(folder), files=carried.read_files(folder))
    return found, contents


def plan(request: Request) -> Plan:
    """Read the source's description and lay out the target; nothing is written.

    Raises:
        CheckpointError: the source is damaged, or cannot become what is asked for.
    """
    _check_target(request)
    source, contents = open_checkpoint(request.source)
    return plan_contents(contents, {"format": source.name, "path": str(request.source.resolve())}, request)


def plan_contents(contents: Contents, source: dict[str, Any], request: Request) -> Plan:
    """Lay out the target of contents that are open already.

    Args:
        contents: what to write.
        source: where they come from.
        request: what the target should be.

    Raises:
        CheckpointError: they cannot become what is asked for.
    """
    target = get_format(request.to)
    contents = _prepare(contents, request, target)
    slices = list(target.plan(contents, request.options))
    if not target.carries:
        slices += [Slice(name=n, shape=t.shape, dtype=t.dtype, file=carried.UNUSED) for n, t in contents.unused.items()]
    return Plan(source=source, target=target, contents=contents, slices=slices)


def _check_target(request: Request) -> None:
    source, target = request.source.resolve(), request.target.resolve()
    _check_new(request.target)
    if source == target or source in target.parents:
        raise CheckpointError(f"{request.target}: lies inside the source {request.source}, which is left as it is")


def _check_new(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target}: exists already, a conversion makes a new folder")


def _prepare(contents: Contents, request: Request, target: Format) -> Contents:
    """The source as the target will hold it."""
    training = None if target.carries else contents.training  # the Hugging Face formats hold no training state
    tensors, unused = contents.tensors, {} if request.options.drop_unused else contents.unused
    if request.dtype is None:
        check_types(tensors)
    elif training is not None and training.optimizer:
        raise CheckpointError("--dtype changes weights that the optimizer's state belongs to; leave it out")
    else:
        tensors, unused = ({name: cast(t, request.dtype) for name, t in part.items()} for part in (tensors, unused))
    files = hf_files.with_tokenizer(contents.files, request.tokenizer) if request.tokenizer else contents.files
    return replace(contents, tensors=tensors, unused=unused, files=files, training=training)


def convert(request: Request, bar: Bar) -> dict[str, Any]:
    """Make the target.

    Args:
        request: what to do.
        bar: shows progress.

    Returns:
        What `conversion.json` says.

    Raises:
        CheckpointError: it cannot be done; nothing of it is left and the source is as before.
    """
    return carry_out(plan(request), request, bar)


_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def carry_out(planned: Plan, request: Request, bar: Bar) -> dict[str, Any]:
    """`convert` from its plan on."""
    parent, draft = request.target.absolute().parent, _draft(request.target)
    _return_freed_memory()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with locked(request.target):
            _check_new(request.target)  # since it was planned, another conversion may have made it
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was interrupted
            try:
                return _make(draft, planned, request, bar)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CheckpointError(f"{request.target}: {'the disk is full' if full else error}") from None


def _return_freed_memory() -> None:
    """Have glibc give blocks of 1 MiB and more back when they are freed.

    By itself it keeps blocks of up to 32 MiB, and small objects between them hold the heap apart: 2.7 GB at the end of
    a verified 1.3B.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _draft(target: Path) -> Path:
    """Where a target is written until it is complete."""
    return target.absolute().with_name(f".{target.name}.incomplete")


def _make(draft: Path, planned: Plan, request: Request, bar: Bar) -> dict[str, Any]:
    """The target by way of its draft; returns what `conversion.json` says."""
    parent = draft.parent
    files = sum(file.stat().st_size for file in planned.contents.files.values())
    check_space(parent, planned.nbytes + files)
    draft.mkdir()
    record = _fill(draft, planned, request, bar)
    _sync([draft, *draft.rglob("*")])
    draft.rename(request.target)
    _sync([parent])
    return record


def _fill(draft: Path, planned: Plan, request: Request, bar: Bar) -> dict[str, Any]:
    contents = planned.contents
    with bar(f"writing {planned.target.name}", planned.nbytes) as progress:
        planned.target.write(contents, draft, request.options, progress)
        if not planned.target.carries:
            carried.write_unused(contents, draft, progress)
            carried.write_files(contents, draft)
    record = _describe(planned, request)
    if request.verify:
        with bar("verifying", sum(tensor.nbytes for _, tensor in all_tensors(contents))) as progress:
            record["verified"] = compare(contents, open_checkpoint(draft)[1], progress)
    (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def _describe(planned: Plan, request: Request) -> dict[str, Any]:
    contents, options = planned.contents, request.options
    layout = options.parallel
    return {
        "source": planned.source,
        "target": {
            "format": planned.target.name,
            "names": options.names if planned.target.name == "hf-transformers" else None,
            "layout": {n: getattr(layout, n) for n in ("tensor", "pipeline", "virtual_pipeline", "layout")}
            if planned.target.name == "megatron-ranks"
            else None,
        },
        "dtype": str(request.dtype).removeprefix("torch.") if request.dtype else "as in the source",
        "model": asdict(contents.model),
        "tensors": len(contents.tensors),
        "unused": len(contents.unused),
        "bytes": planned.nbytes,
        "step": contents.training.step if contents.training else None,
        "versions": {name: _version(name) for name in ("megavl", "torch", "megatron-core")},
        "verified": None,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _sync(paths: Iterable[Path]) -> None:
    """Make files, and the names in folders, survive a power failure."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
