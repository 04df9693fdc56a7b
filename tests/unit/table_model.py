"""A model that is a table of logits, with a tokenizer, settings and questions for it: fixtures of evaluation tests."""

import io
from itertools import pairwise

import pytest
import sentencepiece
import torch
from PIL import Image

from megavl.data.collate import CollateSettings
from megavl.data.microbatch import EVERY_PIXEL, IGNORE, MicroBatch
from megavl.data.tokenizer import IMAGE_NAME, Tokenizer
from megavl.evaluate.choices import ChoiceQuestion

TOKENS_PER_IMAGE = 4


@pytest.fixture(scope="module", name="tokenizer")
def make_tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["User: which one is it?\n\nAssistant: one two three 0123456789"] * 20),
            model_writer=file,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            control_symbols=[IMAGE_NAME],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            minloglevel=2,
        )
    return Tokenizer(path)


@pytest.fixture(name="settings")
def make_settings(tokenizer) -> CollateSettings:
    return CollateSettings(
        image_id=tokenizer.image_id,
        pad_id=tokenizer.eos_id,
        tokens_per_image=TOKENS_PER_IMAGE,
        image_size=8,
        background=(127, 127, 127),
        separate_documents=True,
        pixels=EVERY_PIXEL,
    )


class TableModel:
    """Next-token logits from a table of the current token, plus one row per brightness of the document's image."""

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocabulary, vocabulary, generator=generator) * 2
        self.by_brightness = torch.randn(256, vocabulary, generator=generator) * 2
        self.passes = 0

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        self.passes += 1
        logits = self.table[batch.tokens]  # [t, v]
        image = 0
        for start, stop in pairwise(batch.cu_seqlens.tolist()):
            slots = ((batch.image_slots >= start) & (batch.image_slots < stop)).sum()
            if slots and batch.pixels is not None:
                logits[start:stop] += self.by_brightness[int(batch.pixels[image].float().mean())]
                image += int(slots) // TOKENS_PER_IMAGE
        return logits

    def losses(self, batch: MicroBatch) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            self.logits(batch), batch.labels, ignore_index=IGNORE, reduction="none"
        )


def _image(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, format="PNG")
    return buffer.getvalue()


def questions_with_images() -> list[ChoiceQuestion]:
    options = ("one", "two two", "three")
    with_images = [ChoiceQuestion(question=("which ", _image(g)), options=options, answer=g % 3) for g in (0, 90, 200)]
    return [*with_images, ChoiceQuestion(question=("is it?",), options=("0", "12"), answer=1)]
