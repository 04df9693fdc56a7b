"""The store: what is written is read, damaged files are named with both numbers, failed builds lose nothing."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megavl.data.sample import Rejected
from megavl.data.store import Store, StoreWriter

FINGERPRINT = "a" * 64
Samples = list[tuple[list[int], list[bool], list[bytes]]]
SAMPLES: Samples = [
    ([1, 9, 5, 6, 2], [False, False, True, True, True], [b"one"]),
    ([1, 7, 2], [False, True, True], []),
    ([1, 9, 9, 2], [False, False, False, True], [b"two", b"three!"]),
]


def write(prefix: Path, samples: Samples = SAMPLES, kind: str = "conversations", **options: Any) -> Path:
    with StoreWriter(prefix, kind=kind, tokenizer_fingerprint=FINGERPRINT, **options) as writer:
        for tokens, learn, images in samples:
            if kind == "text":
                writer.add(np.array(tokens))
            else:
                writer.add(np.array(tokens), np.array(learn, dtype=bool), images)
        writer.finish()
    return prefix


def read(store: Store) -> Samples:
    everything = range(store.num_samples)
    return [(store.tokens(i).tolist(), store.learn(i).tolist(), store.images(i)) for i in everything]


def sample_strategy() -> st.SearchStrategy[tuple[list[int], list[bool], list[bytes]]]:
    pairs = st.lists(st.tuples(st.integers(0, 102399), st.booleans()), min_size=1, max_size=20)
    images = st.lists(st.binary(min_size=1, max_size=20), max_size=3)
    return st.tuples(pairs, images).map(lambda t: ([p[0] for p in t[0]], [p[1] for p in t[0]], t[1]))


@settings(max_examples=40, deadline=None)
@given(samples=st.lists(sample_strategy(), min_size=1, max_size=8))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, samples: Samples) -> None:
    store = Store(write(tmp_path_factory.mktemp("store") / "s", samples), FINGERPRINT, 102400)
    assert read(store) == samples
    assert store.lengths.tolist() == [len(tokens) for tokens, _, _ in samples]
    assert store.image_counts.tolist() == [len(images) for _, _, images in samples]
    assert store.num_tokens == sum(store.lengths)
    for i, (tokens, _, _) in enumerate(samples):
        middle = len(tokens) // 2
        assert store.tokens_slice(i, middle, len(tokens)).tolist() == tokens[middle:]


def test_counts_in_the_manifest(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", kind="captions", tokenizer_fingerprint=FINGERPRINT, template="alignment")
    for tokens, learn, images in SAMPLES:
        writer.add(np.array(tokens), np.array(learn), images)
    writer.reject(Rejected("b.json:3", "broken \ud800"))
    writer.finish()
    manifest = Store(tmp_path / "s").manifest
    assert manifest is not None
    assert manifest["counts"] == {
        "samples": 3, "tokens": 12, "learnt_tokens": 6, "images": 3, "largest_id": 9, "rejected": 1,
    }  # fmt: skip
    assert manifest["rejected"][0]["input"] == "b.json:3"
    assert (manifest["kind"], manifest["template"]) == ("captions", "alignment")


def test_text_store_learns_everything(tmp_path: Path) -> None:
    store = Store(write(tmp_path / "s", kind="text"))
    assert [learn for _, learn, _ in read(store)] == [[True] * len(tokens) for tokens, _, _ in SAMPLES]
    assert not (tmp_path / "s.learn.bin").exists()
    assert store.image_counts.sum() == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_corpus_written_by_megatron_is_a_store(tmp_path: Path, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=dtype)
    builder.add_document(torch.tensor([4, 5, 6]), [3])
    builder.add_document(torch.tensor([7, 8, 9]), [1, 2])  # two sentences of one document
    builder.finalize(str(tmp_path / "c.idx"))
    store = Store(tmp_path / "c", FINGERPRINT, 10)
    assert [tokens for tokens, _, _ in read(store)] == [[4, 5, 6], [7, 8, 9]]
    assert store.learn(1).all()
    small = Store(tmp_path / "c", vocab_size=9)
    assert small.tokens(0).tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match=r"c.bin: sample 1 holds id 9, the vocabulary has 9"):
        small.tokens(1)


def _read_in_child(store: Store, queue: Any) -> None:
    queue.put(read(store))


def test_loader_processes_read_the_same(tmp_path: Path) -> None:
    samples: Samples = [*SAMPLES, ([1] * 9_000, [True] * 9_000, [b"x" * 9_000])]
    store = Store(write(tmp_path / "s", samples))
    assert read(store) == samples  # opens the files before the fork
    assert len(pickle.dumps(store)) < 9_000  # no content of a file is in it
    copy = pickle.loads(pickle.dumps(store))
    assert read(copy) == samples
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(store, queue)) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=600) for _ in children]
    for child in children:
        child.join(timeout=600)
    assert results == [samples, samples]


def test_reading_outside_is_an_error(tmp_path: Path) -> None:
    store = Store(write(tmp_path / "s"))
    for call in (store.tokens, store.learn, store.images):
        with pytest.raises(IndexError, match="sample 3 of 3"):
            call(3)
    with pytest.raises(IndexError, match="tokens 1 to 4 of sample 1, which has 3"):
        store.tokens_slice(1, 1, 4)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = [
    (".bin", 44, r"s.bin: 44 bytes, but s.idx describes 48 bytes of tokens"),
    (".bin", 0, r"s.bin: 0 bytes, but s.idx describes 48 bytes of tokens"),
    (".idx", 50, r"s.idx: 50 bytes, but its 3 sequences need 102"),
    (".idx", 20, r"s.idx: not a Megatron index|s.idx: 20 bytes"),
    (".learn.bin", 11, r"s.learn.bin: 11 bytes, but s.manifest.json says 12"),
    (".images.bin", 5, r"s.images.bin: 5 bytes, but s.manifest.json says 12"),
    (".image_counts.npy", 130, r"s.image_counts.npy: 130 bytes, but s.manifest.json says 140"),
    (".manifest.json", 40, r"s.manifest.json: not a manifest"),
]


@pytest.mark.parametrize(("suffix", "size", "sentence"), DAMAGE)
def test_cut_files_are_named_with_both_sizes(tmp_path: Path, suffix: str, size: int, sentence: str) -> None:
    write(tmp_path / "s")
    cut(tmp_path / f"s{suffix}", size)
    with pytest.raises(ValueError, match=sentence):
        Store(tmp_path / "s")


@pytest.mark.parametrize(
    "suffix", [".bin", ".idx", ".learn.bin", ".images.bin", ".images.idx.npy", ".image_counts.npy", ".manifest.json"]
)
def test_missing_files_are_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "s")
    (tmp_path / f"s{suffix}").unlink()
    with pytest.raises(ValueError, match=f"s{suffix}: .*(no such file|missing)"):
        Store(tmp_path / "s")


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    """A manifest whose sizes were mended by hand does not hide a mismatch of the counts."""
    write(tmp_path / "s")
    np.save(tmp_path / "s.image_counts.npy", np.array([1, 0, 3], dtype=np.int32))
    with pytest.raises(ValueError, match=r"s.images.idx.npy holds 3 entries but there are 4 images"):
        Store(tmp_path / "s")
    np.save(tmp_path / "s.image_counts.npy", np.array([1, 0, 2], dtype=np.int32))
    cut(tmp_path / "s.learn.bin", 11)
    manifest = json.loads((tmp_path / "s.manifest.json").read_text())
    manifest["file_sizes"][".learn.bin"] = 11
    (tmp_path / "s.manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"s.learn.bin holds 11 entries but there are 12 tokens in .idx"):
        Store(tmp_path / "s")


def test_another_tokenizer_or_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "s")
    with pytest.raises(ValueError, match="built with tokenizer aaaaaaaaaaaa, the run's tokenizer is bbbbbbbbbbbb"):
        Store(tmp_path / "s", "b" * 64)
    with pytest.raises(ValueError, match="holds token id 9 but the vocabulary has 9 ids"):
        Store(tmp_path / "s", FINGERPRINT, 9)


def test_an_unfinished_store_is_not_a_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", kind="captions", tokenizer_fingerprint=FINGERPRINT)
    writer.add(np.array([1, 2]), np.array([False, True]), [])
    with pytest.raises(ValueError, match=r"s\.idx: no such file"):
        Store(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s.partial"]  # as after a kill
    assert read(Store(write(tmp_path / "s"))) == SAMPLES  # a new build clears it away
    assert not (tmp_path / "s.partial").exists()


@pytest.mark.parametrize("kind", ["text", "captions"])
@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_move_that_is_interrupted_is_not_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, moves: int
) -> None:
    """Above all, new tokens never meet the index of an older store."""
    write(tmp_path / "s", kind=kind)
    moved: list[str] = []

    def fail_later(source: Path, target: str) -> None:
        if len(moved) == moves:
            raise OSError(5, "Input/output error")
        moved.append(target)
        source.rename(target)

    monkeypatch.setattr(os, "replace", fail_later)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "s", SAMPLES[::-1], kind=kind, overwrite=True)
    with pytest.raises(ValueError, match=r"no such file|missing"):
        Store(tmp_path / "s")


def test_a_failed_build_leaves_the_older_store(tmp_path: Path) -> None:
    write(tmp_path / "s")
    with pytest.raises(ValueError, match="s: there is a store already"):
        write(tmp_path / "s")
    with pytest.raises(AssertionError, match="2 flags for 3 tokens"):
        write(tmp_path / "s", [*SAMPLES, ([1, 2, 3], [True, True], [])], overwrite=True)
    assert read(Store(tmp_path / "s")) == SAMPLES
    assert not (tmp_path / "s.partial").exists()
    write(tmp_path / "s", SAMPLES[:1], overwrite=True)
    assert read(Store(tmp_path / "s")) == SAMPLES[:1]
    write(tmp_path / "s", SAMPLES[1:2], kind="text", overwrite=True)
    assert not (tmp_path / "s.learn.bin").exists()


def test_a_store_without_samples_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", kind="captions", tokenizer_fingerprint=FINGERPRINT)
    writer.reject(Rejected("a.json:1", "empty caption"))
    with pytest.raises(
        ValueError, match=r"no sample to store, 1 inputs were rejected; the first of them: a.json:1: empty caption"
    ):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def _hold(prefix: Path, ready: Any, done: Any) -> None:
    writer = StoreWriter(prefix, kind="text", tokenizer_fingerprint=FINGERPRINT)
    writer.add(np.full(10, 7))
    ready.set()
    done.wait(600)
    writer.finish()


def test_two_processes_do_not_build_one_store(tmp_path: Path) -> None:
    """They used to share the folder: lengths of one with the tokens of the other."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    child = context.Process(target=_hold, args=(tmp_path / "s", ready, done))
    child.start()
    assert ready.wait(600)
    with pytest.raises(ValueError, match=r"s: another process is building this store in .*s.partial"):
        StoreWriter(tmp_path / "s", kind="text", tokenizer_fingerprint=FINGERPRINT)
    done.set()
    child.join(600)
    assert Store(tmp_path / "s").tokens(0).tolist() == [7] * 10
    assert not (tmp_path / "s.partial").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"format": "megavl store 2"}'])
def test_a_manifest_of_something_else(tmp_path: Path, text: str) -> None:
    Path(f"{write(tmp_path / 's')}.manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"s.manifest.json: its format is .*, this version reads 'megavl store 1'"):
        Store(tmp_path / "s")


def corpus(prefix: Path, tokens: list[int], dtype: type = np.int32, **index: list[int]) -> Path:
    """A bare pair of four sequences of two tokens, its index changed."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for pair in np.reshape(tokens, (4, 2)):
        builder.add_document(torch.from_numpy(pair), [2])
    for name, value in index.items():
        setattr(builder, name, value)
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"document_indices": [0, 3, 1, 4]}, r"c.idx: its documents go from sequence \[0\] to \[4\], which must rise"),
        ({"document_indices": [1, 2, 3, 4]}, r"c.idx: its documents go from sequence \[1\] to \[4\], which must rise"),
        ({"sequence_lengths": [2, -2, 4, 4]}, r"c.idx: sequence 1 of 4 has -2 tokens"),
        ({"dtype": np.float32}, r"c.idx: its tokens are of type float32"),
    ],
)
def test_an_index_that_contradicts_itself(tmp_path: Path, index: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Store(corpus(tmp_path / "c", list(range(8)), **index))


def test_an_index_of_parts_of_the_tokens(tmp_path: Path) -> None:
    """As tools make that drop documents without copying the rest; samples would be read in the wrong place."""
    prefix = corpus(tmp_path / "c", list(range(8)))
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    pointers = 34 + 4 * 4
    content[pointers : pointers + 32] = np.array([0, 16, 24, 8]).tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"its last sequence starts at byte 8, after the others comes byte 24"):
        Store(prefix)


def test_a_negative_id(tmp_path: Path) -> None:
    store = Store(corpus(tmp_path / "c", [0, 1, 2, -3, 4, 5, 6, 7]), vocab_size=8)
    assert store.tokens(0).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"c.bin: sample 1 holds id -3, the vocabulary has 8"):
        store.tokens(1)
