"""Templates against prompts written out by hand, and token ids against encoding the whole rendered prompt."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import write_sentencepiece, write_tokenizer_json

from megavl.data import prompt
from megavl.data.prompt import (
    SYSTEM_PROMPT,
    Mark,
    render,
    render_conversation,
    render_document,
    template_fingerprint,
    to_text,
    to_tokens,
)
from megavl.data.sample import Conversation, Document, Message, strip_content
from megavl.data.tokenizer import EOS_NAMES, IMAGE_NAME, Tokenizer

EOS = EOS_NAMES[0]
SEPARATOR = "\n\n"
IMAGE = b"encoded image"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_json(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def user(*content: str | bytes) -> Message:
    return Message("User", content)


def assistant(*content: str | bytes) -> Message:
    return Message("Assistant", content)


def test_two_rounds_as_in_the_specification() -> None:
    messages = [user(" u1 "), assistant("a1\n"), user("u2"), assistant()]
    expected = f"{SYSTEM_PROMPT}\n\nUser: u1\n\nAssistant: a1{EOS}User: u2\n\nAssistant:"
    assert to_text(render_conversation(messages)) == expected


def test_the_system_prompt_is_the_released_one() -> None:
    assert SYSTEM_PROMPT == (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language."
    )


@pytest.mark.parametrize(
    ("messages", "system", "expected"),
    [
        ([user("a"), assistant("b")], "", f"User: a\n\nAssistant: b{EOS}"),
        ([user("a"), assistant("b")], "  S ", f"S \n\nUser: a\n\nAssistant: b{EOS}"),
        ([user(), assistant("b")], "", f"User:Assistant: b{EOS}"),
        ([user("a")], "", "User: a"),
        ([user(IMAGE)], "", f"User: {IMAGE_NAME}"),
        ([user("a ", IMAGE, "\n", IMAGE, " b "), assistant()], "",
         f"User: a {IMAGE_NAME}\n{IMAGE_NAME} b\n\nAssistant:"),
        ([user("  ", IMAGE, " x")], "", f"User: {IMAGE_NAME} x"),
        ([user("a\r\nb"), assistant(" \u3000c")], "", f"User: a\r\nb\n\nAssistant: c{EOS}"),
    ],
)  # fmt: skip
def test_corner_cases(messages: list[Message], system: str, expected: str) -> None:
    assert to_text(render_conversation(messages, system)) == expected


def reference_prompt(messages: list[Message]) -> str:
    """The rule of the specification on plain strings, as the reference code applies it."""
    text = f"{SYSTEM_PROMPT}\n\n"
    for index, message in enumerate(messages):
        content = "".join(IMAGE_NAME if isinstance(p, bytes) else p for p in message.content).strip()
        text += f"{message.role}: {content}{(SEPARATOR, EOS)[index % 2]}" if content else f"{message.role}:"
    return text.strip()


words = st.text(alphabet=" \n\t\r.,:;!?()0123456789abcXYZ\u00e9\u4f60\u597d\u3000\U0001f600_-<>|", max_size=25)
contents = st.lists(st.one_of(words, st.just(IMAGE)), max_size=4).map(tuple)
conversations = st.lists(contents, min_size=1, max_size=6).map(
    lambda turns: [Message("User" if i % 2 == 0 else "Assistant", content) for i, content in enumerate(turns)]
)


@settings(max_examples=300, deadline=None)
@given(messages=conversations)
def test_ids_are_those_of_the_whole_prompt(path: Path, messages: list[Message]) -> None:
    segments = render_conversation(messages)
    expected = reference_prompt(messages)
    assert to_text(segments) == expected
    tokenizer = Tokenizer(path)
    whole = tokenizers.Tokenizer.from_file(str(path)).encode(expected).ids  # parses marks, puts begin in front
    tokens, learn = to_tokens(segments, tokenizer)
    assert tokens.tolist() == whole
    answers = [strip_content(m.content) for m in messages if m.role == "Assistant"]
    learnt_text = "".join(" " + "".join(p for p in a if isinstance(p, str)) for a in answers if a)
    assert tokenizer.decode(tokens[learn].tolist()) == learnt_text
    assert (tokens[learn] == tokenizer.eos_id).sum() == sum(1 for a in answers if a)
    assert not (learn & (tokens == tokenizer.image_id)).any()


def test_learnt_part_by_hand(path: Path) -> None:
    tokenizer = Tokenizer(path)
    messages = [user(IMAGE, "what is it?"), assistant("a red digit"), user("sure?"), assistant("yes")]
    tokens, learn = to_tokens(render_conversation(messages), tokenizer)
    runs = np.split(tokens[learn], np.flatnonzero(tokens[learn] == tokenizer.eos_id) + 1)
    assert [tokenizer.decode(run.tolist()) for run in runs] == [" a red digit", " yes", ""]
    assert tokenizer.decode(tokens[~learn].tolist()) == (
        f"{SYSTEM_PROMPT}\n\nUser: what is it?\n\nAssistant:User: sure?\n\nAssistant:"
    )


def test_text_that_spells_marks_stays_text(path: Path) -> None:
    tokenizer = Tokenizer(path)
    messages = [user(f"{IMAGE_NAME} {EOS}"), assistant(EOS)]
    tokens, _ = to_tokens(render_conversation(messages), tokenizer)
    assert (tokens == tokenizer.image_id).sum() == 0
    assert (tokens == tokenizer.eos_id).sum() == 1


def test_sentencepiece_learns_the_same_characters(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_sentencepiece(tmp_path))
    messages = [user("what is it?"), assistant("a red digit \u4f60 7")]
    tokens, learn = to_tokens(render_conversation(messages), tokenizer)
    assert tokenizer.decode(tokens[learn].tolist()).strip() == "a red digit \u4f60 7"
    assert tokens[-1] == tokenizer.eos_id
    assert learn[-1]


def test_pretraining_formats(path: Path) -> None:
    tokenizer = Tokenizer(path)
    caption = render_document((IMAGE, "a dog"), "alignment")
    assert to_text(caption) == f"{IMAGE_NAME}\na dog{EOS}"
    tokens, learn = to_tokens(caption, tokenizer)
    assert tokenizer.decode(tokens[learn].tolist()) == "a dog"
    interleaved = render_document(("see\r\n", IMAGE, "the dog ", IMAGE), "plain")
    assert to_text(interleaved) == f"see\r\n{IMAGE_NAME}the dog {IMAGE_NAME}{EOS}"
    tokens, learn = to_tokens(interleaved, tokenizer)
    assert tokenizer.decode(tokens[learn].tolist()) == "see\r\nthe dog "
    assert learn[-1]
    assert not learn[0]


def test_render_refuses_what_does_not_fit() -> None:
    document, conversation = Document(content=("a",)), Conversation(messages=(user("a"), assistant("b")), system="S")
    assert render(document, "plain")[-1].content is Mark.EOS
    assert to_text(render(conversation, "deepseek")).startswith("S\n\nUser: a")
    for sample, template in ((document, "deepseek"), (conversation, "plain"), (conversation, "alignment")):
        with pytest.raises(ValueError, match=f"can not be rendered by the template '{template}'"):
            render(sample, template)


def test_fingerprint_changes_with_the_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: template_fingerprint(name) for name in prompt.TEMPLATES}
    assert len(set(before.values())) == 3
    assert before == {name: template_fingerprint(name) for name in prompt.TEMPLATES}
    monkeypatch.setattr(prompt, "strip_content", lambda content: content)
    assert template_fingerprint("deepseek") != before["deepseek"]
    with pytest.raises(ValueError, match="'llava' is not one of deepseek, alignment, plain"):
        template_fingerprint("llava")
