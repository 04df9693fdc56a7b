"""Multi-choice questions by perplexity: each option is put in as the answer, the least surprising one is the model's.

In: questions with images and options. Out: the chosen option of each question and the perplexity of every option. This
is the protocol of the report for HellaSwag, MMLU and its own monitoring (section 4.1); nothing is generated or parsed.
Shapes: t tokens of a micro-batch, d options in it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavl.data.collate import CollateSettings
from megavl.data.microbatch import IGNORE, MicroBatch
from megavl.data.prompt import SYSTEM_PROMPT
from megavl.data.sample import Content
from megavl.data.tokenizer import Tokenizer
from megavl.generate.samples import batched, question_sample, sample_microbatch

TokenLosses = Callable[[MicroBatch], Tensor]
"""Loss of each token, fp32 [t], 0 where nothing is learnt: a `Stage` of one process, or a pipeline in a function."""


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """A question with its options."""

    question: Content
    """Text and encoded images."""
    options: tuple[str, ...]
    """Possible answers."""
    answer: int
    """Index of the right one."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the model chose."""

    chosen: int
    """Index of the option with the lowest perplexity; the first of equals."""
    perplexities: tuple[float, ...]
    """exp(mean loss over the option's tokens and the end mark), one per option."""
    right: bool
    """Whether it is the right one."""


def answer_choices(
    questions: Sequence[ChoiceQuestion],
    token_losses: TokenLosses,
    tokenizer: Tokenizer,
    settings: CollateSettings,
    *,
    system: str = SYSTEM_PROMPT,
    blind: bool = False,
    max_tokens: int = 4096,
) -> list[Choice]:
    """Answer every question.

    Options of several questions share a forward pass, as separate documents of one stream.

    Args:
        questions: what to ask.
        token_losses: the model.
        tokenizer: of the model.
        settings: see `megavl.generate.samples.evaluation_settings`.
        system: system prompt of the conversations.
        blind: set all pixels to zero (black), to see how much of the answer comes from the image.
        max_tokens: tokens of a forward pass, images included.

    Raises:
        ValueError: a question has fewer than two options, or an image cannot be decoded.
    """
    for number, question in enumerate(questions):
        if len(question.options) < 2:
            raise ValueError(f"question {number} has {len(question.options)} options, at least 2 are needed")
    samples = [question_sample(q.question, option, tokenizer, system) for q in questions for option in q.options]
    means: list[float] = []
    for group in batched(samples, settings, max_tokens):
        batch = sample_microbatch([samples[index] for index in group], settings)
        if blind and batch.pixels is not None:
            batch = replace(batch, pixels=torch.zeros_like(batch.pixels))
        means += document_losses(token_losses(batch), batch).tolist()
    choices, start = [], 0
    for question in questions:
        stop = start + len(question.options)
        choices.append(_choose(means[start:stop], question.answer))
        start = stop
    return choices


def accuracy(choices: Sequence[Choice]) -> float:
    """Share of right choices, 0 to 1."""
    return sum(choice.right for choice in choices) / len(choices)


def document_losses(losses: Tensor, batch: MicroBatch) -> Tensor:
    """Mean loss over the supervised tokens of each document.

    Args:
        losses: of each token, [t].
        batch: where documents begin and which tokens are supervised.

    Returns:
        fp64 [d]; 0 for a document without a supervised token.
    """
    sizes = batch.cu_seqlens.diff().to(torch.int64).cpu()  # [d]
    document = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # [t]
    learnt = (batch.labels != IGNORE).cpu()  # [t]
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, document, (losses.cpu() * learnt).double())  # [d]
    return sums / torch.bincount(document[learnt], minlength=len(sizes)).clamp(min=1)


def _choose(means: Sequence[float], answer: int) -> Choice:
    chosen = min(range(len(means)), key=means.__getitem__)
    return Choice(
        chosen=chosen, perplexities=tuple(math.exp(min(mean, 700.0)) for mean in means), right=chosen == answer
    )
