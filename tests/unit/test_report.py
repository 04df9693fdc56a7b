"""The HTML report: nothing is loaded from elsewhere, text is escaped, metrics survive a crash and a resume."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from megavl.evaluate import report


def _metrics(steps: int) -> report.Metrics:
    modality = ("language", "multimodal")
    return [{"step": i, "loss": 3.0 / (i + 1), "modality": modality[i % 3 == 2]} for i in range(steps)]


def test_page_is_self_contained_and_well_formed():
    png = b"\x89PNG not really"
    page = report.html_page(
        "A <run>",
        [
            report.heading("Loss & more"),
            report.loss_curves({"stage 1": _metrics(30), "stage 2": _metrics(5), "empty": []}),
            report.language_share_curve(_metrics(30), [1.0] * 10 + [0.7] * 20),
            report.table(["what", "value"], [["<b>", 0.5], ["many", 12345], ["ok", True], ["bad", False]]),
            report.tiles([(png, "4 <- 4", True), (png, "5", False), (png, "6", None)], width=64),
        ],
    )
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5
    assert all(source.startswith("data:") for source in sources)
    assert "<b>" not in page
    assert "A &lt;run&gt;" in page
    assert "12,345" in page
    assert base64.b64encode(png).decode() in page
    opened: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("img", "meta", "br"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balance().feed(page)
    assert opened == []


def test_realised_share_states_the_largest_distance():
    metrics = [{"step": i, "loss": 1.0, "modality": "multimodal"} for i in range(4)]
    assert "Largest distance between the two counts: 2.00 steps" in report.language_share_curve(metrics, [0.5] * 4)


def test_metrics_of_a_resumed_run_hold_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 1, "loss": 3.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    assert report.read_metrics(path) == [lines[0], lines[2]]


def test_metrics_with_a_broken_line_name_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnot json\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 2 of 3"):
        report.read_metrics(path)
