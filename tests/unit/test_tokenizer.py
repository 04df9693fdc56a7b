"""Tokenizers: marks by name, text that never produces them, round trips, and where each token ends."""

import hashlib
import pickle
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import write_sentencepiece, write_tokenizer_json

from megavl.data.tokenizer import BOS_NAMES, EOS_NAMES, IMAGE_NAME, Tokenizer

MARKS = (*BOS_NAMES, *EOS_NAMES, IMAGE_NAME)
texts = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)
spelled = st.lists(st.one_of(texts, st.sampled_from(MARKS)), max_size=5).map("".join)


@pytest.fixture(scope="module", params=["json", "json_unflagged", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return Tokenizer(write_sentencepiece(folder))
    return Tokenizer(write_tokenizer_json(folder / "tokenizer.json", flagged=request.param == "json"))


def test_marks_are_found_by_name(tmp_path: Path) -> None:
    path = write_tokenizer_json(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(path))
    ours = Tokenizer(path)
    expected = [plain.token_to_id(name) for name in (BOS_NAMES[0], EOS_NAMES[0], IMAGE_NAME)]
    assert [ours.bos_id, ours.eos_id, ours.image_id] == expected
    assert ours.vocab_size == plain.get_vocab_size(with_added_tokens=True) == max(expected) + 1
    assert ours.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_sentencepiece_marks_come_from_the_model_or_from_symbols(tmp_path: Path) -> None:
    plain = Tokenizer(write_sentencepiece(tmp_path))
    assert (plain.bos_id, plain.eos_id) == (1, 2)  # SentencePiece's defaults <s>, </s>
    symbols = [BOS_NAMES[0], EOS_NAMES[0], IMAGE_NAME]
    named = Tokenizer(write_sentencepiece(tmp_path, user_defined_symbols=symbols, bos_id=-1, eos_id=-1))
    assert len({named.bos_id, named.eos_id, named.image_id, 0}) == 4


@settings(max_examples=200, deadline=None)
@given(text=spelled)
def test_text_never_produces_a_mark(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=200, deadline=None)
@given(text=spelled)
def test_round_trip_and_ends(tokenizer: Tokenizer, text: str) -> None:
    ids, ends = tokenizer.encode_with_ends(text)
    # SentencePiece writes a space as U+2581, so it can not tell the two apart.
    expected = text.replace("\u2581", " ") if tokenizer.path.suffix == ".model" else text
    assert tokenizer.decode(ids) == expected
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(ends)
    assert all(0 <= end < len(text) for end in ends)
    assert ends == sorted(ends)
    if text:
        assert ends[-1] == len(text) - 1


def test_ends_are_those_of_the_decoded_prefix(tokenizer: Tokenizer) -> None:
    text = "User: what is it?\n\nAssistant: a red digit 77, \u4f60\u597d."
    ids, ends = tokenizer.encode_with_ends(text)
    for count, end in enumerate(ends, 1):
        prefix = tokenizer.decode(ids[:count])
        if prefix and "\ufffd" not in prefix:  # neither SentencePiece's leading space nor a part of a character
            assert prefix == text[: end + 1]


@pytest.mark.parametrize("text", ["a\r\nb", "  two  spaces ", "\n\n", "\u00e9\u0301 \U0001f600 \u4f60\u597d", "\t"])
def test_white_space_and_unicode_survive(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_empty_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []


def test_decode_leaves_marks_out(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("a red"), tokenizer.image_id, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a red"


def test_lone_surrogate_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate\) at character 2"):
        tokenizer.encode("ab\ud800")


def test_pickle_keeps_everything(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode("a red digit") == tokenizer.encode("a red digit")


def test_faulty_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json: tokenizer file not found"):
        Tokenizer(tmp_path / "gone.json")
    for name in ("bad.json", "bad.model"):
        (tmp_path / name).write_bytes(b"\xff not a tokenizer")
        with pytest.raises(ValueError, match=f"{name}: not a tokenizer.json or SentencePiece model"):
            Tokenizer(tmp_path / name)
    without_marks = tmp_path / "plain.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(without_marks))
    with pytest.raises(ValueError, match=r"plain.json: .*token"):
        Tokenizer(without_marks)


def test_text_only_tokenizer_has_no_image_id(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer_json(tmp_path / "tokenizer.json", image=False))
    with pytest.raises(ValueError, match="no <image_placeholder> token"):
        _ = tokenizer.image_id
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("dog")]) == "dog"
