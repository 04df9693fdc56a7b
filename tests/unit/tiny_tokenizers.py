"""Tokenizers of a few hundred ids with DeepSeek's conventions, for tests.

`write_tokenizer_json` follows the released `tokenizer.json`: byte-level BPE behind splits for line breaks, words with
their space, punctuation with its space, trailing white space, CJK runs and single digits; marks at the end.
"""

from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from megavl.data.tokenizer import BOS_NAMES, EOS_NAMES, IMAGE_NAME

CORPUS = [
    "You are a helpful language and vision assistant. User: what is it?\n\nAssistant: a red digit 7, I think.",
    "the quick brown fox jumps over the lazy dog 12345 (yes), \u4f60\u597d\uff0c\u4e16\u754c\u3002 \u00e9t\u00e9",
    "what a document may spell: <image> <image_placeholder> <s> </s>",
] * 3


def _deepseek_like(vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    splits = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet))
    return tokenizer


def write_tokenizer_json(path: Path, vocab_size: int = 400, flagged: bool = True, image: bool = True) -> Path:
    """Write a tiny `tokenizer.json`; `flagged` marks the image placeholder as special, as the released file does."""
    tokenizer = _deepseek_like(vocab_size)
    tokenizer.add_special_tokens([BOS_NAMES[0], EOS_NAMES[0]])
    if image:
        tokenizer.add_special_tokens([IMAGE_NAME]) if flagged else tokenizer.add_tokens([IMAGE_NAME])
    bos = BOS_NAMES[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    tokenizer.save(str(path))
    return path


def write_sentencepiece(folder: Path, **settings: object) -> Path:
    """Train a tiny SentencePiece BPE model with byte fallback."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(line for text in CORPUS for line in text.split("\n")), encoding="utf-8")
    defaults: dict[str, object] = {
        "vocab_size": 380,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": [IMAGE_NAME, "\n"],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tiny"), **{**defaults, **settings}
    )
    return folder / "tiny.model"
