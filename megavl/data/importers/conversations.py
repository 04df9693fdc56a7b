"""Conversations under the field names of the reference code, LLaVA and ShareGPT.

In: a record. Out: a `Conversation` whose turns alternate, start with User and end with an answer.

- reference: a list of `{"role": "User", "content": "... <image_placeholder>", "images": ["a.jpg"]}`, alone or under
  `conversations` or `messages`;
- LLaVA: `{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}`;
- ShareGPT: the same without image, or `{"messages": [{"role": "user", ...}], "images": [...]}`, with content as text
  or as a list of `{"type": "text" | "image" | "image_url", ...}` entries.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from megavl.data.importers.images import ALL_TAGS, REFERENCE_TAGS, place_images
from megavl.data.sample import Conversation, Document, Message, Role, strip_content
from megavl.data.tokenizer import IMAGE_NAME

_ROLES = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant", "system": "system"}


def to_conversation(record: Any, folder: Path, images: Sequence[bytes] = ()) -> Conversation:
    """Read a record.

    Args:
        record: parsed JSON.
        folder: where relative image paths start.
        images: images that came beside the record (WebDataset) and replace those it names.

    Raises:
        ValueError: a field is missing, roles do not alternate, an answer is empty, placeholders and images differ in
            number, or an image can not be read.
    """
    turns = _turns(record)
    roles = [_role(turn) for turn in turns]
    read = [_read_turn(turn) for turn in turns]
    listed = _listed_images(record)
    references = list(images) or [*listed, *(image for _, own in read for image in own)]
    # A message of the reference's format carries its images; "<image>" is ordinary text there.
    tags = ALL_TAGS if images or listed or "from" in turns[0] else REFERENCE_TAGS
    contents = place_images([text for text, _ in read], references, tags, folder)
    system = None
    if roles[0] == "system":
        system = "".join(part for part in contents[0] if isinstance(part, str)).strip()
        if any(isinstance(part, bytes) for part in contents[0]):
            raise ValueError("the system message holds an image")
        roles, contents = roles[1:], contents[1:]
    _check_roles(roles)
    messages = tuple(Message(cast(Role, role), content) for role, content in zip(roles, contents, strict=True))
    _check_contents(messages)
    return Conversation(messages=messages, system=system)


def _turns(record: Any) -> list[dict[str, Any]]:
    turns = record
    if isinstance(record, dict):
        turns = next((record[key] for key in ("conversations", "messages", "conversation") if key in record), None)
        if turns is None:
            raise ValueError(f"no field conversations or messages, only {', '.join(sorted(record)) or 'nothing'}")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("the conversation is not a list of messages")
    return turns


def _role(turn: dict[str, Any]) -> str:
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"the role {name!r:.40} is not one of {', '.join(_ROLES)}")
    return role


def _listed_images(record: Any) -> list[Any]:
    """Images that the record names beside its messages."""
    if not isinstance(record, dict):
        return []
    value = record.get("image") or record.get("images") or []
    return value if isinstance(value, list) else [value]


def _read_turn(turn: dict[str, Any]) -> tuple[str, list[Any]]:
    """Text of a turn, and the images that the turn itself names."""
    content = turn.get("content", turn.get("value"))
    own = list(turn.get("images") or ())
    if content is None or isinstance(content, str):
        return content or "", own
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"the content of a message is {content!r:.40}, not text")
    text = ""
    for entry in content:
        if entry.get("type") == "text":
            text += str(entry.get("text", ""))
            continue
        text += IMAGE_NAME
        url = entry.get("image_url", entry.get("image"))
        if url is not None:
            own.append(url.get("url") if isinstance(url, dict) else url)
    return text, own


def _check_roles(roles: list[str]) -> None:
    for index, role in enumerate(roles):
        expected = "User" if index % 2 == 0 else "Assistant"
        if role != expected:
            raise ValueError(f"message {index + 1} of {len(roles)} is from {role}, {expected} was expected")
    if len(roles) % 2 or not roles:
        raise ValueError(f"{len(roles)} messages: the last question has no answer to learn")


def _check_contents(messages: tuple[Message, ...]) -> None:
    for index, message in enumerate(messages):
        if not strip_content(message.content):
            kind = "empty answer" if message.role == "Assistant" else "empty question"
            raise ValueError(f"{kind} (message {index + 1} of {len(messages)})")


def to_caption(conversation: Conversation) -> Document:
    """The images of a one-round conversation and its answer: LLaVA's pretraining files hold captions in this form.

    Raises:
        ValueError: there is more than one round.
    """
    rounds = len(conversation.messages) // 2
    if rounds != 1:
        raise ValueError(f"a conversation of {rounds} rounds is not a caption; use the template deepseek")
    question, answer = (strip_content(message.content) for message in conversation.messages)
    return Document(content=(*(part for part in question if isinstance(part, bytes)), *answer))
