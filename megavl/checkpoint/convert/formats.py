"""What a checkpoint format must offer so that it converts from and to every other one.

In: nothing. Out: `Format`, which a format's module fills and `run.py` lists. A format knows `Contents` and itself,
never another format. Casting, side files (`carried.py`), the draft folder, its renaming, verification and
`conversion.json` are the conversion's (`run.py`), not the format's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megavl.checkpoint.convert.contents import Contents
from megavl.config import ParallelConfig

FormatName = Literal["hf-deepseek", "hf-transformers", "megatron-dist", "megatron-ranks"]
Progress = Callable[[int], None]
"""Called with the bytes just written, from any thread."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What a user can choose about the target."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of rank files: `tensor`, `pipeline`, `virtual_pipeline`, `layout`; the other formats have none."""
    names: Literal["4.56", "5"] = "5"
    """Version of transformers whose tensor names `hf-transformers` gets."""
    drop_unused: bool = False
    """Leave `Contents.unused` out."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A tensor of the target, or a rank's part of one, for `--dry-run`."""

    name: str
    """Name in the target."""
    shape: tuple[int, ...]
    """Shape there."""
    dtype: torch.dtype
    """Type there."""
    file: str
    """File of the target's folder."""
    part: str = ""
    """Which part of the whole tensor, such as `rows 0..2047`; empty: all of it."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A checkpoint format."""

    name: FormatName
    """As `--to` spells it."""
    detect: Callable[[Path], bool]
    """Whether a path looks like this format; cheap, never raises, true for a damaged one."""
    read: Callable[[Path], Contents]
    """Names, shapes and types now, values later. Raises CheckpointError, one sentence with the file."""
    write: Callable[[Contents, Path, WriteOptions, Progress], None]
    """Fill an empty existing folder."""
    plan: Callable[[Contents, WriteOptions], Iterator[Slice]]
    """What `write` would write, in that order, without reading a value. Raises CheckpointError as `write` would."""
    describe: Callable[[Path], str]
    """The layout in words, such as `tensor 2, pipeline 2, layers 8,8,8,6`, for inspection."""
    folder: Callable[[Path], Path] = Path
    """The folder that a path means, where side files lie; raises CheckpointError as `read` does."""
    carries: bool = False
    """Whether `Contents.files` and `Contents.unused` are read and written by the format itself, not as side files."""
