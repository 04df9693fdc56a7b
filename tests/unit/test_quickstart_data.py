"""The quickstart's input: the same on every start, and nothing held out is in the training part."""

import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The quickstart's files import each other by their short names, as scripts of one folder do."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def corpus_parts():
    from corpus import SPLITS, documents

    found = documents()
    return found, {split: [d for d in found if d.split == split] for split in SPLITS}


def test_corpus_is_large_split_by_text_and_deterministic(corpus_parts):
    from corpus import split_of

    found, parts = corpus_parts
    assert len({d.text for d in found}) == len(found)
    characters = {split: sum(len(d.text) for d in documents) for split, documents in parts.items()}
    assert characters["train"] > 800_000
    assert 0.01 < characters["test"] / sum(characters.values()) < 0.12
    assert 0.01 < characters["validation"] / sum(characters.values()) < 0.12
    percent = int.from_bytes(hashlib.sha256(b"probe").digest()[:4], "big") % 100
    assert split_of("probe") == ("validation" if percent < 4 else "test" if percent < 9 else "train")
    names = [d.name for d in found]
    assert "json.dumps" in names
    assert names.index("topic assert") < names.index("json.dumps")


def test_digits_of_the_parts_share_no_scan():
    from digits import digits

    parts = {split: digits(split, varied_copies=1) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [2 * 1317, 180, 300]
    scans = [{image.png for image in part} for part in parts.values()]
    assert not scans[0] & scans[1]
    assert not scans[0] & scans[2]
    assert not scans[1] & scans[2]
    assert {image.digit for image in parts["test"]} == set(range(10))
    assert digits("train", varied_copies=1)[1].png == parts["train"][1].png
    assert digits("train", seed=1, varied_copies=1)[1].png != parts["train"][1].png


def test_varied_digits_are_close_to_their_scan_and_stay_on_white():
    from digits import SIDE, digits

    clean, varied = digits("train", varied_copies=1)[:2]
    assert clean.digit == varied.digit
    one, other = (np.asarray(Image.open(io.BytesIO(image.png)), dtype=float) for image in (clean, varied))
    assert one.shape == other.shape == (SIDE, SIDE)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.6
    assert other.max() == 255


def test_pages_show_the_words_of_their_transcript_in_every_layout(corpus_parts):
    from pages import LAYOUTS, pages

    held_out = corpus_parts[1]["test"]
    text = " ".join(d.text for d in held_out)
    for layout in LAYOUTS:
        found = pages(held_out, layout, 12)
        assert found == pages(held_out, layout, 12)
        assert all(word in text for page in found for word in page.text.split())
        for page in found:
            pixels = np.asarray(Image.open(io.BytesIO(page.png)), dtype=float)
            assert pixels.shape == (64, 64)
            paper = np.median(pixels)
            ink = pixels < paper - 60
            assert 0.01 < ink.mean() < 0.5
            assert not ink[:, 0].any()
            assert not ink[:, -1].any()


def test_store_samples_fit_their_rows_and_learn_the_answer_alone(corpus_parts, tmp_path):
    from digits import digits
    from prepare import SEQUENCE, digit_question, render, text_sft, train_tokenizer

    from megavl.data.prompt import to_tokens
    from megavl.data.tokenizer import Tokenizer

    documents = corpus_parts[1]["validation"]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer(d.text for d in corpus_parts[1]["train"]))
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size == 1024
    assert tokenizer.decode(tokenizer.encode("a 12\n b")) == "a 12\n b"
    samples = list(text_sft(documents, tokenizer, 0))
    assert len(samples) > len(documents)
    for one in samples:
        tokens, learn = to_tokens(render(one, "deepseek"), tokenizer)
        assert len(tokens) <= SEQUENCE
        assert 0 < learn.sum() < len(tokens)
    image = digits("test")[0]
    tokens, learn = to_tokens(render(digit_question(image), "deepseek"), tokenizer)
    assert tokenizer.decode(tokens[learn].tolist()).strip() == str(image.digit)
    assert tokens[learn][-1] == tokenizer.eos_id
    assert (tokens == tokenizer.image_id).sum() == 1


def test_the_cause_of_a_failure_is_told_in_the_words_of_the_command(tmp_path):
    from run import _cause

    errors = tmp_path / "stage0.stderr.txt"
    noise = "W1122 warning\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    for sentence in ("megavl: parallel.tensor 3 does not fit", "error: no digits", "RuntimeError: a fault"):
        errors.write_text(f"{noise if sentence.startswith(('megavl', 'error')) else ''}  {sentence}\n{noise}")
        assert _cause(errors) == sentence
    errors.write_text("nothing of interest\n")
    assert _cause(errors) == "it wrote no error message"
