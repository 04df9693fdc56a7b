"""Free answers: generate greedily, then compare with the expected text.

In: questions with images and the expected answers. Out: what the model wrote, and how far it is from what was expected,
in edited characters. The protocol of the report for its multimodal benchmarks: greedy, free text, parsed afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavl.data.collate import CollateSettings
from megavl.data.prompt import SYSTEM_PROMPT
from megavl.data.sample import Content
from megavl.data.tokenizer import Tokenizer
from megavl.generate.decoding import Logits, greedy
from megavl.generate.samples import question_sample


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote."""

    text: str
    """Stripped."""
    expected: str
    """What was asked for."""

    @property
    def character_error(self) -> float:
        """Edits (insert, delete, replace) that turn the answer into what was expected, per expected character."""
        return edit_distance(self.text, self.expected) / max(1, len(self.expected))


def generate_answers(
    questions: Sequence[tuple[Content, str]],
    logits: Logits,
    tokenizer: Tokenizer,
    settings: CollateSettings,
    *,
    max_new_tokens: int,
    system: str = SYSTEM_PROMPT,
    blind: bool = False,
) -> list[Answer]:
    """Ask all questions at once.

    Args:
        questions: (question with images, expected answer).
        logits: the model.
        tokenizer: of the model.
        settings: see `megavl.generate.samples.evaluation_settings`.
        max_new_tokens: longest answer.
        system: system prompt of the conversations.
        blind: set all pixels to zero.
    """
    prompts = [question_sample(question, "", tokenizer, system) for question, _ in questions]
    ids = greedy(prompts, logits, settings, end_id=tokenizer.eos_id, max_new_tokens=max_new_tokens, blind=blind)
    return [
        Answer(text=tokenizer.decode(answer).strip(), expected=expected)
        for answer, (_, expected) in zip(ids, questions, strict=True)
    ]


def edit_distance(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn `one` into `other`."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
