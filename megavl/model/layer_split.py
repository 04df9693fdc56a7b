"""How many decoder layers each pipeline stage holds.

In: the number of layers and the layout section of a recipe. Out: layers per stage, in pipeline order (virtual stages
included). Needs neither torch nor megatron-core, so that planning does not wait for them.
"""

from megavl.config import ParallelConfig


def split_layers(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Decoder layers of each pipeline stage, in pipeline order (pipeline * virtual_pipeline stages).

    Without `parallel.layout` the split is as even as possible; layers left over go to the inner stages first and to
    the first stage last, as it has the towers and the embedding, and the last has the head.

    Raises:
        ValueError: `parallel.layout` has another number of stages or layers, or is not a list of numbers.
    """
    stages = parallel.pipeline * parallel.virtual_pipeline
    if not parallel.layout:
        base, left = divmod(num_layers, stages)
        first_served = [*range(1, stages - 1), *({stages - 1} - {0}), 0][:left]
        return tuple(base + (stage in first_served) for stage in range(stages))
    if parallel.layout == "auto":
        raise ValueError(
            "parallel.layout auto is planned when training starts; here write layers per stage, as 8,8,8,6"
        )
    parts = [part.strip() for part in parallel.layout.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"parallel.layout is {parallel.layout!r}; write decoder layers per stage, such as `8,8,8,6`")
    split = tuple(int(part) for part in parts)
    if len(split) != stages:
        raise ValueError(
            f"parallel.layout {parallel.layout!r} names {len(split)} stages, pipeline * virtual_pipeline is {stages}"
        )
    if sum(split) != num_layers:
        raise ValueError(f"parallel.layout {parallel.layout!r} places {sum(split)} layers, the model has {num_layers}")
    return split
