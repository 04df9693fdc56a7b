"""Draw the step of a plan: what every pipeline rank computes when, and where it waits.

In: a `Plan`. Out: a PNG, or an HTML page that needs nothing else (SVG with a tooltip per pass, and the plan's table).
One panel per kind of step. Forward passes are blue, backward passes orange, lighter for later chunks of a rank; white
is waiting. A long step is drawn with `MOST` micro-batches, and its title says so; the share of waiting beside each rank
is that of the whole step.
"""

import html
from dataclasses import dataclass
from pathlib import Path

from megavl.planning.costs import stage_times
from megavl.planning.estimate import StepEstimate, simulate_step
from megavl.planning.hardware import GIB
from megavl.planning.report import plan_lines
from megavl.planning.search import Plan
from megavl.planning.simulate import Simulation, Span

MOST = 24
"""Micro-batches that are drawn, rounded to whole rounds of the pipeline."""

FORWARD, BACKWARD = (43, 108, 176), (221, 119, 40)
"""RGB of the first chunk's passes."""
ROW, BAR, LEFT, WIDTH, NOTE = 26, 20, 60, 1180, 190
"""Pixels of the SVG: height of a rank and of its bar, left margin, width of the step, room on the right."""


@dataclass(frozen=True)
class _Panel:
    """One kind of step."""

    title: str
    drawn: Simulation
    notes: list[str]
    """Right of each rank."""


def draw_timeline(plan: Plan, path: Path) -> None:
    """Write a picture of the plan's steps.

    Raises:
        ValueError: the file is neither .png nor .html.
    """
    if path.suffix not in (".png", ".html"):
        raise ValueError(f"timeline {path}: write a .png or an .html, not {path.suffix or 'a name without suffix'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    panels = [_panel(plan, step) for step in plan.steps]
    if path.suffix == ".html":
        path.write_text(_page(plan, panels))
    else:
        _draw(plan, panels, path)


def _panel(plan: Plan, step: StepEstimate) -> _Panel:
    pipeline, total = plan.case.parallel.pipeline, plan.batch.micro_batches
    times = stage_times(plan.case, step.workload.counts(plan.batch.micro_batch))
    whole = simulate_step(plan.case, [times] * total)
    shown = total if total <= MOST else max(MOST // pipeline, 1) * pipeline
    drawn = whole if shown == total else simulate_step(plan.case, [times] * shown)
    title = f"{step.workload.name} step, {100 * step.workload.share:.0f}% of the steps: {1e3 * step.step_s:.0f} ms"
    title += f", of which the pipeline {1e3 * step.pipeline_s:.0f} ms"
    title += f"; {shown} of its {total} micro-batches" if shown < total else f"; {total} micro-batches"
    notes = [
        f"waits {100 * bubble:.1f}%   {memory.total / GIB:.1f} GiB"
        for bubble, memory in zip(whole.bubbles(), plan.memory, strict=True)
    ]
    return _Panel(title, drawn, notes)


def _colour(span: Span, chunks: int) -> tuple[int, int, int]:
    """Towards white for later chunks."""
    pale = 0.55 * span.task.chunk / chunks
    red, green, blue = (round(c + (255 - c) * pale) for c in (BACKWARD if span.task.backward else FORWARD))
    return red, green, blue


def _heading(plan: Plan) -> str:
    parallel = plan.case.parallel
    return (
        f"{parallel.layout or plan.case.model.decoder.layers} layers: tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline} x data {plan.batch.data}, {plan.case.hardware.origin} ({plan.case.hardware.name})"
    )


def _draw(plan: Plan, panels: list[_Panel], path: Path) -> None:
    from matplotlib.figure import Figure

    pipeline, chunks = plan.case.parallel.pipeline, plan.case.parallel.virtual_pipeline
    height = 1.0 + len(panels) * (0.9 + 0.34 * pipeline)
    figure = Figure(figsize=(14, height), layout="constrained", dpi=130)
    figure.suptitle(_heading(plan), fontsize=11, x=0.01, ha="left")
    longest = max(panel.drawn.step_s for panel in panels)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for span in panel.drawn.spans:
            colour = tuple(c / 255 for c in _colour(span, chunks))
            left, width = 1e3 * span.start, 1e3 * (span.end - span.start)
            axes.barh(span.rank, width, left=left, height=0.8, color=colour, edgecolor="white", linewidth=0.4)
            if width > 18e3 * longest / 1180:
                axes.text(
                    left + width / 2,
                    span.rank,
                    str(span.task.micro_batch),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white",
                )
        for rank, note in enumerate(panel.notes):
            axes.text(1.01, rank, note, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlim(0, 1e3 * longest)
        axes.set_ylim(pipeline - 0.4, -0.6)
        axes.set_yticks(range(pipeline), [f"rank {rank}" for rank in range(pipeline)], fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "milliseconds (estimate); blue forward, orange backward, lighter for later chunks, white waiting; numbers are "
        "micro-batches where they fit",
        fontsize=8,
    )
    figure.savefig(path)


def _page(plan: Plan, panels: list[_Panel]) -> str:
    """The HTML page."""
    longest = max(panel.drawn.step_s for panel in panels)
    body = "\n".join(
        f"<h2>{html.escape(panel.title)}</h2>\n{_svg(panel, longest, plan.case.parallel.virtual_pipeline)}"
        for panel in panels
    )
    return f"""<!doctype html>
<meta charset="utf-8">
<title>Pipeline plan</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; color: #222 }}
h1 {{ font-size: 18px }} h2 {{ font-size: 14px; margin: 1.6em 0 .4em }}
pre {{ background: #f6f6f4; padding: 1em; overflow-x: auto }}
text {{ font: 11px system-ui, sans-serif; fill: #444 }} rect:hover {{ stroke: #000; stroke-width: 1 }}
</style>
<h1>{html.escape(_heading(plan))}</h1>
<p>Blue: forward passes. Orange: backward passes. Lighter: later chunks of a rank. White: waiting.</p>
{body}
<h2>The plan</h2>
<pre>{html.escape(chr(10).join(plan_lines(plan)))}</pre>
"""


def _svg(panel: _Panel, longest: float, chunks: int) -> str:
    """One panel; a tooltip says which pass and how long."""
    scale = WIDTH / longest
    parts = []
    for span in panel.drawn.spans:
        name = "backward" if span.task.backward else "forward"
        chunk = f", chunk {span.task.chunk}" if chunks > 1 else ""
        parts.append(
            f'<rect x="{LEFT + scale * span.start:.1f}" y="{span.rank * ROW}" '
            f'width="{max(scale * (span.end - span.start) - 0.5, 0.5):.1f}" height="{BAR}" '
            f'fill="rgb{_colour(span, chunks)}"><title>rank {span.rank}, micro-batch {span.task.micro_batch}{chunk}, '
            f"{name}: {1e3 * span.start:.1f} to {1e3 * span.end:.1f} ms</title></rect>"
        )
    for rank, note in enumerate(panel.notes):
        middle = rank * ROW + BAR - 6
        parts.append(f'<text x="0" y="{middle}">rank {rank}</text>')
        parts.append(f'<text x="{LEFT + WIDTH + 8}" y="{middle}">{note}</text>')
    bottom = len(panel.notes) * ROW + 14
    for tick in range(6):
        x = LEFT + WIDTH * tick / 5
        parts.append(f'<text x="{x:.0f}" y="{bottom}" text-anchor="middle">{1e3 * longest * tick / 5:.0f} ms</text>')
    return f'<svg width="{LEFT + WIDTH + NOTE}" height="{bottom + 6}">{"".join(parts)}</svg>'
