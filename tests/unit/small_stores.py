"""Stores on disk and a recipe for the tests of the data path. Every token id tells which sample it belongs to."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from megavl.config import DataConfig, OptimConfig, ParallelConfig, Recipe, SourceConfig, StageConfig
from megavl.data.store_writer import StoreWriter
from megavl.model.sizes import SIZES

MODEL = SIZES["tiny"]
BOS, EOS, IMAGE = 1, 2, 3
FIRST_ID = 4
TOKENIZER: Any = SimpleNamespace(bos_id=BOS, eos_id=EOS, image_id=IMAGE, vocab_size=500, fingerprint="f")


def png(colour: int) -> bytes:
    """A square image of one grey value."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour,) * 3).save(file, "PNG")
    return file.getvalue()


def write_store(
    prefix: Path, lengths: list[int], images: list[int] | None = None, *, kind: str = "text", bad: tuple[int, ...] = ()
) -> str:
    """Writes samples of `lengths` tokens: begin, images, text of an id that tells the sample, end.

    Args:
        prefix: where.
        lengths: stored tokens of each sample; at least 2 more than its images.
        images: images of each sample; image k of sample i has the grey value (7 * i + k) % 256.
        kind: `text` for a plain corpus.
        bad: samples whose images are not images.
    """
    writer = StoreWriter(prefix, kind=kind, tokenizer_fingerprint="f")
    for i, (length, count) in enumerate(zip(lengths, images or [0] * len(lengths), strict=True)):
        text = length - 2 - count
        tokens = np.array([BOS] + [IMAGE] * count + [FIRST_ID + i % 400] * text + [EOS])
        learn = None if kind == "text" else ~np.isin(tokens, [BOS, IMAGE])
        files = [b"no image" if i in bad else png((7 * i + k) % 256) for k in range(count)]
        writer.add(tokens, learn, files)
    writer.finish()
    return str(prefix)


def make_recipe(sources: tuple[SourceConfig, ...], **fields: Any) -> Recipe:
    """A recipe of the tiny model; `fields` go to the data or the stage section, by their names."""
    data = DataConfig(tokenizer="none", sources=sources, seq_length=64, workers=0)
    stage = StageConfig(number=2, steps=20, global_batch=8, micro_batch=1, seed=7)
    data = replace(data, **{k: v for k, v in fields.items() if hasattr(data, k)})
    stage = replace(stage, **{k: v for k, v in fields.items() if hasattr(stage, k)})
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    return Recipe(run_dir="none", model=MODEL, parallel=ParallelConfig(), data=data, stage=stage, optim=optim)
