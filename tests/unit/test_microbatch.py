"""A micro-batch against reading its samples one by one."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import BOS, EOS, FIRST_ID, IMAGE, MODEL, write_store

from megavl.config import SourceConfig
from megavl.data.collate import CollateSettings, build_microbatch
from megavl.data.microbatch import EVERY_PIXEL, IGNORE, NO_PIXELS, MicroBatch, StepBatch
from megavl.data.mixture import RowSpec, row_spec
from megavl.data.parcel import wrap
from megavl.data.rows import UNSHUFFLED, Part, StreamRows
from megavl.data.store import Store

P = MODEL.tokens_per_image
PICTURES = SourceConfig(name="pictures", path="", modality="multimodal", share=0.5)
TEXT = SourceConfig(name="text", path="", modality="language", share=0.5)
IMAGES = [0, 1, 2, 3, 1, 0, 2]
LENGTHS = [6, 9, 12, 8, 5, 20, 7]
CORPUS = [5, 3, 17, 4, 40, 2, 9]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stores")
    pictures = write_store(folder / "pictures", LENGTHS, IMAGES, kind="caption", bad=(4,))
    return {"pictures": Store(pictures), "text": Store(write_store(folder / "text", CORPUS))}


def make_settings(**fields: Any) -> CollateSettings:
    values: dict[str, Any] = {
        "image_id": IMAGE,
        "pad_id": EOS,
        "tokens_per_image": P,
        "image_size": MODEL.image_size,
        "background": (10, 20, 30),
        "separate_documents": True,
        "pixels": EVERY_PIXEL,
    }
    return CollateSettings(**{**values, **fields})


def pictures_row(stores: dict[str, Any], samples: list[int]) -> RowSpec:
    parts = tuple(Part(s, 0, LENGTHS[s]) for s in samples)
    return row_spec(PICTURES, 0, 0, parts, stores["pictures"], P)


def plain_sample(store: Store, sample: int) -> tuple[list[int], list[int]]:
    """Tokens and labels of one sample, written out token by token."""
    tokens: list[int] = []
    learnt: list[bool] = []
    for token, learn in zip(store.tokens(sample).tolist(), store.learn(sample).tolist(), strict=True):
        repeat = P if token == IMAGE else 1
        tokens += [token] * repeat
        learnt += [learn and token != IMAGE] * repeat
    labels = [t if k else IGNORE for t, k in zip(tokens[1:], learnt[1:], strict=True)] + [IGNORE]
    return tokens, labels


def documents(batch: MicroBatch) -> list[slice]:
    bounds = batch.cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]


@given(
    rows=st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 5, 6]), min_size=1, max_size=4), min_size=1, max_size=3),
    padding=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_packed_documents_equal_the_samples_alone(stores: dict[str, Any], rows: list[list[int]], padding: int) -> None:
    specs = [pictures_row(stores, r) for r in rows]
    length = sum(s.length for s in specs)
    batch, failed = build_microbatch(specs, stores, make_settings(), length + padding)
    samples = [s for r in rows for s in r]
    pieces = documents(batch)
    assert not failed
    assert len(pieces) == len(samples) + (padding > 0)
    for sample, piece in zip(samples, pieces, strict=False):
        tokens, labels = plain_sample(stores["pictures"], sample)
        assert batch.tokens[piece].tolist() == tokens
        assert batch.labels[piece].tolist() == labels
        assert batch.positions[piece].tolist() == list(range(len(tokens)))
    assert batch.max_document == max(p.stop - p.start for p in pieces)
    assert batch.cu_seqlens.diff().min() > 0
    assert batch.cu_seqlens[-1] == len(batch.tokens) == length + padding
    assert (batch.labels[length:] == IGNORE).all()
    assert batch.num_images == sum(IMAGES[s] for s in samples)
    assert torch.equal(batch.image_slots, torch.nonzero(batch.tokens == IMAGE).flatten())
    assert len(batch.image_slots) == P * (0 if batch.pixels is None else len(batch.pixels))
    assert batch.sample_ids == tuple(("pictures", s) for s in samples)


def test_images_are_those_of_the_sample_in_reading_order(stores: dict[str, Any]) -> None:
    batch, _ = build_microbatch([pictures_row(stores, [3, 1]), pictures_row(stores, [2])], stores, make_settings())
    assert batch.pixels is not None
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels[:, 0, 0, 0].tolist() == [21, 22, 23, 7, 14, 15]  # painted by `write_store`


def test_ranks_without_towers_see_the_same_but_pixels(stores: dict[str, Any]) -> None:
    rows = [pictures_row(stores, [3, 4])]
    batch, failed = build_microbatch(rows, stores, make_settings())
    blind, nothing = build_microbatch(rows, stores, make_settings(pixels=NO_PIXELS))
    assert blind.pixels is None
    assert not nothing
    assert blind.num_images == batch.num_images == 4
    for name in ("tokens", "labels", "positions", "cu_seqlens", "image_slots"):
        assert torch.equal(getattr(batch, name), getattr(blind, name))
    # Sample 4 has an image that can not be decoded.
    assert len(failed) == 1
    assert "source pictures, sample 4, image 0" in failed[0]
    assert batch.pixels is not None
    assert batch.pixels[3, :, 5, 5].tolist() == [10, 20, 30]


def test_one_causal_sequence_per_row(stores: dict[str, Any]) -> None:
    rows = [pictures_row(stores, [0, 5]), pictures_row(stores, [0])]
    batch, _ = build_microbatch(rows, stores, make_settings(separate_documents=False))
    assert batch.cu_seqlens.tolist() == [0, 26, 32]
    assert batch.positions.tolist() == [*range(26), *range(6)]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("seq_length", [5, 7, 8, 16, 200])  # rows of 5 and 8 begin where documents do
def test_rows_of_a_corpus_equal_the_joined_stream(stores: dict[str, Any], separate: bool, seq_length: int) -> None:
    store = stores["text"]
    rows = StreamRows(store, seq_length, key=3)
    stream = np.concatenate([store.tokens(d) for d in range(len(CORPUS))])
    ends = set(np.cumsum(CORPUS).tolist())
    at = 0
    for index in range(rows.num_rows):
        spec = row_spec(TEXT, 0, index, rows.parts(UNSHUFFLED, [index])[0], store, P)
        batch, _ = build_microbatch([spec], stores, make_settings(separate_documents=separate))
        assert batch.tokens.tolist() == stream[at : at + seq_length].tolist()
        last_of_document = [at + i + 1 in ends for i in range(len(batch.tokens))]
        following = [*stream[at + 1 : at + seq_length + 1].tolist(), IGNORE][: len(batch.tokens)]
        expected = following
        if separate:
            expected = [IGNORE if e else f for e, f in zip(last_of_document, following, strict=True)]
        elif last_of_document[-1]:
            expected = [*following[:-1], IGNORE]  # what follows is in the next row, another document
        assert batch.labels.tolist() == expected
        starts = [0, *(i + 1 for i, e in enumerate(last_of_document[:-1]) if e)] if separate else [0]
        assert batch.cu_seqlens.tolist() == [*starts, len(batch.tokens)]
        assert batch.positions[starts].tolist() == [0] * len(starts)
        at += len(batch.tokens)
    assert at == sum(CORPUS)
    assert {int(t) for t in stream} == {BOS, EOS, *range(FIRST_ID, FIRST_ID + len(CORPUS))} - {FIRST_ID + 5}


def test_placeholders_that_do_not_match_the_images_are_named(stores: dict[str, Any], tmp_path: Path) -> None:
    store = Store(write_store(tmp_path / "wrong", [8, 8], [1, 2], kind="caption"))
    store.image_counts = np.array([1, 1], dtype=np.int32)
    spec = row_spec(PICTURES, 0, 0, (Part(1, 0, 8),), store, P)
    with pytest.raises(ValueError, match=r"source pictures, sample 1: 2 image placeholders .* 1 images"):
        build_microbatch([spec], {"pictures": store}, make_settings())


def test_padding_alone(stores: dict[str, Any]) -> None:
    batch, _ = build_microbatch([], stores, make_settings(), 4)
    assert batch.tokens.tolist() == [EOS] * 4
    assert batch.labels.tolist() == [IGNORE] * 4
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.modality is None
    assert batch.sample_ids == ()


def test_a_parcel_gives_back_the_step(stores: dict[str, Any]) -> None:
    rows = [[pictures_row(stores, [3, 1])], [pictures_row(stores, [0])], [], [pictures_row(stores, [2, 6])]]
    built = tuple(build_microbatch(r, stores, make_settings(), 1)[0] for r in rows)
    step = StepBatch(step=5, language_rows=2, micro_batches=built, failed=("one",))
    opened = wrap(step).open()
    assert (opened.step, opened.language_rows, opened.failed) == (5, 2, ("one",))
    for before, after in zip(built, opened.micro_batches, strict=True):
        for name, value in vars(before).items():
            found = getattr(after, name)
            same = torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found
            assert same, name
            assert not isinstance(value, torch.Tensor) or value.dtype == found.dtype


def test_positions_with_a_label_are_listed_on_the_way_to_the_device(stores: dict[str, Any]) -> None:
    """Behind it, their number would have to be waited for."""
    batch, _ = build_microbatch([pictures_row(stores, [3, 1, 5])], stores, make_settings(), 60)
    assert batch.learnt is None
    moved = batch.to(torch.device("cpu"))
    assert moved.learnt is not None
    assert moved.learnt.tolist() == [i for i, label in enumerate(batch.labels.tolist()) if label != IGNORE]
    assert 0 < len(moved.learnt) < len(batch.labels)
    assert moved.to(torch.device("cpu")).learnt is moved.learnt
