"""Build the data of the quickstart: tokenizer and stores, from what is already on this machine.

In: the documentation of the running Python (`corpus`), pages rendered from it (`pages`), scikit-learn's digits
(`digits`). Out: a folder with `tokenizer.model`, one store per training source, and the held-out documents, in the
formats that every other run of megavl reads. Held-out digits and pages are made where they are measured.

    python examples/quickstart/prepare.py runs/quickstart/data
"""

import argparse
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path

import sentencepiece
from corpus import SPLITS, Document, Split, documents, part
from digits import CAPTIONS, QUESTIONS, WORDS, DigitImage, digits
from pages import LAYOUTS, Page, pages
from pages import QUESTIONS as PAGE_QUESTIONS

from megavl.data import prompt, sample
from megavl.data.store_writer import StoreWriter
from megavl.data.tokenizer import IMAGE_NAME, Tokenizer

VOCABULARY = 1024
SEQUENCE = 128
"""Tokens of a language row; SFT texts are cut to fit it."""
PAGES_PER_LAYOUT = (6000, 1000, 500)
"""Pages of each of `pages.LAYOUTS` to train on: most of them large, because only those can be learnt in this time."""
_DESCRIPTION_TOKENS = 75
_START_TOKENS = (10, 25)
_CONTINUATION_TOKENS = 75


def prepare(folder: Path, seed: int = 0, share: float = 1.0) -> None:
    """Write tokenizer and stores into `folder`; equal input gives equal files.

    Args:
        folder: where they go.
        seed: of variations and pages.
        share: part of documents, pages and digits to use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = digits("train", seed, share=share)  # first: it may be missing altogether
    by_split = {split: part(chosen, share) for split, chosen in _split(documents()).items()}
    counts = ", ".join(f"{len(by_split[split])} {split}" for split in SPLITS)
    characters = sum(len(d.text) for chosen in by_split.values() for d in chosen)
    print(f"corpus: {characters:,} characters in documents for {counts}", flush=True)
    model, train = folder / "tokenizer.model", by_split["train"]
    model.write_bytes(train_tokenizer([*(d.text for d in train), *_wording()]))
    tokenizer = Tokenizer(model)
    for split in SPLITS:
        as_samples = [sample.Document(content=(document.text,)) for document in by_split[split]]
        write_store(folder / f"{split}_text", tokenizer, "plain", as_samples, kind="text")
    rendered = [
        page
        for layout, count in zip(LAYOUTS, PAGES_PER_LAYOUT, strict=True)
        for page in pages(train, layout, ceil(count * share), seed)
    ]
    write_store(folder / "train_digit_captions", tokenizer, "alignment", map(digit_caption, shown))
    write_store(folder / "train_digit_questions", tokenizer, "deepseek", map(digit_question, shown))
    write_store(folder / "train_pages", tokenizer, "alignment", map(page_pair, rendered))
    # No recipe reads these; they are there to repeat the README's trials with pages in stage 3.
    write_store(folder / "train_page_questions", tokenizer, "deepseek", map(page_question, rendered))
    write_store(folder / "train_text_sft", tokenizer, "deepseek", text_sft(train, tokenizer, seed))
    print(f"to train on: {len(shown)} images of digits, {len(rendered)} pages; stores in {folder}", flush=True)


def write_store(
    prefix: Path, tokenizer: Tokenizer, template: str, samples: Iterable[sample.Sample], kind: str = "sft"
) -> None:
    """Render samples with a template and write them as a store."""
    writer = StoreWriter(
        prefix,
        kind=kind,
        tokenizer_fingerprint=tokenizer.fingerprint,
        template=template,
        template_fingerprint=prompt.template_fingerprint(template),
        overwrite=True,
    )
    with writer:
        for one in samples:
            tokens, learn = prompt.to_tokens(render(one, template), tokenizer)
            if kind == "text":  # a language store learns every token, its begin mark too
                writer.add(tokens)
            else:
                writer.add(tokens, learn, sample.images_of(one))
        writer.finish()


def render(one: sample.Sample, template: str) -> list[prompt.Segment]:
    """Segments of a sample."""
    if isinstance(one, sample.Conversation):
        return prompt.render_conversation(one.messages, system=one.system or "")
    return prompt.render_document(one.content, template)


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """A SentencePiece BPE model of 1024 pieces: digits alone, unknown characters as bytes, the line break a piece."""
    model = _Bytes()
    paragraphs = (part for text in texts for part in text.split("\n\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=paragraphs,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        split_digits=True,
        byte_fallback=True,
        user_defined_symbols=["\n"],
        control_symbols=[IMAGE_NAME],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    return model.content


def _wording() -> list[str]:
    """The fixed words of prompts and captions, often enough to get pieces of their own: prompts become half as long."""
    questions = [
        f"User: {question} \n\nAssistant: " for question in (*QUESTIONS, *PAGE_QUESTIONS, "Continue:", "Describe")
    ]
    captions = [caption.format(digit=word) for caption in CAPTIONS for word in WORDS]
    return [*questions * 200, *captions * 20]


class _Bytes:
    """Where SentencePiece writes its model."""

    content = b""

    def write(self, data: bytes) -> None:
        self.content += data


def digit_caption(image: DigitImage) -> sample.Document:
    """An image and a sentence about it, in wording chosen by the image."""
    rng = random.Random(image.png)
    digit = rng.choice((str(image.digit), WORDS[image.digit]))
    return sample.Document(content=(image.png, rng.choice(CAPTIONS).format(digit=digit)))


def digit_question(image: DigitImage) -> sample.Conversation:
    """A question in wording chosen by the image, the image, and the digit as the answer."""
    question = random.Random(image.png).choice(QUESTIONS)
    return _conversation((f"{question} ", image.png), str(image.digit))


def page_pair(page: Page) -> sample.Document:
    """A page and its transcript."""
    return sample.Document(content=(page.png, page.text))


def page_question(page: Page) -> sample.Conversation:
    """A request for the transcript of a page."""
    question = random.Random(page.png).choice(PAGE_QUESTIONS)
    return _conversation((f"{question} ", page.png), page.text)


def text_sft(chosen: Sequence[Document], tokenizer: Tokenizer, seed: int) -> Iterator[sample.Conversation]:
    """Two conversations a document: describe it by name, and continue it from a random place."""
    rng = random.Random(f"{seed} text")
    for document in chosen:
        head = tokenizer.encode(document.paragraphs[0])[:_DESCRIPTION_TOKENS]
        if len(document.name) <= 45:
            yield _conversation((f"Describe {document.name}",), tokenizer.decode(head))
        words = document.text.split(" ")
        ids = tokenizer.encode(" ".join(words[rng.randrange(max(1, len(words) - 40)) :]).strip())
        cut = rng.randint(*_START_TOKENS)
        if len(ids) >= cut + 10:
            start, rest = ids[:cut], ids[cut : cut + _CONTINUATION_TOKENS]
            yield _conversation((f"Continue: {tokenizer.decode(start)}",), tokenizer.decode(rest))


def _conversation(question: sample.Content, answer: str) -> sample.Conversation:
    """One turn without a system prompt, which would take more tokens than everything else."""
    messages = (sample.Message("User", question), sample.Message("Assistant", (answer,)))
    return sample.Conversation(messages=messages, system="")


def _split(found: Sequence[Document]) -> dict[Split, list[Document]]:
    return {split: [d for d in found if d.split == split] for split in SPLITS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the data of the quickstart.")
    parser.add_argument("folder", type=Path, help="where tokenizer and stores go")
    parser.add_argument("--seed", type=int, default=0, help="of variations and pages; the splits never change")
    parser.add_argument("--share", type=float, default=1.0, help="part of documents, pages and digits to use")
    arguments = parser.parse_args()
    try:
        prepare(arguments.folder, arguments.seed, arguments.share)
    except ValueError as error:
        sys.exit(f"error: {error}")
