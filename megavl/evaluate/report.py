"""A self-contained HTML page about a run: text, tables, curves and pictures in one file that needs nothing beside it.

In: what a run wrote into `metrics.jsonl`, and whatever a caller measured.
Out: fragments of HTML that `html_page` joins. Figures are SVG inside data addresses, so nothing is loaded from
elsewhere and identifiers of two figures cannot collide.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Metrics = list[dict[str, Any]]
"""The lines of a `metrics.jsonl`."""

_COLOURS = {"language": "#33658a", "multimodal": "#c8553d", "mixed": "#6a994e"}
_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.8rem; margin-bottom: .3rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem;
  border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
th { font-weight: 600; background: #f6f6f4; } td.number { text-align: right; }
.good { color: #2d6a4f; font-weight: 600; } .bad { color: #b3261e; font-weight: 600; }
figure { margin: 1rem 0; } figure img { max-width: 100%; } figcaption, .note { color: #666; font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; } .tile { text-align: center;
  font-size: .85rem; line-height: 1.3; }
.tile img { display: block; border: 1px solid #ccc; margin-bottom: .2rem; } img.pixels { image-rendering: pixelated; }
code { background: #f3f3f1; padding: .05rem .3rem; border-radius: .2rem; }
"""


def read_metrics(path: Path) -> Metrics:
    """The steps of a `metrics.jsonl`, each once: after a resume the later line of a step counts.

    Measurements of held-out sources, which have lines of their own, are left out.

    Raises:
        ValueError: a line that is no JSON object, unless it is the last one, cut off by a crash.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} of {len(lines)} is not a metrics entry") from error
        if "validation" not in entry:
            by_step[step] = entry
    return [by_step[step] for step in sorted(by_step)]


def html_page(title: str, fragments: Sequence[str]) -> str:
    """A complete page from fragments, in order."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(fragments) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph of plain text; `note` sets it smaller and grey."""
    return f"<p{' class=note' if note else ''}>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers are set flush right, a bool as met or missed."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return '<td class="good">met</td>' if value else '<td class="bad">missed</td>'
    if isinstance(value, int | float):
        return f'<td class="number">{_number(value)}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _number(value: int | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def tiles(pictures: Sequence[tuple[bytes, str, bool | None]], *, width: int) -> str:
    """Small pictures with a caption below each.

    Args:
        pictures: encoded image, caption, and whether the caption is right (green), wrong (red) or neither (None).
        width: shown width in CSS pixels; small images are enlarged without smoothing.
    """
    shown = []
    for data, caption, right in pictures:
        colour = "" if right is None else ' class="good"' if right else ' class="bad"'
        text = html.escape(caption).replace("\n", "<br>")
        shown.append(
            f'<div class="tile" style="width:{width + 2}px">{picture(data, width)}<span{colour}>{text}</span></div>'
        )
    return f'<div class="tiles">{"".join(shown)}</div>'


def picture(data: bytes, width: int) -> str:
    """One encoded PNG or JPEG, enlarged to `width` CSS pixels without smoothing."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return (
        f'<img class="pixels" width="{width}" alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    )


def loss_curves(stages: Mapping[str, Metrics]) -> str:
    """Loss over steps, one panel per stage, one curve per modality.

    Args:
        stages: title -> metrics of that stage, in order.
    """
    figure, panels = _panels(len(stages))
    for panel, (title, metrics) in zip(panels, stages.items(), strict=True):
        for modality, points in sorted(_by_modality(metrics).items()):
            steps, losses = zip(*points, strict=True)
            colour = _COLOURS.get(modality, "#888888")
            panel.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
            panel.plot(steps, _smooth(losses), color=colour, linewidth=1.6, label=modality)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
        if panel.has_data():
            panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("loss per supervised token (nats)")
    return _figure(figure, "Thin: every step. Thick: mean of the last 10 steps of that modality.")


def language_share_curve(metrics: Metrics, scheduled: Sequence[float]) -> str:
    """How many language steps there really were, against the modality schedule.

    Args:
        metrics: of a stage whose steps hold one modality each.
        scheduled: language share that the recipe asks for at each step, from 0 to 1.
    """
    flags = [1.0 if entry.get("modality") == "language" else 0.0 for entry in metrics]
    counted, wanted, total, target = [], [], 0.0, 0.0
    for flag, share in zip(flags, scheduled, strict=False):
        total, target = total + flag, target + share
        counted.append(total)
        wanted.append(target)
    figure, panels = _panels(2)
    steps = range(1, len(counted) + 1)
    panels[0].plot(range(1, len(scheduled) + 1), scheduled, color="#222222", linewidth=1.5, label="scheduled share")
    panels[0].plot(
        steps, _smooth(flags[: len(counted)], 20), color=_COLOURS["language"], label="realised, last 20 steps"
    )
    panels[0].set_ylabel("language share")
    panels[1].plot(steps, wanted, color="#222222", linewidth=1.5, label="scheduled")
    panels[1].plot(steps, counted, color=_COLOURS["language"], linestyle="--", label="realised")
    panels[1].set_ylabel("language steps so far")
    for panel in panels:
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
    gap = max((abs(a - b) for a, b in zip(counted, wanted, strict=True)), default=0.0)
    return _figure(figure, f"Largest distance between the two counts: {gap:.2f} steps.")


def _by_modality(metrics: Metrics) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in metrics:
        if entry.get("loss") is not None:
            series.setdefault(str(entry.get("modality") or "mixed"), []).append((int(entry["step"]), entry["loss"]))
    return series


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - window) : end])]


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # here: importing it takes half a second that no training process needs

    figure = Figure(figsize=(max(4.5, 2.6 * count), 3.0), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, panels


def _figure(figure: Any, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
