"""Importers: every dialect gives the same conversation, every fault one sentence; text and images keep their order."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megavl.data.importers import webdataset
from megavl.data.importers.conversations import to_caption, to_conversation
from megavl.data.importers.documents import to_caption_document, to_interleaved
from megavl.data.importers.images import ALL_TAGS, REFERENCE_TAGS, load_image, place_images
from megavl.data.importers.records import Item, decode_text, find_files, parse, read_records, read_texts
from megavl.data.importers.webdataset import read_tar, to_webdataset_sample
from megavl.data.sample import Conversation, Document, Rejected, strip_content


def png(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, 10, 10)).save(file, "PNG")
    return file.getvalue()


RED, BLUE = png(255), png(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    return tmp_path


def stripped(conversation: Conversation) -> list[tuple[str, tuple[str | bytes, ...]]]:
    return [(m.role, strip_content(m.content)) for m in conversation.messages]


REFERENCE = [
    {
        "role": "User",
        "content": "<image_placeholder>Which is red, this or <image_placeholder>?",
        "images": ["red.png", "blue.png"],
    },
    {"role": "Assistant", "content": "The first."},
]
LLAVA = {
    "id": "7",
    "image": ["red.png", "blue.png"],
    "conversations": [
        {"from": "human", "value": "<image>Which is red, this or <image>?"},
        {"from": "gpt", "value": "The first."},
    ],
}
SHAREGPT = {
    "messages": [
        {"role": "user", "content": "<image>Which is red, this or <image>?"},
        {"role": "assistant", "content": "The first."},
    ],
    "images": ["red.png", "blue.png"],
}
URI = "data:image/png;base64," + base64.b64encode(BLUE).decode()
PARTS = {
    "messages": [
        {"role": "user", "content": [
            {"type": "image", "image": "red.png"},
            {"type": "text", "text": "Which is red, this or "},
            {"type": "image_url", "image_url": {"url": URI}},
            {"type": "text", "text": "?"},
        ]},
        {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("record", [REFERENCE, {"conversations": REFERENCE}, LLAVA, SHAREGPT, PARTS])
def test_dialects_agree(folder: Path, record: Any) -> None:
    conversation = to_conversation(record, folder)
    assert stripped(conversation) == [
        ("User", (RED, "Which is red, this or ", BLUE, "?")),
        ("Assistant", ("The first.",)),
    ]
    assert conversation.system is None


def test_a_system_message_replaces_the_prompt(folder: Path) -> None:
    turns = [("system", " Be brief. "), ("human", "hi"), ("gpt", "hello")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    conversation = to_conversation(record, folder)
    assert conversation.system == "Be brief."
    assert [m.role for m in conversation.messages] == ["User", "Assistant"]


def test_llava_tag_is_text_in_the_reference_format(folder: Path) -> None:
    record = [{"role": "User", "content": "What does <image> mean in HTML?"}, {"role": "Assistant", "content": "Old."}]
    assert stripped(to_conversation(record, folder))[0][1] == ("What does <image> mean in HTML?",)


def turn(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


FAULTS: list[tuple[Any, str]] = [
    ([turn("User"), turn("Assistant", "")], r"empty answer \(message 2 of 2\)"),
    ([turn("User"), turn("Assistant", " \n ")], r"empty answer \(message 2 of 2\)"),
    ([turn("User"), turn("Assistant", None)], r"empty answer \(message 2 of 2\)"),
    ([turn("User"), turn("Assistant"), turn("User", " "), turn("Assistant")], r"empty question \(message 3 of 4\)"),
    ([turn("User")], "1 messages: the last question has no answer to learn"),
    ([turn("User"), turn("User")], "message 2 of 2 is from User, Assistant was expected"),
    ([turn("Assistant"), turn("User")], "message 1 of 2 is from Assistant, User was expected"),
    ([turn("User"), turn("tool")], "the role 'tool' is not one of user, human, assistant, gpt, system"),
    ([turn("User"), {"content": "x"}], "the role None is not one of"),
    ([turn("system")], "0 messages"),
    ([turn("User", 7), turn("Assistant")], "the content of a message is 7, not text"),
    ({"id": 1, "image": "red.png"}, "no field conversations or messages, only id, image"),
    ({"conversations": []}, "the conversation is not a list of messages"),
    ("text", "the conversation is not a list of messages"),
    ([turn("User", "<image_placeholder>"), turn("Assistant")],
     r"1 placeholders \(<image_placeholder>\) in the text, 0 images given"),
    ([turn("User", "none", images=["red.png"]), turn("Assistant")], "0 placeholders .* in the text, 1 images given"),
    ({"image": "red.png", "conversations": [turn("human", "<image><image>"), turn("gpt")]},
     r"2 placeholders \(<image_placeholder> or <image>\) in the text, 1 images given"),
    ([turn("User", "<image_placeholder>", images=["gone.png"]), turn("Assistant")], "gone.png: No such file"),
    ([turn("User", "<image_placeholder>", images=[3]), turn("Assistant")], "an image is given as 3, not as a path"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "sentence"), FAULTS)
def test_faulty_conversations(folder: Path, record: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        to_conversation(record, folder)


def test_counts_are_compared_before_an_image_is_read(folder: Path) -> None:
    with pytest.raises(ValueError, match="0 placeholders"):
        to_conversation([turn("User", images=["does not exist"]), turn("Assistant")], folder)


def test_a_caption_out_of_a_conversation(folder: Path) -> None:
    record = {"image": "red.png", "conversations": [turn("human", "Describe.\n<image>"), turn("gpt", " red ")]}
    assert to_caption(to_conversation(record, folder)) == Document(content=(RED, "red"))
    rounds = to_conversation([turn("User"), turn("Assistant")] * 2, folder)
    with pytest.raises(ValueError, match="a conversation of 2 rounds is not a caption"):
        to_caption(rounds)


@settings(deadline=None)
@given(
    texts=st.lists(st.lists(st.text(max_size=5), min_size=1, max_size=4), min_size=1, max_size=4),
    tag=st.sampled_from(ALL_TAGS),
)
def test_place_images_is_the_inverse_of_joining(texts: list[list[str]], tag: str) -> None:
    joined = [tag.join(parts) for parts in texts]
    count = sum(len(parts) - 1 for parts in texts)
    images = [png(i) for i in range(count)]
    contents = place_images(joined, images, ALL_TAGS, Path("."))
    assert [p for content in contents for p in content if isinstance(p, bytes)] == images
    restored = ["".join(tag if isinstance(p, bytes) else p for p in content) for content in contents]
    assert restored == joined


def test_reference_tags_leave_llava_tags(folder: Path) -> None:
    assert place_images(["a <image> b"], [], REFERENCE_TAGS, folder) == [("a <image> b",)]


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("gone.png", r"gone.png: No such file or directory"),
        (".", "Is a directory"),
        ("zero.png", r"zero.png: .*empty|zero.png: .*0 bytes"),
        ("cut.png", r"cut.png: "),
        ("text.png", r"text.png: .*not an image"),
        ("https://example.org/a.png", "is a URL; download it first"),
        ("data:image/png,abc", "only base64 data: URIs can be read"),
        ("data:image/png;base64,a?b=", "broken base64"),
        ("data:image/png;base64,AAAA", "image in a data: URI: .*not an image"),
        ("", "an image is given as ''"),
        ("a\0b", "null byte|null character"),
        (None, "an image is given as None"),
    ],
)
def test_faulty_images(folder: Path, reference: Any, sentence: str) -> None:
    (folder / "zero.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(noise()[:2000])
    (folder / "text.png").write_bytes(b"hello, this is text")
    with pytest.raises(ValueError, match=sentence):
        load_image(reference, folder)


def noise() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "PNG")
    return file.getvalue()


def test_images_keep_their_bytes(folder: Path) -> None:
    assert load_image("red.png", folder) == RED
    assert load_image(str(folder / "red.png"), Path("/elsewhere")) == RED
    assert load_image(URI, folder) == BLUE
    assert load_image(URI[:60] + "\n" + URI[60:], folder) == BLUE  # wrapped lines
    assert load_image(RED, folder) == RED


def test_captions(folder: Path) -> None:
    for record in (
        {"image": "red.png", "caption": " red\n"},
        {"images": ["red.png"], "text": "red"},
    ):
        assert to_caption_document(record, folder) == Document(content=(RED, "red"))
    for record, sentence in (
        ({"image": "red.png", "caption": " "}, "empty caption"),
        ({"image": "red.png"}, r"no field caption in \['image'\]"),
        ({"caption": "red"}, "0 images for one caption"),
        ({"images": ["red.png", "blue.png"], "caption": "red"}, "2 images for one caption"),
        (["red.png", "red"], "a caption record is an object with image and caption, not list"),
    ):
        with pytest.raises(ValueError, match=sentence):
            to_caption_document(record, folder)


def test_interleaved(folder: Path) -> None:
    entries = [{"text": "See "}, {"image": "red.png"}, "and\n", {"image": "blue.png"}, {"text": ""}]
    expected = Document(content=("See ", RED, "and\n", BLUE))
    assert to_interleaved(entries, folder) == expected
    assert to_interleaved({"content": entries}, folder) == expected
    mmc4 = {
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [
            {"image_name": "blue.png", "matched_text_index": 2},
            {"image_name": "red.png", "matched_text_index": 0},
        ],
    }
    assert to_interleaved(mmc4, folder) == Document(content=(RED, "One. ", "Two. ", BLUE, "Three."))


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ([{"image": "red.png"}], "empty document: there is no text in it"),
        ([], "empty document"),
        ({"pages": []}, "an interleaved document is a list of text and image entries"),
        ([{"text": "a"}, {"video": "b"}], r"the entry \{'video': 'b'\} is neither text nor image"),
        ({"text_list": ["a"], "image_info": [{"image_name": "red.png", "matched_text_index": 4}]},
         "an image is matched to sentence 4 of 1"),
    ],
)  # fmt: skip
def test_faulty_documents(folder: Path, record: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        to_interleaved(record, folder)


def test_json_and_json_lines_give_the_same_records(tmp_path: Path) -> None:
    records = [{"a": 1}, {"a": "\u4f60\r\n"}, {"a": None}]
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    (tmp_path / "x.json").write_text(json.dumps(records))
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "one.json").write_text(json.dumps(records[0]))
    (tmp_path / "chat.json").write_text(json.dumps(REFERENCE))
    for name in ("x.json", "x.jsonl", "lines.json"):
        assert [parse(item.content) for item in items(tmp_path / name)] == records
    assert [item.origin.rpartition("/")[2] for item in items(tmp_path / "x.jsonl")] == [
        "x.jsonl:1",
        "x.jsonl:3",
        "x.jsonl:5",
    ]
    assert [item.content for item in items(tmp_path / "one.json")] == records[:1]
    assert [item.content for item in items(tmp_path / "chat.json")] == [REFERENCE]


def test_a_file_of_brackets_is_one_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    (fault,) = read_records(tmp_path / "a.json")
    assert isinstance(fault, Rejected)
    assert "recursion" in fault.reason


def items(path: Path) -> list[Item]:
    found = list(read_records(path))
    assert all(isinstance(item, Item) for item in found)
    return found  # type: ignore[return-value]


def test_broken_files_cost_as_little_as_possible(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": 3\n{"a": 4}')
    contents = [item.content for item in items(path)]
    assert parse(contents[0]) == {"a": 1}
    with pytest.raises(ValueError, match="broken UTF-8 at byte 7 of 11"):
        parse(contents[1])
    with pytest.raises(ValueError, match="not JSON"):
        parse(contents[2])
    assert parse(contents[3]) == {"a": 4}
    (tmp_path / "y.json").write_bytes(b'[{"a": 1}, ')
    (tmp_path / "z.json").write_bytes(b'["\xff"]')
    rejected = [r for name in ("y", "z") for r in read_records(tmp_path / f"{name}.json")]
    assert [type(r) for r in rejected] == [Rejected, Rejected]
    assert "not JSON" in rejected[0].reason  # type: ignore[union-attr]
    assert "broken UTF-8 at byte 2 of 5" in rejected[1].reason  # type: ignore[union-attr]


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\n two\n")
    assert [i.content for i in read_texts(path, "files") if isinstance(i, Item)] == [b"one\r\n\r\n two\n"]
    lines = [i for i in read_texts(path, "lines") if isinstance(i, Item)]
    assert [(i.origin.rpartition("/")[2], i.content) for i in lines] == [
        ("a.txt:1", b"one\r\n"),
        ("a.txt:3", b" two\n"),
    ]
    assert decode_text(b"\xef\xbb\xbfabc") == "abc"


def test_find_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "sub/d.TXT"):
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in find_files([tmp_path, tmp_path / "c.md"], [".txt"])]
    assert names == ["a.txt", "b.txt", "sub/d.TXT", "c.md"]
    for inputs, sentence in (
        ([tmp_path / "gone"], "gone: no such file or folder"),
        ([tmp_path], "no .tar file in this folder"),
        ([], "no input file or folder is given"),
    ):
        with pytest.raises(ValueError, match=sentence):
            find_files(inputs, [".tar"])


def tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def samples(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    good, bad = {}, {}
    for item in read_tar(path):
        if isinstance(item, Rejected):
            bad[item.origin.rpartition(":")[2]] = item.reason
        else:
            good[item.origin.rpartition(":")[2]] = to_webdataset_sample(item.content, item.folder)
    return good, bad


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset(tmp_path: Path, mode: str) -> None:
    chat = json.dumps(LLAVA).encode()
    path = tar(tmp_path / "s.tar", [
        ("a/1.png", RED), ("a/1.txt", b"red"),
        ("a/2.json", b'{"caption": "blue"}'), ("a/2.PNG", BLUE),
        ("b/2.png", RED), ("b/2.txt", "rot \u00e9".encode()), ("b/2.json", b'{"width": 6}'),
        ("3.0.png", RED), ("3.1.png", BLUE), ("3.json", chat),
    ], mode)  # fmt: skip
    good, bad = samples(path)
    assert bad == {}
    assert good["a/1"] == Document(content=(RED, "red"))
    assert good["a/2"] == Document(content=(BLUE, "blue"))
    assert good["b/2"] == Document(content=(RED, "rot \u00e9"))
    assert stripped(good["3"])[0] == ("User", (RED, "Which is red, this or ", BLUE, "?"))


def test_tar_names_that_point_outside_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("4.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = tar(tmp_path / "s.tar", [
        ("1.png", RED), ("1.txt", b"red"),
        ("../2.png", RED), ("../2.txt", b"red"),
        ("/tmp/3.png", RED), ("/tmp/3.txt", b"red"),
        (link, b""), ("4.txt", b"red"),
        ("x/../../5.png", RED), ("x/../../5.txt", b"red"),
        ("6.png", BLUE), ("6.txt", b"blue"),
    ])  # fmt: skip
    good, bad = samples(path)
    assert list(good) == ["1", "6"]
    assert bad == {
        "../2": "the tar holds a name that points outside: '../2.png'",
        "/tmp/3": "the tar holds a name that points outside: '/tmp/3.png'",
        "4": "'4.png' is a link or device, not a file",
        "x/../../5": "the tar holds a name that points outside: 'x/../../5.png'",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["s.tar"]  # nothing was unpacked


def test_a_tar_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_MEMBER", 1000)
    path = tar(tmp_path / "s.tar.gz", [
        ("1.png", RED), ("1.txt", b"red"), ("2.png", bytes(1001)), ("2.txt", b"0"), ("3.png", BLUE), ("3.txt", b"b"),
    ], "w:gz")  # fmt: skip
    good, bad = samples(path)
    assert list(good) == ["1", "3"]
    assert bad == {"2": "'2.png' has 1001 bytes, the limit is 1000"}


def test_a_cut_tar_gives_what_is_whole(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", [("1.png", RED), ("1.txt", b"red"), ("2.png", noise()), ("2.txt", b"noise")])
    path.write_bytes(path.read_bytes()[: 4 * 512 + 1500])
    good, bad = samples(path)
    assert list(good) == ["1"]
    assert list(bad) == ["2"]
    assert "damaged or cut short" in bad["2"]
    path.write_bytes(b"not a tar" * 100)
    good, bad = samples(path)
    assert good == {}
    assert len(bad) == 1


def test_faulty_webdataset_samples(tmp_path: Path) -> None:
    for members, sentence in (
        ((("png", RED),), "neither .txt nor .json beside png"),
        ((("txt", b"red"),), "0 images for one caption"),
        ((("png", RED), ("txt", b"\xff")), "broken UTF-8 at byte 0 of 1"),
        ((("png", RED[:50]), ("txt", b"red")), "image"),
        ((("png", RED), ("json", b"{")), "not JSON"),
    ):
        with pytest.raises(ValueError, match=sentence):
            to_webdataset_sample(members, tmp_path)
