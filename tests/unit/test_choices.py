"""Multi-choice perplexity against a plain loop over one option at a time, with a model that is a table."""

import math

import pytest
import torch
from table_model import TableModel, make_settings, make_tokenizer, questions_with_images  # noqa: F401 (fixtures)

from megavl.data.microbatch import IGNORE
from megavl.evaluate.choices import ChoiceQuestion, accuracy, answer_choices, document_losses
from megavl.generate.samples import question_sample, sample_microbatch


@pytest.mark.parametrize("max_tokens", [1, 70, 4096])
def test_perplexities_equal_a_loop_over_single_options(tokenizer, settings, max_tokens):
    model = TableModel(tokenizer.vocab_size)
    questions = questions_with_images()
    choices = answer_choices(questions, model.losses, tokenizer, settings, max_tokens=max_tokens)
    assert model.passes == {1: 11, 4096: 1}.get(max_tokens, model.passes)
    for question, choice in zip(questions, choices, strict=True):
        expected = []
        for option in question.options:
            sample = question_sample(question.question, option, tokenizer)
            batch = sample_microbatch([sample], settings)
            probabilities = model.logits(batch).log_softmax(-1)
            scored = [i for i in range(len(batch.tokens)) if batch.labels[i] != IGNORE]
            assert tokenizer.decode([int(batch.labels[i]) for i in scored]).strip() == option
            assert batch.labels[scored[-1]] == tokenizer.eos_id
            expected.append(math.exp(-sum(float(probabilities[i, batch.labels[i]]) for i in scored) / len(scored)))
        assert choice.perplexities == pytest.approx(expected, rel=1e-5)
        assert choice.chosen == expected.index(min(expected))
        assert choice.right == (choice.chosen == question.answer)
    assert accuracy(choices) == sum(c.right for c in choices) / 4


def test_blind_questions_with_the_same_words_get_the_same_answer(tokenizer, settings):
    model = TableModel(tokenizer.vocab_size)
    questions = questions_with_images()[:3]
    seen = answer_choices(questions, model.losses, tokenizer, settings)
    blind = answer_choices(questions, model.losses, tokenizer, settings, blind=True)
    assert len({choice.perplexities for choice in seen}) == 3
    assert len({choice.perplexities for choice in blind}) == 1
    assert blind[0].perplexities == pytest.approx(seen[0].perplexities)  # its image is black already


def test_a_single_option_is_refused(tokenizer, settings):
    question = ChoiceQuestion(question=("which",), options=("one",), answer=0)
    with pytest.raises(ValueError, match="question 0 has 1 options"):
        answer_choices([question], TableModel(tokenizer.vocab_size).losses, tokenizer, settings)


def test_a_broken_image_is_an_error_and_not_a_blank(tokenizer, settings):
    question = ChoiceQuestion(question=("which ", b"no image"), options=("one", "two"), answer=0)
    with pytest.raises(ValueError, match="image 0"):
        answer_choices([question], TableModel(tokenizer.vocab_size).losses, tokenizer, settings)


def test_document_losses_skip_what_is_not_learnt(tokenizer, settings):
    samples = [question_sample(("is it?",), "one", tokenizer), question_sample(("is it?",), "", tokenizer)]
    batch = sample_microbatch(samples, settings)
    losses = torch.arange(len(batch.tokens), dtype=torch.float32)
    expected = losses[batch.labels != IGNORE].mean().item()
    assert document_losses(losses, batch).tolist() == pytest.approx([expected, 0.0])
