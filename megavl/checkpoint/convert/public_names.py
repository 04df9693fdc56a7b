"""What SigLIP-L, SAM-B and a Llama-format language model are called where they are published one by one.

In: the tensors of one such checkpoint. Out: how it names things, and megavl's tensors with what is left over.
timm and Meta use the names that DeepSeek-VL's own checkpoints have below their towers, `transformers` those that it
uses in its DeepSeek-VL classes, so the tables are those of `checkpoint/hf_names.py`. What stands before the names
(`visual.trunk.` in open_clip's files, `vision_model.` in those of transformers 4) is read from the checkpoint.

Shapes: c channels of SigLIP.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megavl.checkpoint.convert.lazy import LazyTensor, row_range
from megavl.checkpoint.folder import CheckpointError
from megavl.checkpoint.hf_names import Entry, entries, unused_names
from megavl.config import ModelConfig
from megavl.model.vision.tower import SAM_ADAPTOR_PREFIXES

Part = Literal["language", "siglip", "sam"]
"""A model that is published on its own."""

_OURS: dict[Part, tuple[str, ...]] = {
    "language": ("first_stage.embedding.", "decoder.", "last_stage."),
    "siglip": ("first_stage.towers.siglip.",),
    "sam": ("first_stage.towers.sam.",),
}
FRESH_PREFIXES = ("first_stage.adaptor.", *("first_stage.towers.sam." + prefix for prefix in SAM_ADAPTOR_PREFIXES))
"""megavl's tensors that no public checkpoint has: adaptor, stride-2 convolutions, side branch."""
# The map head of transformers -> timm's pooling, with the thirds of the first dimension that it takes.
_POOLING_OF_HEAD: dict[str, tuple[str, int, int]] = {
    "latent": ("head.probe", 0, 3),
    "q.weight": ("head.attention.in_proj_weight", 0, 1),
    "q.bias": ("head.attention.in_proj_bias", 0, 1),
    "kv.weight": ("head.attention.in_proj_weight", 1, 3),
    "kv.bias": ("head.attention.in_proj_bias", 1, 3),
    **{
        f"{ours}.{p}": (f"head.{theirs}.{p}", 0, 3)
        for ours, theirs in (
            ("proj", "attention.out_proj"),
            ("norm", "layernorm"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        )
        for p in ("weight", "bias")
    },
}
_POOLING = "attn_pool."
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
"""Inside a layer and yet no weight: old checkpoints store the rotary frequencies."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How one kind of checkpoint names a part."""

    dialect: str
    """Whose names."""
    anchor: str
    """A name that shows the dialect and, by what precedes it, the prefix."""
    layers: str
    """What precedes the number of a layer."""
    names: Mapping[str, tuple[str, ...]]
    """megavl's name -> names below the prefix, in the order in which they are stacked."""
    pooling: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    """Name of an unused tensor -> (name below the prefix, first and last third of its rows)."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one public checkpoint holds of a model."""

    naming: Naming
    """The dialect."""
    prefix: str
    """What stands before the dialect's names."""
    parts: Mapping[str, list[LazyTensor]]
    """megavl's name -> tensors to stack."""
    unused: Mapping[str, LazyTensor]
    """Name in the original dialect -> SigLIP's pooling."""
    left_over: Mapping[str, int]
    """Group of names that have no place in the model -> how many."""


def namings(part: Part, model: ModelConfig) -> list[Naming]:
    """The ways in which `part` of `model` is named, one per dialect."""
    table = [e for e in _entries(model) if e.ours.startswith(_OURS[part]) and not e.ours.startswith(FRESH_PREFIXES)]
    if part == "language":
        names = {e.ours: tuple(n.removeprefix("language_model.") for n in e.original) for e in table}
        return [Naming(dialect="Llama", anchor="model.embed_tokens.weight", layers="model.layers.", names=names)]
    stem = _OURS[part][0]
    plain = {e.ours: (e.ours.removeprefix(stem),) for e in table}
    if part == "sam":
        below = "model.high_res_vision_model.vision_encoder."
        split = {e.ours: tuple(n.removeprefix(below) for n in e.transformers) for e in table}
        anchor = "patch_embed.projection.weight"
        return [
            Naming(dialect="Meta", anchor="patch_embed.proj.weight", layers="blocks.", names=plain),
            Naming(dialect="transformers", anchor=anchor, layers="layers.", names=split),
        ]
    split = {e.ours: tuple(n.removeprefix("model.vision_model.") for n in e.transformers) for e in table}
    pooling = {name: name[name.index(_POOLING) :] for name in unused_names(model) if _POOLING in name}
    head = {name: _POOLING_OF_HEAD[rest.removeprefix(_POOLING)] for name, rest in pooling.items()}
    whole = {name: (rest, 0, 3) for name, rest in pooling.items()}
    anchor = "embeddings.patch_embedding.weight"
    return [
        Naming(dialect="timm", anchor="patch_embed.proj.weight", layers="blocks.", names=plain, pooling=whole),
        Naming(dialect="transformers", anchor=anchor, layers="encoder.layers.", names=split, pooling=head),
    ]


def find_part(part: Part, tensors: Mapping[str, LazyTensor], model: ModelConfig, origin: str) -> Found:
    """Recognise a public checkpoint and sort its tensors.

    Args:
        part: what it is a checkpoint of.
        tensors: all of its tensors by their names.
        model: the model to start.
        origin: the file or folder, for error messages.

    Returns:
        The tensors of `part`, SigLIP's pooling where there is one, and what is left over.

    Raises:
        CheckpointError: it is no checkpoint of `part`, lacks a tensor, or has layers that the model has not.
    """
    naming, prefix = _recognise(part, tensors, model, origin)
    wanted = [prefix + name for names in naming.names.values() for name in names]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{origin}: no tensor {missing[0]}; {len(missing)} of the {len(wanted)} that {part} has in {naming.dialect}"
            f" names are missing among {len(tensors)} tensors"
        )
    pooling = {ours: (prefix + name, first, last) for ours, (name, first, last) in naming.pooling.items()}
    pooling = pooling if all(name in tensors for name, _, _ in pooling.values()) else {}
    left = set(tensors) - set(wanted) - {name for name, _, _ in pooling.values()}
    _refuse_other_layers(part, prefix + naming.layers, left, model, origin)
    return Found(
        naming=naming,
        prefix=prefix,
        parts={ours: [tensors[prefix + name] for name in names] for ours, names in naming.names.items()},
        unused={ours: _thirds(tensors[name], first, last) for ours, (name, first, last) in pooling.items()},
        left_over=_groups(left, wanted),
    )


def _entries(model: ModelConfig) -> list[Entry]:
    """Every tensor of the model by its released adaptor: that of the others has no name elsewhere, and needs none."""
    return entries(replace(model, adaptor="hybrid" if model.sam else "mlp_gelu"))


def _recognise(part: Part, tensors: Mapping[str, LazyTensor], model: ModelConfig, origin: str) -> tuple[Naming, str]:
    """The one dialect and prefix whose anchor is there."""
    answers = [
        (naming, name.removesuffix(naming.anchor))
        for naming in namings(part, model)
        for name in tensors
        if name == naming.anchor or name.endswith("." + naming.anchor)
    ]
    if len(answers) == 1:
        return answers[0]
    if answers:
        found = " and ".join(prefix + naming.anchor for naming, prefix in answers)
        raise CheckpointError(
            f"{origin}: {len(answers)} models in it could be {part}: {found}; give a checkpoint of one"
        )
    wanted = " or ".join(f"{naming.anchor} ({naming.dialect})" for naming in namings(part, model))
    raise CheckpointError(
        f"{origin}: not a checkpoint of {part}: none of its {len(tensors)} tensors is called {wanted}, its first is "
        f"{min(tensors, default='absent')}"
    )


def _refuse_other_layers(part: Part, stem: str, left: Iterable[str], model: ModelConfig, origin: str) -> None:
    """A tensor left over inside a layer computes something that the model would not."""
    inside = {name: int(match[1]) for name in left if (match := re.match(re.escape(stem) + r"(\d+)\.", name))}
    section = "decoder" if part == "language" else part
    layers, deepest = getattr(model, section).layers, max(inside.values(), default=0)
    if deepest >= layers:
        raise CheckpointError(
            f"{origin}: {deepest + 1} layers, model.{section} has {layers}; {stem}{deepest} has no place"
        )
    strange = sorted(name for name in inside if not _HARMLESS.search(name))
    if strange:
        raise CheckpointError(
            f"{origin}: {strange[0]} has no place in a layer of the model ({len(strange)} such tensors)"
        )


def _thirds(tensor: LazyTensor, first: int, last: int) -> LazyTensor:
    """Rows from one third to another: [3c, ...] -> [c or 2c, ...]; all of them as they are."""
    if (first, last) == (0, 3):
        return tensor
    return row_range(tensor, first * tensor.num_rows // 3, last * tensor.num_rows // 3)


def _groups(left: Iterable[str], used: Iterable[str]) -> dict[str, int]:
    """Count names by their first component, those beside used ones by everything but the numbers in them."""
    beside = {name.split(".", 1)[0] for name in used}

    def group(name: str) -> str:
        first = name.split(".", 1)[0]
        return re.sub(r"\.\d+\.", ".*.", name) if first in beside else first

    return dict(sorted(Counter(map(group, left)).items()))
