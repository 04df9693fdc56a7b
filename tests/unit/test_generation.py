"""Greedy answers against a plain loop over one prompt at a time, with a model that is a table; edit distance."""

import pytest
from table_model import TableModel, make_settings, make_tokenizer, questions_with_images  # noqa: F401 (fixtures)

from megavl.evaluate.generation import Answer, edit_distance, generate_answers
from megavl.generate.samples import question_sample, sample_microbatch


def test_greedy_answers_equal_a_loop_over_single_prompts(tokenizer, settings):
    model = TableModel(tokenizer.vocab_size)
    model.table[:, tokenizer.eos_id] += 5  # so that answers end at different lengths
    questions = [(q.question, "one") for q in questions_with_images()]
    answers = generate_answers(questions, model.logits, tokenizer, settings, max_new_tokens=12)
    lengths = set()
    for (question, _), answer in zip(questions, answers, strict=True):
        start = sample_microbatch([question_sample(question, "", tokenizer)], settings)
        offset = model.logits(start)[-1] - model.table[start.tokens[-1]]
        token, ids = int(start.tokens[-1]), []
        for _ in range(12):
            token = int((model.table[token] + offset).argmax())
            if token == tokenizer.eos_id:
                break
            ids.append(token)
        lengths.add(len(ids))
        assert answer.text == tokenizer.decode(ids).strip()
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("one", "other", "edits"), [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("ab", "ba", 2)]
)
def test_edit_distance(one, other, edits):
    assert edit_distance(one, other) == edit_distance(other, one) == edits
    assert Answer(text=one, expected=other).character_error == edits / max(1, len(other))
