"""The rank files of a layout as whole tensors, joined row by row when they are read.

In: a folder of rank files. Out: the layout that they say they have, full name -> `LazyTensor`, and their plain values.
Every file must be there, agree with the others and hold exactly the tensors of its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.convert.rank_layout import RankLayout, cut_of, local_shape, rank_layout, slabs
from megavl.checkpoint.convert.shapes import full_shapes
from megavl.checkpoint.convert.sizes import sizes_from
from megavl.checkpoint.convert.torch_file import read_torch_file
from megavl.checkpoint.folder import CheckpointError
from megavl.config import ModelConfig, ParallelConfig

FILE = "model_optim_rng.pt"
"""The file in each rank's folder."""
VERSION = 3.0
"""Megatron-LM's version of the arrangement of `linear_qkv`."""

_Files = dict[tuple[int, int], dict[str, Any]]
"""(tensor rank, pipeline rank) -> content."""


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """What the files of one step hold together."""

    layout: RankLayout
    model: ModelConfig
    tensors: dict[str, LazyTensor]
    """Full name -> weights."""
    optimizer: dict[str, LazyTensor]
    """`<kind>.<full name>` -> optimizer state."""
    state: dict[str, Any] | None
    """Description of the run, where there is one."""


def read_rank_files(folder: Path) -> RankFiles:
    """Read the structure of all rank files of a step.

    Raises:
        CheckpointError: a file is missing, damaged, asks for code, or does not fit the others.
    """
    model, layout = read_layout(folder)
    found = sorted(folder.glob(f"mp_rank_*/{FILE}"))
    paths = {ranks: folder / layout.folder_of(*ranks) / FILE for ranks in layout.ranks()}
    missing = [path for path in paths.values() if not path.is_file()]
    if missing or len(found) != len(paths):
        first = missing[0] if missing else next(path for path in found if path not in paths.values())
        raise CheckpointError(
            f"{folder}: tensor {layout.tensor} x pipeline {layout.pipeline} needs {len(paths)} rank files, "
            f"{len(found)} are there; {'missing' if missing else 'surplus'}: {first}"
        )
    files = {ranks: _content(path) for ranks, path in paths.items()}
    for ranks, content in files.items():
        _check_agreement(content, paths[ranks], files[0, 0], paths[0, 0])
    joiner = _Joiner(layout, files, paths)
    shapes = full_shapes(model)
    tensors = {name: joiner.join((), name, shape) for name, shape in shapes.items()}
    joiner.check_names((), set(shapes))
    optimizer = _optimizer(joiner, shapes)
    return RankFiles(layout=layout, model=model, tensors=tensors, optimizer=optimizer, state=files[0, 0].get("state"))


def read_layout(folder: Path) -> tuple[ModelConfig, RankLayout]:
    """Sizes and layout that the first rank file names.

    Raises:
        CheckpointError: there is none, or it names none.
    """
    first = next(iter(sorted(folder.glob(f"mp_rank_*/{FILE}"))), None)
    if first is None:
        raise CheckpointError(f"{folder}: no mp_rank_*/{FILE} in it")
    args = _args(_content(first), first)
    model = sizes_from(args.get("model"), f"{first}: args.model")
    return model, _layout(args, model, first)


def _content(path: Path) -> dict[str, Any]:
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not the state of a rank")
    if content.get("checkpoint_version") != VERSION:
        raise CheckpointError(f"{path}: checkpoint_version is {content.get('checkpoint_version')}, not {VERSION}")
    return content


def _args(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    args = content.get("args")
    if not isinstance(args, Mapping):
        raise CheckpointError(f"{path}: args is a {type(args).__name__}, it must be a dict of sizes and layout")
    return args


def _layout(args: Mapping[str, Any], model: ModelConfig, path: Path) -> RankLayout:
    """The layout, checked against the sizes as a run's would be."""
    try:
        parallel = ParallelConfig(
            tensor=int(args["tensor_model_parallel_size"]),
            pipeline=int(args["pipeline_model_parallel_size"]),
            virtual_pipeline=int(args["virtual_pipeline_model_parallel_size"] or 1),
            layout=",".join(str(int(count)) for count in args["decoder_layers_per_stage"]),
        )
        if min(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline) < 1:
            raise ValueError("a size below 1")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: args do not tell the layout ({type(error).__name__}: {error})") from None
    try:
        return rank_layout(model, parallel)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_agreement(content: Mapping[str, Any], path: Path, first: Mapping[str, Any], first_path: Path) -> None:
    for key in ("iteration", "args", "state"):
        if content.get(key) != first.get(key):
            if key == "iteration":
                raise CheckpointError(
                    f"{path}: iteration {content.get(key)}, {first_path} has {first.get(key)}: of different saves"
                )
            raise CheckpointError(f"{path}: its {key} differ from those of {first_path}: of different saves")


@dataclass(frozen=True)
class _Joiner:
    """Whole tensors from the parts in all files."""

    layout: RankLayout
    files: _Files
    paths: Mapping[tuple[int, int], Path]

    def section(self, ranks: tuple[int, int], place: int, kind: tuple[str, ...]) -> dict[str, Any]:
        """The tensors of a place in a file: weights, or optimizer state of a kind."""
        content: Any = self.files[ranks]
        for key in ("optimizer", self.layout.key_of(place), *kind) if kind else (self.layout.key_of(place),):
            content = content.get(key) if isinstance(content, dict) else None
        return content if isinstance(content, dict) else {}

    def holds(self, kind: tuple[str, ...], name: str) -> bool:
        """Whether the first tensor rank has the tensor."""
        place, local = self.layout.place_of(name)
        return local in self.section((0, self.layout.rank_of(place)), place, kind)

    def join(self, kind: tuple[str, ...], name: str, shape: tuple[int, ...]) -> LazyTensor:
        """One whole tensor.

        Raises:
            CheckpointError: a rank lacks it, or has another shape or type than the others.
        """
        place, local = self.layout.place_of(name)
        size, cut = self.layout.tensor, cut_of(name)
        wanted = local_shape(shape, cut, size)
        parts: list[LazyTensor] = []
        for tensor_rank in range(size):
            ranks = tensor_rank, self.layout.rank_of(place)
            part = self.section(ranks, place, kind).get(local)
            label = ".".join([self.layout.key_of(place), *kind, local])
            if not isinstance(part, LazyTensor):
                raise CheckpointError(f"{self.paths[ranks]}: no tensor {label}")
            if part.shape != wanted:
                raise CheckpointError(f"{self.paths[ranks]}: {label} has shape {part.shape}, this rank's is {wanted}")
            if parts and part.dtype != parts[0].dtype:
                raise CheckpointError(
                    f"{self.paths[ranks]}: {label} is {part.dtype}, {parts[0].dtype} on the first tensor rank"
                )
            parts.append(replace(part, source=f"{self.paths[ranks]}: {label}"))
        rows = _copies(parts) if cut is None else _joined(shape, parts, name)
        return LazyTensor(shape=shape, dtype=parts[0].dtype, rows=rows, source=parts[0].source)

    def check_names(self, kind: tuple[str, ...], names: set[str]) -> None:
        """Refuse files that hold more than the tensors with these full names.

        Raises:
            CheckpointError: naming the first surplus tensor.
        """
        expected: dict[int, set[str]] = {place: set() for place in range(len(self.layout.split))}
        for name in names:
            place, local = self.layout.place_of(name)
            expected[place].add(local)
        for ranks in self.files:
            for place in self.layout.places_of(ranks[1]):
                surplus = sorted(set(self.section(ranks, place, kind)) - expected[place])
                if surplus:
                    raise CheckpointError(
                        f"{self.paths[ranks]}: {len(surplus)} tensors have no place in it, the first is "
                        f"{'.'.join([self.layout.key_of(place), *kind, surplus[0]])}"
                    )


def _optimizer(joiner: _Joiner, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Optimizer state of the trained parameters."""
    result = {}
    for kind in ("exp_avg", "exp_avg_sq", "param"):
        trained = [name for name in shapes if joiner.holds((kind,), name)]
        joiner.check_names((kind,), set(trained))
        result.update({f"{kind}.{name}": joiner.join((kind,), name, shapes[name]) for name in trained})
    return result


def _joined(shape: tuple[int, ...], parts: Sequence[LazyTensor], name: str) -> Any:
    """Rows of a tensor that the tensor group shares."""
    owned = [slabs(shape, cut_of(name), len(parts), rank) for rank in range(len(parts))]

    def rows(first: int, stop: int) -> Tensor:
        result = torch.empty((stop - first, *shape[1:]), dtype=parts[0].dtype)
        for part, of_rank in zip(parts, owned, strict=True):
            for slab in of_rank:
                met = slab.meet(first, stop)
                if met is not None:
                    place = result[met.first - first : met.stop - first]
                    values = part.read(met.local, met.local + met.stop - met.first)
                    place[:, met.columns or slice(None)] = values
        return result

    return rows


def _copies(parts: Sequence[LazyTensor]) -> Any:
    """Rows of a tensor of which every tensor rank has a copy; the copies must be the same."""

    def rows(first: int, stop: int) -> Tensor:
        result = parts[0].read(first, stop)
        for part in parts[1:]:
            other = part.read(first, stop)
            different = result.reshape(-1).view(torch.uint8) != other.reshape(-1).view(torch.uint8)
            if different.any():
                raise CheckpointError(
                    f"{part.source} differs from {parts[0].source}, its copy, in {int(different.sum())} of "
                    f"{different.numel()} bytes"
                )
        return result

    return rows
