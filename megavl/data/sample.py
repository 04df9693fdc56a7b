"""What an importer hands over: a conversation or a document, its images in place as encoded bytes.

In: a record of some public format. Out: the one form that templates render. Text and images stand in reading order, so
a sample can not have a placeholder without its image; importers check that while they replace placeholders.
"""

from dataclasses import dataclass
from typing import Literal

Content = tuple[str | bytes, ...]
"""Text and encoded images (JPEG, PNG, ... file content) in reading order."""
Role = Literal["User", "Assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks, as the chat template prints it."""
    content: Content
    """What is said; empty in the last turn of a prompt that asks for an answer."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """User and Assistant in turn, User first."""

    messages: tuple[Message, ...]
    """At least one pair."""
    system: str | None = None
    """System prompt of this conversation; None: DeepSeek-VL's."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A caption, an interleaved document, or plain text."""

    content: Content
    """Text and images."""


Sample = Conversation | Document


def images_of(sample: Sample) -> list[bytes]:
    """Encoded images of a sample in reading order."""
    contents = [m.content for m in sample.messages] if isinstance(sample, Conversation) else [sample.content]
    return [part for content in contents for part in content if isinstance(part, bytes)]


def strip_content(content: Content) -> Content:
    """`str.strip` for text with images in it: an image is not white space."""
    parts = list(content)
    while parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
        if parts[0]:
            break
        parts.pop(0)
    while parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
        if parts[-1]:
            break
        parts.pop()
    return tuple(parts)


@dataclass(frozen=True)
class Rejected:
    """An input that does not become a sample."""

    origin: str
    """File and line, or tar and key."""
    reason: str
    """One sentence."""
