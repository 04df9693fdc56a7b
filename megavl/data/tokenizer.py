"""Text to token ids and back, for DeepSeek's `tokenizer.json` and for SentencePiece models.

In: text. Out: ids, and for each id the character of the text that it ends on, so that "which characters are learnt"
becomes "which tokens are learnt" without cutting the text where the tokenizer would not.

Special tokens (begin, end, image placeholder) are found by name, so a tiny tokenizer works like the released one. Text
never produces them, however it is spelled: a document about `<image_placeholder>` stays text, and only an importer that
means an image places that id (`megavl/data/prompt.py`).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

BOS_NAMES = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<s>")  # DeepSeek's name first, then LLaMA's
EOS_NAMES = ("<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>")
IMAGE_NAME = "<image_placeholder>"
_MARK_NAMES = {*BOS_NAMES, *EOS_NAMES, IMAGE_NAME}


class Tokenizer:
    """A tokenizer file and the ids of its special tokens."""

    def __init__(self, path: str | Path) -> None:
        """Read `tokenizer.json` or a SentencePiece `.model`; the suffix tells which.

        Raises:
            ValueError: the file is missing, unreadable, or has no begin or end token.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: tokenizer file not found")
        content = self.path.read_bytes()
        self.fingerprint: str = hashlib.sha256(content).hexdigest()
        """sha256 of the file; a store remembers the one it was built with."""
        try:
            self._backend = _HuggingFace(content) if self.path.suffix == ".json" else _SentencePiece(content)
        except (
            Exception
        ) as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError or protobuf's DecodeError
            raise ValueError(f"{path}: not a tokenizer.json or SentencePiece model ({error})") from error
        self.vocab_size: int = self._backend.vocab_size
        """Highest id plus one; the model may pad its table beyond it."""
        self.bos_id: int = self._required(BOS_NAMES, "begin")
        self.eos_id: int = self._required(EOS_NAMES, "end")
        self._image_id = self._backend.find(IMAGE_NAME)

    def _required(self, names: tuple[str, ...], role: str) -> int:
        for name in names:
            found = self._backend.find(name)
            if found is not None:
                return found
        model_id = self._backend.control_id(role)
        if model_id is None:
            raise ValueError(f"{self.path}: no {role}-of-text token, looked for {' and '.join(names)}")
        return model_id

    @property
    def image_id(self) -> int:
        """Id of the image placeholder.

        Raises:
            ValueError: a text-only tokenizer has none.
        """
        if self._image_id is None:
            raise ValueError(f"{self.path}: no {IMAGE_NAME} token, so it can not be used with images")
        return self._image_id

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin and end, never a special id.

        Raises:
            ValueError: the text holds half of a surrogate pair, which no UTF-8 file can.
        """
        _check_unicode(text)
        return self._backend.encode(text) if text else []

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text` and, for each, the index of the last character it covers (0 to len(text) - 1)."""
        _check_unicode(text)
        return self._backend.encode_with_ends(text) if text else ([], [])

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens are left out."""
        special = {self.bos_id, self.eos_id, self._image_id}
        return self._backend.decode([int(i) for i in ids if int(i) not in special])

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path]]:
        """Pickle as the path: a loader process reads the file itself."""
        return Tokenizer, (self.path,)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"broken Unicode (lone surrogate) at character {error.start}") from error


class _HuggingFace:
    """`tokenizer.json` through the `tokenizers` library."""

    def __init__(self, content: bytes) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        added = self._tokenizer.get_added_tokens_decoder().values()
        if any(token.content in _MARK_NAMES and not token.special for token in added):
            self._tokenizer = tokenizers.Tokenizer.from_str(_flag_marks(content))
        self._tokenizer.encode_special_tokens = True  # a spelled special token is encoded as ordinary text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def find(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def control_id(self, role: str) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        # ByteLevel trims offsets: a token of white space alone may be empty and start at len(text).
        ends = [min(max(end - 1, start), len(text) - 1) for start, end in encoding.offsets]
        return encoding.ids, ends

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _flag_marks(content: bytes) -> str:
    """Flag the marks as special: text matches every added token that is not."""
    settings = json.loads(content)
    for token in settings["added_tokens"]:
        token["special"] = token["special"] or token["content"] in _MARK_NAMES
    return json.dumps(settings)


class _SentencePiece:
    """A SentencePiece model; marks defined as user symbols are made control symbols, which text can not produce."""

    def __init__(self, content: bytes) -> None:
        proto: Any = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(content)
        control = type(proto.pieces[0]).CONTROL if proto.pieces else None
        for piece in proto.pieces:
            if piece.piece in _MARK_NAMES:
                piece.type = control
        self._ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.vocab_size = len(proto.pieces)

    def find(self, name: str) -> int | None:
        return self._ids.get(name)

    def control_id(self, role: str) -> int | None:
        found = self._processor.bos_id() if role == "begin" else self._processor.eos_id()
        return found if found >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        mapping = self._processor.encode(text, return_type="offset_mapping")  # sentencepiece >= 0.2.3; in characters
        # The leading bytes of a byte-fallback character are empty pieces that stand before it.
        ends = [min(max(end - 1, begin), len(text) - 1) for begin, end in mapping["offsets"]]
        return mapping["ids"], ends

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)
