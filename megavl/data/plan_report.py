"""What a run is going to read, in lines for the log.

In: the step plan and a rank's place in the data-parallel group. Out: the modality schedule, a line per source (rows,
how full they are, how often it is read through), and how much of the micro-batches is padding. Only lengths are read.
"""

from megavl.data.mixture import StepPlan
from megavl.data.rank_batch import RankPlace, padded_lengths, rank_rows

SAMPLED_STEPS = 16
"""Steps, spread over the run, from which padding is measured."""


def describe_plan(plan: StepPlan, place: RankPlace | None = None) -> list[str]:
    """The plan of the whole run.

    Args:
        plan: of the run.
        place: adds a line about the padding of this rank's micro-batches.
    """
    steps, target, falling = plan.steps, float(plan.schedule.target), float(plan.schedule.warmup_steps)
    share = f"language share {target:.4g}" + (f", from 1 over the first {falling:g} steps" if falling else "")
    unit = {"step": "a step", "microbatch": "a micro-batch", "none": "nothing"}[plan.grouping]
    lines = [f"{steps:,} steps of {plan.global_batch:,} rows; {share}; {unit} holds one modality only"]
    for source in plan.configs():
        rows, drawn = plan.sources[source.name], plan.drawn(source.name, steps)
        lines.append(
            f"{source.name}: {source.modality}, {drawn:,} rows = {drawn / rows.num_rows:.2f} epochs of "
            f"{rows.num_rows:,} {rows.unit}, {100 * rows.fill:.1f}% of seq_length full on average"
        )
    if place is not None:
        lines.append(f"padding: {100 * padding_share(plan, place):.1f}% of the tokens of a micro-batch")
    return lines


def padding_share(plan: StepPlan, place: RankPlace) -> float:
    """Padding over all tokens in this rank's micro-batches, from a sample of steps."""
    tokens, padded = 0, 0
    for step in sorted({plan.steps * i // SAMPLED_STEPS for i in range(SAMPLED_STEPS)}):
        microbatches = rank_rows(plan, step, place)
        tokens += sum(row.length for rows in microbatches for row in rows)
        padded += sum(padded_lengths(microbatches, place))
    return 1 - tokens / padded if padded else 0.0
