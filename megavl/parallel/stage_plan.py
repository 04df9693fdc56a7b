"""Which decoder layers lie on which pipeline rank, and how many parameters each rank holds.

In: sizes and layout. Out: one `StagePlace` per pipeline stage (virtual stages included), in pipeline order, and the
text that start-up and `tools/plan_pipeline.py` print. The split itself is `megavl/model/layer_split.py`, which
also reads the layout string; here it is spelled out. Stage s lies on pipeline rank s % pipeline, chunk s // pipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavl.config import DecoderConfig, ModelConfig, ParallelConfig
from megavl.model.layer_split import split_layers
from megavl.model.sizes import count_parameters


@dataclass(frozen=True, kw_only=True)
class StagePlace:
    """One pipeline stage."""

    rank: int
    """Pipeline rank, from 0."""
    chunk: int
    """Virtual chunk on that rank, from 0."""
    layers: range
    """Decoder layers, by their number in the whole model from 0."""
    first: bool
    """Towers, adaptor and embedding are here."""
    last: bool
    """Final norm, head and loss are here."""
    parameters: int
    """Parameters on each of its tensor ranks."""


def stage_plan(model: ModelConfig, parallel: ParallelConfig) -> list[StagePlace]:
    """Place the model on the pipeline.

    Args:
        model: sizes.
        parallel: layout.

    Returns:
        Stages in pipeline order.

    Raises:
        ValueError: the layout does not fit the model, or leaves a stage without a decoder layer.
    """
    split = split_layers(model.decoder.layers, parallel)
    if min(split) < 1:
        empty = split.index(min(split))
        raise ValueError(
            f"pipeline stage {empty} of {len(split)} has {split[empty]} decoder layers (split "
            f"{','.join(map(str, split))}); every stage needs at least 1"
        )
    places, start = [], 0
    for index, count in enumerate(split):
        first, last = index == 0, index == len(split) - 1
        places.append(
            StagePlace(
                rank=index % parallel.pipeline,
                chunk=index // parallel.pipeline,
                layers=range(start, start + count),
                first=first,
                last=last,
                parameters=_parameters(model, parallel.tensor, count, first, last),
            )
        )
        start += count
    return places


def describe_plan(places: Sequence[StagePlace]) -> str:
    """One line per stage."""
    lines = []
    for place in places:
        parts = ["towers + adaptor + embedding"] if place.first else []
        parts.append(f"layers {place.layers[0]} to {place.layers[-1]}")
        parts += ["norm + head + loss"] if place.last else []
        chunk = f", chunk {place.chunk}" if places[-1].chunk else ""
        lines.append(
            f"pipeline rank {place.rank}{chunk}: {', '.join(parts)}; {place.parameters / 1e6:.1f} M parameters per rank"
        )
    return "\n".join(lines)


def _parameters(model: ModelConfig, tensor: int, layers: int, first: bool, last: bool) -> int:
    """Parameters of one tensor rank of a stage: matrices cut over the tensor group, norms and towers whole."""
    decoder = model.decoder
    counts = count_parameters(model)
    vision = sum(count for component, count in counts.items() if component != "decoder")
    embedding = decoder.vocab * decoder.hidden // tensor
    own = layers * _layer_parameters(decoder, tensor)
    return own + first * (vision + embedding) + last * (embedding + decoder.hidden)


def _layer_parameters(decoder: DecoderConfig, tensor: int) -> int:
    """Query, key, value, output, gate, up and down matrices of a layer, cut; and its two norms, whole."""
    head = decoder.hidden // decoder.heads
    attention = decoder.hidden * head * (2 * decoder.heads + 2 * decoder.kv_heads)
    return (attention + 3 * decoder.hidden * decoder.ffn) // tensor + 2 * decoder.hidden
