"""The start of stage 1 as the report made it: public language model, SigLIP-L and SAM-B, and a fresh adaptor.

In: the tensors of separately published checkpoints, sizes, a seed. Out: `Contents` of a whole model that any writer
takes, and an `Inventory` of where each tensor comes from and what was not used. Nothing is read before a writer asks.
What no public checkpoint has (adaptor, stride-2 convolutions, side branch) is what a run with this seed starts with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt, prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.lazy import LazyTensor, cast, computed, stacked
from megavl.checkpoint.convert.public_config import check_language, check_sam, check_siglip
from megavl.checkpoint.convert.public_names import FRESH_PREFIXES, Found, Part, find_part
from megavl.checkpoint.convert.shapes import full_shapes
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.hf_names import fuse_qkv, unused_names
from megavl.config import ModelConfig
from megavl.model.build import seeded_generator
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.sam import SamTower
from megavl.model.vision.tower import initialise_vision


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public checkpoint."""

    origin: str
    """File or folder, for messages."""
    tensors: Mapping[str, LazyTensor]
    """All of its tensors."""
    config: Mapping[str, Any] | None = None
    """Its `config.json`, where it has one."""


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Where the tensors of an assembled model come from."""

    found: Mapping[Part, Found]
    """What each public checkpoint gave."""
    origins: Mapping[Part, str]
    """Which checkpoint that was."""
    fresh: tuple[str, ...]
    """Tensors drawn from the seed."""
    absent: tuple[str, ...]
    """Unused tensors of the released checkpoints that no source has; no forward pass reads them."""
    seed: int
    """The seed."""

    def lines(self) -> list[str]:
        """For a person: every source, every group of fresh, absent and left-over tensors with its count."""
        lines = []
        for part, found in self.found.items():
            names = f"{found.naming.dialect} names" + (f" below {found.prefix}" if found.prefix else "")
            used = sum(len(parts) for parts in found.parts.values())
            lines.append(f"{part}: {used} tensors from {self.origins[part]} ({names})")
            lines += [f"  carried though unused: {len(found.unused)} attn_pool tensors"] if found.unused else []
            lines += [f"  left over: {count:4} {group}" for group, count in found.left_over.items()]
        lines.append(f"fresh from seed {self.seed}: {len(self.fresh)} tensors")
        lines += [f"  {name}" for name in self.fresh]
        lines += [f"absent, unused by every forward pass: {len(self.absent)} tensors"] if self.absent else []
        return lines + [f"  {name}" for name in self.absent]

    def record(self) -> dict[str, Any]:
        """The same for `conversion.json`."""
        return {
            "format": "separately published weights",
            "path": dict(self.origins),
            "dialect": {part: found.naming.dialect for part, found in self.found.items()},
            "left_over": {part: dict(found.left_over) for part, found in self.found.items()},
            "seed": self.seed,
            "fresh": list(self.fresh),
            "absent": list(self.absent),
        }


def assemble(
    sources: Mapping[Part, Source], model: ModelConfig, *, seed: int, dtype: torch.dtype | None = None
) -> tuple[Contents, Inventory]:
    """Put a model together.

    Args:
        sources: `language` and `siglip`, and `sam` for models with a high-resolution tower.
        model: its sizes; every source must have them.
        seed: of the fresh tensors, `stage.seed` of a run that would draw the same.
        dtype: type of all tensors; None takes that of the sources, where they have the same.

    Returns:
        The model and where it comes from.

    Raises:
        CheckpointError: a source is missing, is not needed, lacks a tensor or has other sizes; types differ.
    """
    wanted: tuple[Part, ...] = ("language", "siglip", "sam") if model.sam else ("language", "siglip")
    if set(sources) != set(wanted):
        raise CheckpointError(f"the model is made of {', '.join(wanted)}, given are {', '.join(sources)}")
    language, siglip = sources["language"], sources["siglip"]
    check_language(language.config, model.decoder, language.origin)  # says more than a missing tensor would
    found = {part: find_part(part, sources[part].tensors, model, sources[part].origin) for part in wanted}
    check_siglip(siglip.config, model.siglip, siglip.origin)
    if model.sam:
        check_sam(sources["sam"].config, model.sam, sources["sam"].origin)
    shapes = full_shapes(model)
    public = {
        ours: join(ours, parts, shapes[ours], model.decoder.kv_heads)
        for answer in found.values()
        for ours, parts in answer.parts.items()
    }
    dtype = dtype or _common_type(found)
    fresh = fresh_tensors(model, seed)
    unused = {name: tensor for answer in found.values() for name, tensor in answer.unused.items()}
    contents = Contents(
        model=model,
        tensors={name: cast(tensor, dtype) for name, tensor in (public | fresh).items()},
        unused={name: cast(tensor, dtype) for name, tensor in unused.items()},
    )
    inventory = Inventory(
        found=found,
        origins={part: sources[part].origin for part in wanted},
        fresh=tuple(fresh),
        absent=tuple(name for name in unused_names(model) if name not in unused),
        seed=seed,
    )
    return contents, inventory


def _common_type(found: Mapping[Part, Found]) -> torch.dtype:
    """The type that all sources have; rounding or widening some of them is for the user to ask for."""
    types = {part: {t.dtype for parts in answer.parts.values() for t in parts} for part, answer in found.items()}
    every = set().union(*types.values())
    if len(every) > 1:
        told = ", ".join(f"{part} {' and '.join(sorted(map(str, own)))}" for part, own in types.items())
        raise CheckpointError(f"types differ: {told}; --dtype gives all of them one")
    return every.pop()


def fresh_tensors(model: ModelConfig, seed: int) -> dict[str, LazyTensor]:
    """The initial values that `build_stages` gives to what no public checkpoint has, fp32; drawn at the first read."""
    lock, drawn = Lock(), dict[str, Tensor]()

    def values(name: str) -> Tensor:
        with lock:  # writers read from several threads
            if not drawn:
                drawn.update(_draw(model, seed))
        return drawn[name]

    return {
        name: replace(computed([], shape, partial(values, name), torch.float32), source=f"seed {seed}: {name}")
        for name, shape in full_shapes(model).items()
        if name.startswith(FRESH_PREFIXES)
    }


def _draw(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """All fresh tensors.

    The generator passes through the whole SAM tower (385 MB at the 7B's sizes, for a moment) to reach the convolutions
    behind it: their values depend on what was drawn before.
    """
    adaptor = make_adaptor(model)
    initialise_vision(adaptor, seeded_generator(seed, "adaptor"))
    named = {"first_stage.adaptor." + name: p.detach() for name, p in adaptor.named_parameters()}
    if model.sam:
        tower = SamTower(model.sam)
        initialise_vision(tower, seeded_generator(seed, "towers"))
        named |= {"first_stage.towers.sam." + name: p.detach() for name, p in tower.named_parameters()}
    return {name: tensor for name, tensor in named.items() if name.startswith(FRESH_PREFIXES)}


def join(ours: str, parts: Sequence[LazyTensor], shape: tuple[int, ...], groups: int) -> LazyTensor:
    """Stack the parts of one tensor.

    Args:
        ours: megavl's name.
        parts: tensors in the order of the name table.
        shape: of the result.
        groups: key-value heads.

    Raises:
        CheckpointError: a part has not the shape that the model gives it.
    """
    if ours.endswith("siglip.pos_embed") and len(parts[0].shape) == 2:  # transformers' table has no leading 1
        parts = [computed(parts, (1, *parts[0].shape), lambda table: table.unsqueeze(0))]
    for part, rows in zip(parts, _rows_of_parts(ours, shape, len(parts)), strict=True):
        wanted = (rows, *shape[1:])
        if part.shape != wanted:
            remark = _other_positions(part.shape, wanted) if ours.endswith("pos_embed") else ""
            raise CheckpointError(f"{part.source} has shape {part.shape}, the model {wanted}{remark}")
    whole = stacked(parts)
    if not ours.endswith("linear_qkv.weight"):
        return whole
    return fuse_qkv(parts[0], parts[1], parts[2], groups)


def _rows_of_parts(ours: str, shape: tuple[int, ...], count: int) -> list[int]:
    """Rows of each part: equal shares, but for the decoder's queries, which are as many as the hidden size."""
    if ours.endswith("linear_qkv.weight"):
        return [shape[1], *[(shape[0] - shape[1]) // 2] * 2]
    return [shape[0] // count] * count


def _other_positions(theirs: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What another number of positions means; positions are never interpolated."""
    if prod(theirs[:-1]) == prod(wanted[:-1]):
        return ""
    sides = [isqrt(prod(shape[:-1])) for shape in (theirs, wanted)]
    return f": positions of {sides[0]} x {sides[0]} patches for {sides[1]} x {sides[1]}, so another image size"
