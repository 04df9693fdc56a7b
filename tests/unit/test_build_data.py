"""`tools/build_data.py` from raw files to a store that is read back, for every kind and every fault of its inputs."""

import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizers import write_tokenizer_json

from megavl.data.importers import build
from megavl.data.importers.records import Item
from megavl.data.store import Store
from megavl.data.store_writer import StoreWriter
from megavl.data.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import build_data


def png(colour: int = 0, size: int = 6) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((size, size), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer_json(tmp_path / "tokenizer.json")
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i + 1))
    return tmp_path


def run(
    folder: Path, kind: str, *arguments: str, inputs: tuple[str, ...] = (), workers: int = 0, out: str = "s"
) -> int:
    paths = [str(folder / name) for name in inputs]
    fixed = ["--output", str(folder / out), "--tokenizer", str(folder / "tokenizer.json"), "--workers", str(workers)]
    return build_data.main([kind, *paths, *fixed, *arguments])


def read(folder: Path, out: str = "s") -> tuple[Store, Tokenizer]:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    return Store(folder / out, tokenizer.fingerprint, tokenizer.vocab_size), tokenizer


def write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def captions(count: int) -> list[Any]:
    return [{"image": f"{i % 3}.png", "caption": f"caption {i}"} for i in range(count)]


def test_text(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"one\r\ntwo\n\nthree\r\n")
    write_lines(folder / "b.jsonl", [{"text": "four \u4f60"}, {"text": "  <|five|> "}])
    assert run(folder, "text", inputs=("a.txt", "b.jsonl")) == 0
    store, tokenizer = read(folder)
    texts = ["one\ntwo\n\nthree", "four \u4f60", "  <|five|> "]
    assert [store.tokens(i).tolist() for i in range(3)] == [
        [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts
    ]
    assert store.num_samples == 3
    assert sorted(path.name for path in folder.glob("s.*")) == ["s.bin", "s.idx", "s.manifest.json"]


def test_text_line_by_line_and_another_key(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"one\r\n\n two\n")
    assert run(folder, "text", "--split", "lines", inputs=("a.txt",)) == 0
    store, tokenizer = read(folder)
    assert [tokenizer.decode(store.tokens(i).tolist()) for i in range(store.num_samples)] == ["one", " two"]
    write_lines(folder / "b.jsonl", [{"body": "x"}])
    assert run(folder, "text", "--text-key", "body", inputs=("b.jsonl",), out="t") == 0


def test_conversations(folder: Path) -> None:
    turns = [turn("human", "<image>\nwhat?"), turn("gpt", "red"), turn("human", "?"), turn("gpt", "yes")]
    record = {"image": "1.png", "conversations": turns}
    (folder / "a.json").write_text(json.dumps([record, {"messages": [turn("user", "hi"), turn("assistant", "hello")]}]))
    assert run(folder, "conversations", inputs=("a.json",)) == 0
    store, tokenizer = read(folder)
    learnt = [tokenizer.decode(store.tokens(i)[store.learn(i)].tolist()) for i in range(2)]
    assert learnt == [" red yes", " hello"]
    assert store.images(0) == [(folder / "1.png").read_bytes()]
    assert store.images(1) == []
    assert (store.tokens(0) == tokenizer.image_id).sum() == 1
    assert store.manifest is not None
    assert store.manifest["template"] == "deepseek"


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def test_conversations_as_captions(folder: Path) -> None:
    write_lines(
        folder / "a.jsonl", [{"image": "0.png", "conversations": [turn("human", "<image>"), turn("gpt", "red")]}]
    )
    assert run(folder, "conversations", "--template", "alignment", inputs=("a.jsonl",)) == 0
    store, tokenizer = read(folder)
    expected = [tokenizer.bos_id, tokenizer.image_id, *tokenizer.encode("\nred"), tokenizer.eos_id]
    assert store.tokens(0).tolist() == expected
    assert store.learn(0).sum() == len(expected) - 3


def test_interleaved_with_an_image_root(folder: Path) -> None:
    (folder / "lists").mkdir()
    write_lines(
        folder / "lists" / "a.jsonl", [[{"text": "see "}, {"image": "2.png"}, {"text": "and "}, {"image": "0.png"}]]
    )
    assert run(folder, "interleaved", "--image-root", str(folder), inputs=("lists",)) == 0
    store, _ = read(folder)
    assert store.images(0) == [(folder / name).read_bytes() for name in ("2.png", "0.png")]
    assert store.image_counts.tolist() == [2]


def test_webdataset(folder: Path) -> None:
    noise = png(9)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("1.png", noise), ("1.txt", b"noise"), ("../2.png", png()), ("../2.txt", b"outside")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert run(folder, "webdataset", "--max-rejected", "0.5", inputs=("a.tar",)) == 0
    store, _ = read(folder)
    assert store.images(0) == [noise]
    assert store.manifest is not None
    assert [r["reason"] for r in store.manifest["rejected"]] == ["the tar holds a name that points outside: '../2.png'"]


def test_any_number_of_workers_gives_the_same_bytes(folder: Path) -> None:
    records = captions(100)
    records[7]["image"], records[50]["caption"] = "gone.png", ""
    write_lines(folder / "a.jsonl", records)
    names = []
    for workers in (0, 1, 3):
        out = f"w{workers}"
        assert run(folder, "captions", "--max-rejected", "0.02", inputs=("a.jsonl",), workers=workers, out=out) == 0
        files = sorted(folder.glob(f"{out}.*"))
        names.append({path.name[len(out) :]: path.read_bytes() for path in files})
    assert len(names[0]) == 7
    assert names[0] == names[1] == names[2]
    store, tokenizer = read(folder, "w3")
    assert store.num_samples == 98
    assert tokenizer.decode(store.tokens(7).tolist()) == "\ncaption 8"


def fault(folder: Path, name: str) -> str:
    """An image file of a kind that can not be used; returns its name."""
    content = {"zero.png": b"", "cut.png": png(90, 64)[:3000], "text.png": b"hello"}
    if name in content:
        (folder / name).write_bytes(content[name])
    if name == "bomb.png":  # 9 kB
        Image.new("1", (9000, 8000)).save(folder / name)
    return name


CASES = [
    ("captions", lambda f: {"image": fault(f, "cut.png"), "caption": "x"}, "cut.png"),
    ("captions", lambda f: {"image": fault(f, "zero.png"), "caption": "x"}, "zero.png"),
    ("captions", lambda f: {"image": fault(f, "text.png"), "caption": "x"}, "text.png: 5 bytes that are not an image"),
    ("captions", lambda f: {"image": fault(f, "bomb.png"), "caption": "x"},
     "bomb.png: 9000 x 8000 = 72000000 pixels, the limit is 67108864"),
    ("captions", lambda f: {"image": "gone.png", "caption": "x"}, "gone.png: No such file or directory"),
    ("captions", lambda f: {"image": {"a": 1}, "caption": "x"}, "an image is given as {'a': 1}"),
    ("captions", lambda f: {"image": 7.5, "caption": "x"}, "an image is given as 7.5"),
    ("captions", lambda f: {"image": "0.png", "caption": "a b c d e f g h i j k l m n o p q r s t u v w x y z"},
     "with 1 images, the longest allowed is 40"),
    ("captions", lambda f: {"image": "0.png", "caption": "\ud800"}, "broken Unicode (lone surrogate) at character 1"),
    ("conversations",
     lambda f: {"image": "0.png", "conversations": [turn("human", "<image><image>"), turn("gpt", "x")]},
     "2 placeholders (<image_placeholder> or <image>) in the text, 1 images given"),
    ("conversations", lambda f: {"conversations": [turn("human", "a"), turn("gpt", "")]},
     "empty answer (message 2 of 2)"),
    ("conversations", lambda f: {"conversations": 3}, "the conversation is not a list of messages"),
    ("conversations", lambda f: {"conversations": [{"from": "human", "value": "a", "images": 3}]}, "malformed record"),
    ("text", lambda f: {"text": " \r\n "}, "empty document"),
    ("text", lambda f: {"body": "x"}, "no text under the field 'text'"),
]  # fmt: skip
GOOD = {
    "captions": {"image": "0.png", "caption": "x"},
    "conversations": {"conversations": [turn("human", "a"), turn("gpt", "b")]},
    "text": {"text": "x"},
}


@pytest.mark.parametrize(("kind", "make", "sentence"), CASES)
def test_a_faulty_input_is_named_and_the_others_are_stored(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str, make: Any, sentence: str
) -> None:
    write_lines(folder / "a.jsonl", [GOOD[kind], make(folder), GOOD[kind]])
    limit = ("--max-length", "40", "--tokens-per-image", "16") if kind == "captions" else ()
    assert run(folder, kind, *limit, inputs=("a.jsonl",)) == 1  # a third is more than the default of 1%
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 3 inputs (33.3%) were rejected, --max-rejected allows 1.0%; the first: ")
    assert sentence in error.partition("a.jsonl:2: ")[2]
    store, _ = read(folder)
    assert store.num_samples == 2
    assert store.manifest is not None
    assert store.manifest["rejected"][0]["input"].endswith("a.jsonl:2")
    assert sentence in store.manifest["rejected"][0]["reason"]
    assert run(folder, kind, *limit, "--max-rejected", "0.4", "--overwrite", inputs=("a.jsonl",)) == 0


def test_broken_utf8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_bytes(b"good")
    (folder / "b.txt").write_bytes(b"bad \xff\xfe")
    assert run(folder, "text", inputs=("a.txt", "b.txt")) == 1
    assert "b.txt: broken UTF-8 at byte 4 of 6" in capsys.readouterr().err
    assert read(folder)[0].num_samples == 1


def test_stop_leaves_what_was_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(folder / "a.jsonl", captions(3))
    assert run(folder, "captions", inputs=("a.jsonl",)) == 0
    before = {path.name: path.read_bytes() for path in folder.glob("s.*")}
    write_lines(folder / "b.jsonl", [*captions(2), {"image": "gone.png", "caption": "x"}])
    assert run(folder, "captions", "--on-error", "stop", "--overwrite", inputs=("b.jsonl",), workers=2) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error == [f"error: {folder}/b.jsonl:3: {folder}/gone.png: No such file or directory"]
    assert {path.name: path.read_bytes() for path in folder.glob("s.*")} == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--tokenizer", "gone.json"), "gone.json: tokenizer file not found"),
        (("--image-root", "nowhere"), "inputs were rejected"),
    ],
)
def test_wrong_arguments(
    folder: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], sentence: str
) -> None:
    write_lines(folder / "a.jsonl", captions(2))
    assert run(folder, "captions", *change, inputs=("a.jsonl",)) == 1
    assert sentence in capsys.readouterr().err
    assert list(folder.glob("s.*")) == []


def test_missing_input_and_existing_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "captions", inputs=("gone.jsonl",)) == 1
    assert "gone.jsonl: no such file or folder" in capsys.readouterr().err
    write_lines(folder / "a.jsonl", captions(1))
    assert run(folder, "captions", inputs=("a.jsonl",)) == 0
    assert run(folder, "captions", inputs=("a.jsonl",)) == 1
    assert "s: there is a store already" in capsys.readouterr().err


def test_a_text_only_tokenizer_is_refused_before_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer_json(folder / "tokenizer.json", image=False)
    write_lines(folder / "a.jsonl", captions(1))
    assert run(folder, "captions", inputs=("a.jsonl",)) == 1
    assert "no <image_placeholder> token" in capsys.readouterr().err


def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(folder / "a.jsonl", captions(3))
    assert run(folder, "captions", inputs=("a.jsonl",)) == 0
    before = {path.name: path.read_bytes() for path in folder.glob("s.*")}
    add = StoreWriter.add

    def fail_at_second(self: StoreWriter, tokens: np.ndarray, *rest: Any) -> None:
        if self.counts["samples"] == 1:
            raise OSError(28, "No space left on device")
        add(self, tokens, *rest)

    monkeypatch.setattr(StoreWriter, "add", fail_at_second)
    assert run(folder, "captions", "--overwrite", inputs=("a.jsonl",)) == 1
    assert "s: No space left on device after 1 samples; nothing was stored" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.glob("s.*")} == before


class CountingItems:
    """Items that remember how many were taken."""

    def __init__(self, count: int) -> None:
        self.taken, self._count = 0, count

    def __iter__(self) -> Iterator[Item]:
        for i in range(self._count):
            self.taken += 1
            yield Item(str(i), Path("."), i)


def pass_on(item: Item) -> Any:
    return item.content


def die_at_40(item: Item) -> Any:
    if item.content == 40:
        os._exit(9)  # as the kernel ends a process that takes too much memory
    return item.content


def test_inputs_are_read_a_bounded_number_ahead() -> None:
    items = CountingItems(10_000)
    results = build.encode_all(pass_on, items, workers=2)  # type: ignore[arg-type]
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert items.taken <= 16 * (4 * 2 + 1)
    assert list(results)[-1] == 9_999


def test_a_worker_that_dies_ends_the_build() -> None:
    results = build.encode_all(die_at_40, CountingItems(1_000), workers=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a worker process died"):
        list(results)


def _encode_for_ever(pids: Any) -> None:
    pids.put(os.getpid())
    list(build.encode_all(TellPid(pids), CountingItems(10**9), workers=1))  # type: ignore[arg-type]


class TellPid:
    """An encoder that says once in which process it works."""

    def __init__(self, pids: Any) -> None:
        self._pids, self._told = pids, False

    def __call__(self, item: Any) -> Any:
        if not self._told:
            self._pids.put(os.getpid())
            self._told = True
        return item


def test_workers_end_with_a_main_process_that_was_killed() -> None:
    pids = multiprocessing.get_context("fork").SimpleQueue()
    main = multiprocessing.get_context("fork").Process(target=_encode_for_ever, args=(pids,))
    main.start()
    assert pids.get() == main.pid
    worker = pids.get()
    main.kill()
    main.join()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and "State:\tZ" not in Path(f"/proc/{worker}/status").read_text():
        if time.monotonic() > deadline:
            os.kill(worker, signal.SIGKILL)
            raise AssertionError(f"worker {worker} outlives its main process")
        time.sleep(0.02)


def test_sigterm_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(folder / "a.jsonl", captions(3))
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(StoreWriter, "add", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert run(folder, "captions", inputs=("a.jsonl",)) == 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not list(folder.glob("s.*"))


def test_a_summary_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(folder / "a.jsonl", captions(3))
    assert run(folder, "captions", inputs=("a.jsonl",)) == 0
    assert "3 samples, " in capsys.readouterr().out
    store, _ = read(folder)
    assert store.manifest is not None
    assert store.manifest["counts"]["images"] == 3
