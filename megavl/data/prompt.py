"""Templates: messages or a document become segments of text, images and marks, each learnt or not.

In: messages (who says what) or a document, with images in place. Out: segments, and from them token ids with one flag
per id that says whether it is a target.

- `deepseek`: the chat template of DeepSeek-VL. Learnt: " {answer}" and the end mark of every answer.
- `alignment`: an image, a line break, its caption. Learnt: the caption and the end mark.
- `plain`: text and images as they come. Learnt: all text and the end mark.

Text between two marks or images is encoded in one piece, wherever "learnt" begins in it, so the ids are exactly those
of encoding the rendered prompt with DeepSeek's tokenizer, which cuts text at special tokens and nowhere else. A token
that covers the border counts as what it ends on. The one difference from the reference code is deliberate: text that
spells a mark stays text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from megavl.data.sample import Content, Conversation, Document, Message, Sample, strip_content
from megavl.data.tokenizer import BOS_NAMES, EOS_NAMES, IMAGE_NAME, Tokenizer

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
TEMPLATES = ("deepseek", "alignment", "plain")


class Mark(Enum):
    """A special token; its value is the name in DeepSeek's vocabulary."""

    BOS = BOS_NAMES[0]
    EOS = EOS_NAMES[0]
    IMAGE = IMAGE_NAME


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered sample."""

    content: str | Mark
    """Text, or one special token."""
    learnt: bool
    """Whether it is a target; never for an image."""


def render(sample: Sample, template: str) -> list[Segment]:
    """A sample under a template.

    Raises:
        ValueError: the template does not fit what the sample is.
    """
    if isinstance(sample, Conversation) and template == "deepseek":
        return render_conversation(sample.messages, SYSTEM_PROMPT if sample.system is None else sample.system)
    if isinstance(sample, Document) and template in ("alignment", "plain"):
        return render_document(sample.content, template)
    raise ValueError(f"a {type(sample).__name__.lower()} can not be rendered by the template {template!r}")


def render_conversation(messages: Sequence[Message], system: str = SYSTEM_PROMPT) -> list[Segment]:
    """The `deepseek` chat template.

    `{system}\\n\\nUser: {u1}\\n\\nAssistant: {a1}<eos>User: {u2}\\n\\nAssistant:`. Messages and the whole prompt are
    stripped; the separator follows the index of the message (even: two line breaks, odd: the end mark); an empty
    message renders `Role:` alone, which is how a prompt asks for an answer.
    """
    segments = [Segment(Mark.BOS, False)]
    if system:
        segments.append(Segment(f"{system}\n\n", False))
    for index, message in enumerate(messages):
        segments.append(Segment(f"{message.role}:", False))
        content = strip_content(message.content)
        if not content:
            continue
        learnt = message.role == "Assistant"
        segments.append(Segment(" ", learnt))
        segments.extend(_content_segments(content, learnt))
        segments.append(Segment("\n\n", False) if index % 2 == 0 else Segment(Mark.EOS, learnt))
    return _strip_ends(segments)


def render_document(content: Content, template: str) -> list[Segment]:
    """`alignment` or `plain`: begin mark, content, end mark. In `alignment`, an image is followed by a line break."""
    segments = [Segment(Mark.BOS, False)]
    for part in content:
        segments.extend(_content_segments((part,), True))
        if template == "alignment" and isinstance(part, bytes):
            segments.append(Segment("\n", False))
    return [*segments, Segment(Mark.EOS, True)]


def _content_segments(content: Content, learnt: bool) -> list[Segment]:
    return [Segment(part, learnt) if isinstance(part, str) else Segment(Mark.IMAGE, False) for part in content]


def _strip_ends(segments: list[Segment]) -> list[Segment]:
    first = next((i for i, s in enumerate(segments) if isinstance(s.content, str)), None)
    if first == 1:  # right after the begin mark
        segments[1] = Segment(str(segments[1].content).lstrip(), segments[1].learnt)
    while segments and isinstance(segments[-1].content, str):
        text = segments[-1].content.rstrip()
        learnt = segments.pop().learnt
        if text:
            segments.append(Segment(text, learnt))
            break
    return segments


def to_text(segments: Sequence[Segment]) -> str:
    """The rendered prompt as the reference code shows it, begin mark left out."""
    parts = [s.content.value if isinstance(s.content, Mark) else s.content for s in segments]
    return "".join(parts[1:] if segments and segments[0].content is Mark.BOS else parts)


def to_tokens(segments: Sequence[Segment], tokenizer: Tokenizer) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids [n] (one placeholder per image) and which are targets [n]."""
    ids: list[int] = []
    learn: list[bool] = []
    run: list[Segment] = []
    for segment in [*segments, None]:
        if segment is not None and isinstance(segment.content, str):
            run.append(segment)
            continue
        text = "".join(str(s.content) for s in run)
        learnt = [s.learnt for s in run for _ in str(s.content)]  # per character
        run_ids, ends = tokenizer.encode_with_ends(text)
        ids.extend(run_ids)
        learn.extend(learnt[end] for end in ends)
        run = []
        if segment is not None:
            ids.append(_mark_id(segment.content, tokenizer))  # type: ignore[arg-type]
            learn.append(segment.learnt)
    return np.array(ids, dtype=np.int32), np.array(learn, dtype=bool)


def _mark_id(mark: Mark, tokenizer: Tokenizer) -> int:
    if mark is Mark.IMAGE:
        return tokenizer.image_id
    return tokenizer.bos_id if mark is Mark.BOS else tokenizer.eos_id


def template_fingerprint(template: str) -> str:
    """sha256 of how a template renders a fixed probe: it changes when the rendering or the learnt part does."""
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is not one of {', '.join(TEMPLATES)}")
    image = b"image"
    if template == "deepseek":
        probe = [
            Message("User", (" a ", image)),
            Message("Assistant", ("b ",)),
            Message("User", ("c",)),
            Message("Assistant", ()),
        ]
        segments = render_conversation(probe)
    else:
        segments = render_document((image, "a", image, " b"), template)
    return hashlib.sha256(repr([(s.content, s.learnt) for s in segments]).encode()).hexdigest()
