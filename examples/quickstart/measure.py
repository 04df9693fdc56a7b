"""Measure the four models of the quickstart on held-out data.

In: the checkpoints of `run.py`, saved by four processes. Out: `measurements.json`, with all figures and the
pictures of the report. It runs as one process: a checkpoint loads under any layout, and the model is small.

    python examples/quickstart/measure.py runs/quickstart
"""

import argparse
import base64
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from corpus import Split, documents
from digits import QUESTIONS, DigitImage, digits
from megatron.core.distributed import DistributedDataParallel
from pages import LAYOUTS, Layout, Page, pages
from pages import QUESTIONS as PAGE_QUESTIONS

from megavl.checkpoint.reader import load_model
from megavl.config import ParallelConfig, Recipe, SourceConfig
from megavl.data.microbatch import IGNORE
from megavl.data.order import ModalitySchedule, exact
from megavl.data.tokenizer import Tokenizer
from megavl.evaluate.choices import ChoiceQuestion, accuracy, answer_choices
from megavl.evaluate.generation import edit_distance, generate_answers
from megavl.evaluate.perplexity import held_out_perplexity
from megavl.generate.samples import evaluation_settings, question_sample, sample_microbatch
from megavl.model.build import build_stages, split_layers
from megavl.model.sizes import count_parameters
from megavl.model.stage import Stage
from megavl.parallel.gradients import wrap_stages
from megavl.parallel.groups import Groups, init_groups
from megavl.recipe import load_recipe_json

STAGE_NAMES = {"stage0": "language", "stage1": "stage1", "stage2": "stage2", "stage3": "stage3"}
TEXT_ROWS = 400
"""More than the rows of either held-out part: all of it is read."""
PAGES_PER_LAYOUT = 40
PAGES_SHOWN = 6
LONGEST_TRANSCRIPT = 24
"""Tokens; most pages have fewer."""


def measure(root: Path, split: Split, share: float = 1.0) -> dict[str, Any]:
    """All figures of a finished run, on `share` of the digits and pages."""
    recipes = {name: load_recipe_json(root / name / "recipe.json") for name in STAGE_NAMES}
    last = recipes["stage3"]
    tokenizer = Tokenizer(last.data.tokenizer)
    groups = init_groups(ParallelConfig())
    torch.set_num_threads(1)
    (stage,) = build_stages(
        last.model, ParallelConfig(), dtype=torch.float32, seed=0, pg=groups.pg, device=groups.device
    )
    chunks = wrap_stages([stage], ParallelConfig(), groups)
    perplexity = {}
    for name, recipe in recipes.items():
        load_model(root / name, chunks, groups)
        perplexity[STAGE_NAMES[name]] = _text_perplexity(chunks, recipe, tokenizer, split, groups)
        print(f"{split} text perplexity after {name}: {perplexity[STAGE_NAMES[name]]:.2f}", flush=True)
    reader = Reader(stage, last, tokenizer)
    result = {"split": split, "text_ppl": perplexity, **reader.digits(digits(split, share=share))}
    print(f"{split} digits: {result['digits_accuracy']:.1%}, blind {result['digits_accuracy_blind']:.1%}", flush=True)
    held_out = [document for document in documents() if document.split == split]
    count = ceil(PAGES_PER_LAYOUT * share)
    result["pages"] = [reader.pages(layout, pages(held_out, layout, count)) for layout in LAYOUTS]
    result["placement"] = placement(last)
    result["language_share"] = language_share(recipes["stage2"])
    return result


def _text_perplexity(
    chunks: Sequence[DistributedDataParallel], recipe: Recipe, tokenizer: Tokenizer, split: Split, groups: Groups
) -> float:
    """Perplexity of the held-out documents in rows of one length for all stages."""
    folder = Path(recipe.data.tokenizer).parent
    source = SourceConfig(name=split, path=str(folder / f"{split}_text"), modality="language", share=1.0)
    alone = replace(
        recipe,
        parallel=ParallelConfig(),
        data=replace(recipe.data, validation=(source,), seq_length=128),
        stage=replace(recipe.stage, micro_batch=16, global_batch=16),
        logging=replace(recipe.logging, validation_rows=TEXT_ROWS),
    )
    return held_out_perplexity(chunks, alone, tokenizer, source, groups)["ppl"]


class Reader:
    """Asks the last model about images."""

    def __init__(self, stage: Stage, recipe: Recipe, tokenizer: Tokenizer) -> None:
        """Takes a whole model on one process."""
        self._stage, self._tokenizer = stage, tokenizer
        self._settings = evaluation_settings(recipe.model, tokenizer)

    @torch.no_grad()
    def digits(self, images: Sequence[DigitImage]) -> dict[str, Any]:
        """Which of ten answers has the lowest perplexity, with the image and with black in its place."""
        options = tuple(str(digit) for digit in range(10))
        questions = [
            ChoiceQuestion(
                question=(f"{QUESTIONS[number % len(QUESTIONS)]} ", image.png), options=options, answer=image.digit
            )
            for number, image in enumerate(images)
        ]
        seen = answer_choices(questions, self._stage, self._tokenizer, self._settings, system="")
        blind = answer_choices(questions, self._stage, self._tokenizer, self._settings, system="", blind=True)
        shown = [
            {"png": base64.b64encode(image.png).decode(), "digit": image.digit, "answer": choice.chosen}
            for image, choice in zip(images, seen, strict=True)
        ]
        return {
            "digits_accuracy": accuracy(seen),
            "digits_accuracy_blind": accuracy(blind),
            "blind_answers": dict(Counter(str(choice.chosen) for choice in blind).most_common()),
            "digits": sorted(shown, key=lambda one: one["digit"] == one["answer"])[:40],  # mistakes first
        }

    @torch.no_grad()
    def pages(self, layout: Layout, found: Sequence[Page]) -> dict[str, Any]:
        """Transcripts of held-out pages, and the loss of the true transcript with and without the image."""
        asked = [((f"{PAGE_QUESTIONS[0]} ", page.png), page.text) for page in found]
        batch = sample_microbatch(
            [question_sample(question, text, self._tokenizer, "") for question, text in asked], self._settings
        )
        assert batch.pixels is not None
        tokens = int((batch.labels != IGNORE).sum())
        seen = float(self._stage(batch).sum()) / tokens
        blind = float(self._stage(replace(batch, pixels=torch.zeros_like(batch.pixels))).sum()) / tokens
        answers = generate_answers(
            asked, self._stage.logits, self._tokenizer, self._settings, max_new_tokens=LONGEST_TRANSCRIPT, system=""
        )
        edits = sum(edit_distance(answer.text, answer.expected) for answer in answers)
        print(f"pages, {layout.name}: loss {seen:.2f} with the image, {blind:.2f} without", flush=True)
        return {
            "layout": layout.name,
            "loss": seen,
            "loss_blind": blind,
            "exact": sum(answer.text == answer.expected for answer in answers) / len(answers),
            "character_error": edits / sum(len(answer.expected) for answer in answers),
            "shown": [
                {"png": base64.b64encode(page.png).decode(), "text": page.text, "answer": answer.text}
                for page, answer in zip(found[:PAGES_SHOWN], answers, strict=False)
            ],
        }


def placement(recipe: Recipe) -> list[list[Any]]:
    """Rows of the layout table: pipeline rank, tensor ranks, what they hold, parameters of a rank in thousands."""
    counts, parallel, decoder = count_parameters(recipe.model), recipe.parallel, recipe.model.decoder
    split = split_layers(decoder.layers, parallel)
    table = decoder.vocab * decoder.hidden
    per_layer = (counts["decoder"] - 2 * table - decoder.hidden) / decoder.layers
    rows: list[list[Any]] = []
    first = 0
    for rank, layers in enumerate(split):
        holds, shared, cut = [], 0.0, per_layer * layers
        if rank == 0:
            holds, cut = ["SAM, SigLIP, adaptor (whole on each)", "embedding"], cut + table
            shared = float(sum(count for name, count in counts.items() if name != "decoder"))
        holds.append(f"decoder layers {first} to {first + layers - 1}")
        if rank == len(split) - 1:
            holds, cut = [*holds, "norm, head, loss"], cut + table
        ranks = ", ".join(str(rank * parallel.tensor + number) for number in range(parallel.tensor))
        rows.append(
            [ranks, rank, f"0 to {parallel.tensor - 1}", "; ".join(holds), round(shared + cut / parallel.tensor)]
        )
        first += layers
    return rows


def language_share(recipe: Recipe) -> list[float]:
    """The language share that a recipe schedules for each step."""
    data, steps = recipe.data, recipe.stage.steps
    target = sum(source.share for source in data.sources if source.modality == "language")
    schedule = ModalitySchedule(target=exact(round(target, 9)), warmup_steps=exact(data.language_warmup) * steps)
    return [float(schedule.share(step)) for step in range(steps)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the models of the quickstart on held-out data.")
    parser.add_argument("root", type=Path, help="run folder of the quickstart")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="what to measure on")
    parser.add_argument("--share", type=float, default=1.0, help="part of digits and pages to measure on")
    arguments = parser.parse_args()
    try:
        measured = measure(arguments.root, arguments.split, arguments.share)
    except ValueError as error:
        sys.exit(f"error: {error}")
    partial = arguments.root / "measurements.json.partial"
    partial.write_text(json.dumps(measured))
    partial.replace(arguments.root / "measurements.json")
