"""Where every tensor of a model lies under a layout, from names and sizes alone: no model is built.

In: sizes and `ParallelConfig`. Out: for each full name the pipeline stage, the local name there, and the part of it
that a tensor rank holds. What `model/shards.py` reads from a stage's parameters is a table here, so that a checkpoint
converts on a machine that could not hold one rank's model.

Shapes: T tensor ranks, P pipeline ranks, V chunks per rank; places 0 to P*V-1 are the stages in pipeline order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from megavl.checkpoint.folder import CheckpointError
from megavl.config import ModelConfig, ParallelConfig
from megavl.model.build import check_tensor_size, split_layers

_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Cut:
    """How the tensor group shares a tensor."""

    dim: int
    """The dimension that is cut."""
    stride: int = 1
    """Equal parts along it, each of which is cut on its own."""


ROWS, COLUMNS, GATE_AND_UP = Cut(0), Cut(1), Cut(0, stride=2)
_OUTSIDE_LAYERS = {"first_stage.embedding.weight": ROWS, "last_stage.head.weight": ROWS}
_INSIDE_LAYERS = {
    "self_attention.linear_qkv.weight": ROWS,
    "self_attention.linear_proj.weight": COLUMNS,
    "mlp.linear_fc1.weight": GATE_AND_UP,
    "mlp.linear_fc2.weight": COLUMNS,
}


def cut_of(name: str) -> Cut | None:
    """How the tensor of this full or local name is shared; None: every tensor rank has a copy."""
    if name.startswith(_LAYERS):
        return _INSIDE_LAYERS.get(name.removeprefix(_LAYERS).split(".", 1)[1])
    return _OUTSIDE_LAYERS.get(name)


@dataclass(frozen=True)
class Slab:
    """Rows of a full tensor that lie together in a rank's part."""

    first: int
    """First row in the full tensor."""
    stop: int
    """Row after the last in the full tensor."""
    local: int
    """First row in the rank's part."""
    columns: slice | None = None
    """Columns that the rank has; None: all."""

    def meet(self, first: int, stop: int) -> "Slab | None":
        """What it has of a range of the full tensor's rows; None: nothing."""
        low, high = max(first, self.first), min(stop, self.stop)
        return Slab(low, high, self.local + low - self.first, self.columns) if low < high else None


def slabs(shape: tuple[int, ...], cut: Cut | None, size: int, rank: int) -> list[Slab]:
    """The rows, and columns, that one of `size` tensor ranks has of a full tensor."""
    rows = shape[0] if shape else 1
    if cut is None:
        return [Slab(0, rows, 0)]
    if cut.dim == 1:
        width = shape[1] // size
        return [Slab(0, rows, 0, slice(rank * width, (rank + 1) * width))]
    part = rows // cut.stride
    height = part // size
    starts = [index * part + rank * height for index in range(cut.stride)]
    return [Slab(start, start + height, index * height) for index, start in enumerate(starts)]


def local_shape(shape: tuple[int, ...], cut: Cut | None, size: int) -> tuple[int, ...]:
    """Shape of one rank's part."""
    return tuple(extent // size if cut and dim == cut.dim else extent for dim, extent in enumerate(shape))


@dataclass(frozen=True)
class RankLayout:
    """The files of a model under a layout, and what is in each."""

    tensor: int
    pipeline: int
    virtual: int
    split: tuple[int, ...]
    """Decoder layers of each place."""

    def place_of(self, name: str) -> tuple[int, str]:
        """Place and local name of the tensor with this full name."""
        if not name.startswith(_LAYERS):
            return (0 if name.startswith("first_stage.") else len(self.split) - 1), name
        number, rest = name.removeprefix(_LAYERS).split(".", 1)
        ends = list(accumulate(self.split))
        place = next(place for place, end in enumerate(ends) if int(number) < end)
        return place, f"{_LAYERS}{int(number) - ends[place] + self.split[place]}.{rest}"

    def rank_of(self, place: int) -> int:
        """The pipeline rank of a place."""
        return place % self.pipeline

    def key_of(self, place: int) -> str:
        """What the model's part is called in its file."""
        return f"model{place // self.pipeline}" if self.virtual > 1 else "model"

    def places_of(self, pipeline_rank: int) -> list[int]:
        """The places of a pipeline rank, first chunk first."""
        return list(range(pipeline_rank, len(self.split), self.pipeline))

    def ranks(self) -> Iterator[tuple[int, int]]:
        """(tensor rank, pipeline rank) of every file."""
        return ((tensor, pipeline) for pipeline in range(self.pipeline) for tensor in range(self.tensor))

    def folder_of(self, tensor_rank: int, pipeline_rank: int) -> str:
        """The folder of a rank, as Megatron-LM names it."""
        name = f"mp_rank_{tensor_rank:02d}"
        return f"{name}_{pipeline_rank:03d}" if self.pipeline > 1 else name


def rank_layout(model: ModelConfig, parallel: ParallelConfig) -> RankLayout:
    """The layout that a run with these settings has.

    Raises:
        CheckpointError: the model does not divide, or `parallel.layout` does not fit it.
    """
    try:
        check_tensor_size(model, parallel.tensor)
        split = split_layers(model.decoder.layers, parallel)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return RankLayout(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, split)
