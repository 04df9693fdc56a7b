"""Lay the quickstart's figures and pictures out as one HTML page.

In: `measurements.json`, the `metrics.jsonl` of each stage, wall times.
Out: `report.html`, which needs nothing beside it.
"""

import base64
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavl.evaluate import report

TITLES = {
    "stage0": "language",
    "stage1": "stage 1: adaptor",
    "stage2": "stage 2: joint",
    "stage3": "stage 3: questions",
}


def write_report(
    root: Path, summary: Mapping[str, Any], measured: Mapping[str, Any], seconds: Mapping[str, float]
) -> None:
    """Write `report.html` into `root`.

    Args:
        root: run folder of the quickstart.
        summary: what `summary.json` holds.
        measured: what `measure.py` wrote.
        seconds: wall time of each part.
    """
    metrics = {name: report.read_metrics(root / name / "metrics.jsonl") for name in TITLES}
    fragments = [
        *_figures(summary, measured),
        *_curves(metrics, measured),
        *_digits(measured),
        *_pages(measured),
        *_layout(summary, measured),
        *_speed(metrics, seconds),
    ]
    page = report.html_page("A small DeepSeek-VL, trained on this machine", fragments)
    (root / "report.html").write_text(page, encoding="utf-8")


def _figures(summary: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    seen, blind, text = summary["digits_accuracy"], summary["digits_accuracy_blind"], summary["text_ppl"]
    ratio = text["stage3"] / text["language"]
    rows = [
        ["handwritten digits named right", f"{seen:.1%}", "at least 95%", seen >= 0.95],
        ["the same with black images", f"{blind:.1%}", "at most 15%", blind <= 0.15],
        ["text perplexity, stage 3 over language model", f"{ratio:.3f}", "at most 1.10", ratio <= 1.10],
    ]
    after = [["text perplexity after", *("language", "stage 1", "stage 2", "stage 3")]]
    return [
        report.paragraph(
            "A language model was trained on the documentation of this Python, then taught to see in the three stages "
            "of DeepSeek-VL: first the adaptor alone, then adaptor and language model on text and images together, "
            "then on questions and answers. "
            f"All figures are from the {measured['split']} part of the data, which no stage was trained on."
        ),
        report.table(["measured", "value", "wanted", ""], rows),
        report.table(after[0], [["", *(float(text[key]) for key in ("language", "stage1", "stage2", "stage3"))]]),
        report.paragraph(
            "Stage 1 leaves perplexity as it was because the language model is frozen in it. A ratio below 1 means "
            "that the language model was not finished when the images came: stage 2 goes on teaching it language.",
            note=True,
        ),
    ]


def _curves(metrics: Mapping[str, report.Metrics], measured: Mapping[str, Any]) -> list[str]:
    return [
        report.heading("Loss"),
        report.loss_curves({TITLES[name]: entries for name, entries in metrics.items()}),
        report.heading("Language share in stage 2"),
        report.paragraph(
            "Every step holds either text or images. The share of text steps falls from 1.0 to 0.7 over the first "
            "half, so that the language model is not disturbed all at once."
        ),
        report.language_share_curve(metrics["stage2"], measured["language_share"]),
    ]


def _digits(measured: Mapping[str, Any]) -> list[str]:
    pictures = [
        (base64.b64decode(one["png"]), f"{one['answer']}" + _truth(one), one["digit"] == one["answer"])
        for one in measured["digits"]
    ]
    blind = ", ".join(f"{digit} ({count} times)" for digit, count in measured["blind_answers"].items())
    return [
        report.heading("Handwritten digits"),
        report.paragraph(
            "The model is asked which digit it sees; of ten answers it gives the one with the lowest perplexity. "
            "Mistakes come first (red, with the right digit); every mistake is shown while there are fewer than 40."
        ),
        report.tiles(pictures, width=80),
        report.paragraph(f"Answers when every image is black: {blind}."),
    ]


def _truth(one: Mapping[str, Any]) -> str:
    return "" if one["digit"] == one["answer"] else f", is {one['digit']}"


def _pages(measured: Mapping[str, Any]) -> list[str]:
    header = ["pages", "loss with image", "without", "pages read without error", "wrong characters"]
    rows = [
        [one["layout"], one["loss"], one["loss_blind"], f"{one['exact']:.0%}", f"{one['character_error']:.0%}"]
        for one in measured["pages"]
    ]
    fragments = [
        report.heading("Pages of text"),
        report.paragraph(
            "Held-out text, drawn as pages of 64 x 64 pixels; the model is asked for the transcript. Loss is per token "
            "of the true transcript; without: the image is black. Where the transcript is fluent but wrong, it is the "
            "language model's guess and not reading."
        ),
        report.table(header, rows),
    ]
    for one in measured["pages"]:
        pictures = [
            (base64.b64decode(page["png"]), _transcript(page), page["answer"] == page["text"]) for page in one["shown"]
        ]
        fragments += [report.paragraph(one["layout"] + ":"), report.tiles(pictures, width=144)]
    return fragments


def _transcript(page: Mapping[str, Any]) -> str:
    return f"page: {page['text']}\nmodel: {page['answer'] or '(nothing)'}"


def _layout(summary: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    return [
        report.heading("Who computes what"),
        report.paragraph(f"Layout {summary['layout']}: tensor ranks share each layer, pipeline ranks share the depth."),
        report.table(
            ["processes", "pipeline rank", "tensor ranks", "hold", "parameters of each"], measured["placement"]
        ),
    ]


def _speed(metrics: Mapping[str, report.Metrics], seconds: Mapping[str, float]) -> list[str]:
    rows = []
    for name, entries in metrics.items():
        times = [entry["step_time_s"] for entry in entries if entry.get("step_time_s")]
        tokens = sum(entry["tokens"] for entry in entries)
        images = sum(entry["images"] for entry in entries)
        middle = statistics.median(times) if times else 0.0
        speed = round(tokens / sum(times)) if times else 0
        rows.append([TITLES[name], len(entries), round(1000 * middle), speed, images, round(seconds.get(name, 0.0))])
    others = round(sum(time for name, time in seconds.items() if name not in metrics))
    return [
        report.heading("Speed"),
        report.table(["stage", "steps", "ms a step (median)", "tokens a second", "images seen", "seconds"], rows),
        report.paragraph(f"Preparing the data and measuring took {others} s.", note=True),
    ]
