"""What a tensor is called here, in the original DeepSeek-VL checkpoints, and in `transformers`; and the way between.

In: tensors of one dialect and the model's sizes. Out: the same weights in another dialect, whole (no layout), read when
the result is. megavl's names are those of the whole model on one rank (`model/shards.py`). Three tensors differ by more
than a name: SigLIP's fused qkv is three tensors in `transformers`; the decoder's fused qkv and its gate-and-up
projection are three and two tensors in both dialects. The tables hold the rules, `entries` spells them out for one
model.

Shapes: h hidden, n query heads, g key-value groups, d head size, f hidden size of the feed-forward network.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megavl.checkpoint.convert.lazy import LazyTensor, computed, row_range, stacked
from megavl.config import ModelConfig

Dialect = Literal["original", "transformers", "transformers-4"]
"""`transformers` is 5.x; 4.56 nests SigLIP one level deeper."""

_Names = str | tuple[str, ...]

# Original name below the tower (also ours) -> transformers' name below its counterpart. {N} is a layer; {p} is weight
# and bias. Several names on the right are stacked in order.
_SIGLIP: dict[str, _Names] = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj.{p}": "embeddings.patch_embedding.{p}",
    "blocks.{N}.norm1.{p}": "encoder.layers.{N}.layer_norm1.{p}",
    "blocks.{N}.attn.qkv.{p}": (
        "encoder.layers.{N}.self_attn.q_proj.{p}",
        "encoder.layers.{N}.self_attn.k_proj.{p}",
        "encoder.layers.{N}.self_attn.v_proj.{p}",
    ),
    "blocks.{N}.attn.proj.{p}": "encoder.layers.{N}.self_attn.out_proj.{p}",
    "blocks.{N}.norm2.{p}": "encoder.layers.{N}.layer_norm2.{p}",
    "blocks.{N}.mlp.fc1.{p}": "encoder.layers.{N}.mlp.fc1.{p}",
    "blocks.{N}.mlp.fc2.{p}": "encoder.layers.{N}.mlp.fc2.{p}",
    "norm.{p}": "post_layernorm.{p}",
}
_SAM: dict[str, _Names] = {
    "pos_embed": "high_res_vision_model.vision_encoder.pos_embed",
    "patch_embed.proj.{p}": "high_res_vision_model.vision_encoder.patch_embed.projection.{p}",
    "blocks.{N}.norm1.{p}": "high_res_vision_model.vision_encoder.layers.{N}.layer_norm1.{p}",
    "blocks.{N}.attn.qkv.{p}": "high_res_vision_model.vision_encoder.layers.{N}.attn.qkv.{p}",
    "blocks.{N}.attn.proj.{p}": "high_res_vision_model.vision_encoder.layers.{N}.attn.proj.{p}",
    "blocks.{N}.attn.rel_pos_h": "high_res_vision_model.vision_encoder.layers.{N}.attn.rel_pos_h",
    "blocks.{N}.attn.rel_pos_w": "high_res_vision_model.vision_encoder.layers.{N}.attn.rel_pos_w",
    "blocks.{N}.norm2.{p}": "high_res_vision_model.vision_encoder.layers.{N}.layer_norm2.{p}",
    "blocks.{N}.mlp.lin1.{p}": "high_res_vision_model.vision_encoder.layers.{N}.mlp.lin1.{p}",
    "blocks.{N}.mlp.lin2.{p}": "high_res_vision_model.vision_encoder.layers.{N}.mlp.lin2.{p}",
    "neck.0.weight": "high_res_vision_model.vision_encoder.neck.conv1.weight",
    "neck.1.{p}": "high_res_vision_model.vision_encoder.neck.layer_norm1.{p}",
    "neck.2.weight": "high_res_vision_model.vision_encoder.neck.conv2.weight",
    "neck.3.{p}": "high_res_vision_model.vision_encoder.neck.layer_norm2.{p}",
    "neck_hd.0.weight": "high_res_vision_neck.conv1.weight",
    "neck_hd.1.{p}": "high_res_vision_neck.layer_norm1.{p}",
    "neck_hd.2.weight": "high_res_vision_neck.conv2.weight",
    "neck_hd.3.{p}": "high_res_vision_neck.layer_norm2.{p}",
    "downsamples.0.weight": "high_res_vision_proj.conv1.weight",
    "downsamples.1.weight": "high_res_vision_proj.conv2.weight",
    "hd_alpha_downsamples": "high_res_vision_alpha",
}
_ADAPTOR: dict[str, dict[str, _Names]] = {
    "hybrid": {
        "high_up_proj.{p}": "high_res_vision_proj.{p}",
        "low_up_proj.{p}": "vision_proj.{p}",
        "layers.1.{p}": "proj.{p}",
    },
    "mlp_gelu": {"layers.0.{p}": "linear1.{p}", "layers.2.{p}": "linear2.{p}"},
}
# megavl's name -> the language model's name below its prefix, the same in both dialects.
_DECODER: dict[str, _Names] = {
    "first_stage.embedding.weight": "embed_tokens.weight",
    "decoder.layers.{N}.input_layernorm.weight": "layers.{N}.input_layernorm.weight",
    "decoder.layers.{N}.self_attention.linear_qkv.weight": (
        "layers.{N}.self_attn.q_proj.weight",
        "layers.{N}.self_attn.k_proj.weight",
        "layers.{N}.self_attn.v_proj.weight",
    ),
    "decoder.layers.{N}.self_attention.linear_proj.weight": "layers.{N}.self_attn.o_proj.weight",
    "decoder.layers.{N}.pre_mlp_layernorm.weight": "layers.{N}.post_attention_layernorm.weight",
    "decoder.layers.{N}.mlp.linear_fc1.weight": (
        "layers.{N}.mlp.gate_proj.weight",
        "layers.{N}.mlp.up_proj.weight",
    ),
    "decoder.layers.{N}.mlp.linear_fc2.weight": "layers.{N}.mlp.down_proj.weight",
    "decoder.final_layernorm.weight": "norm.weight",
}
_UNUSED_POOLING = ("latent", *(f"{part}.{{p}}" for part in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")))


@dataclass(frozen=True)
class Entry:
    """One tensor of megavl and the names of its parts in the two dialects."""

    ours: str
    """Name in the whole model on one rank."""
    original: tuple[str, ...]
    """Names in the original checkpoints, in the order in which they are stacked."""
    transformers: tuple[str, ...]
    """Names in transformers 5, in the order in which they are stacked."""

    def names(self, dialect: Dialect) -> tuple[str, ...]:
        """The names in `dialect`."""
        if dialect == "original":
            return self.original
        if dialect == "transformers":
            return self.transformers
        nested = "model.vision_model."
        return tuple(
            n.replace(nested, nested + "vision_model.", 1) if n.startswith(nested) else n for n in self.transformers
        )


def entries(model: ModelConfig) -> list[Entry]:
    """Every tensor of a model.

    Raises:
        ValueError: the model's adaptor exists in megavl only.
    """
    if model.adaptor not in _ADAPTOR:
        raise ValueError(f"model.adaptor {model.adaptor} has no name outside megavl; {', '.join(_ADAPTOR)} have")
    siglip = "vision_model.vision_tower_low.vision_tower." if model.sam else "vision_model.vision_tower."
    result = _part(_SIGLIP, "first_stage.towers.siglip.", siglip, "model.vision_model.", model.siglip.layers)
    if model.sam:
        sam = "vision_model.vision_tower_high.vision_tower."
        result += _part(_SAM, "first_stage.towers.sam.", sam, "model.", model.sam.layers)
    result += _part(_ADAPTOR[model.adaptor], "first_stage.adaptor.", "aligner.", "model.aligner.", 0)
    for ours, theirs in _DECODER.items():
        for filled in _fill(ours, theirs, model.decoder.layers):
            original = tuple("language_model.model." + name for name in filled[1])
            result.append(Entry(filled[0], original, tuple("model.language_model." + name for name in filled[1])))
    result.append(Entry("last_stage.head.weight", ("language_model.lm_head.weight",), ("lm_head.weight",)))
    return result


def unused_names(model: ModelConfig) -> list[str]:
    """Tensors of an original checkpoint that no forward pass reads; they are carried beside the model."""
    siglip = "vision_model.vision_tower_low.vision_tower." if model.sam else "vision_model.vision_tower."
    names = [siglip + "attn_pool." + rest for rest in _UNUSED_POOLING]
    if model.sam:
        names += ["vision_model.high_layer_norm.{p}", "vision_model.low_layer_norm.{p}"]
    return [name.replace("{p}", p) for name in names for p in (("weight", "bias") if "{p}" in name else ("",))]


def to_megavl(state: Mapping[str, LazyTensor], model: ModelConfig, dialect: Dialect) -> dict[str, LazyTensor]:
    """Rename and fuse.

    Args:
        state: tensors by the names of `dialect`; each is used once.
        model: the sizes that the state has.
        dialect: whose names.

    Returns:
        Whole tensors by megavl's names.

    Raises:
        ValueError: a tensor is missing, is of a shape that cannot be fused, or has no place in the model.
    """
    table = entries(model)
    expected = {name for entry in table for name in entry.names(dialect)}
    missing = sorted(expected - set(state))
    surplus = sorted(set(state) - expected - set(unused_names(model) if dialect == "original" else ()))
    if missing or surplus:
        raise ValueError(
            f"{len(missing)} of {len(expected)} tensors are missing (first: {missing[:1]}) and {len(surplus)} have no "
            f"place in the model (first: {surplus[:1]}), names read as {dialect}"
        )
    return {entry.ours: _join(entry, [state[name] for name in entry.names(dialect)], model) for entry in table}


def from_megavl(state: Mapping[str, LazyTensor], model: ModelConfig, dialect: Dialect) -> dict[str, LazyTensor]:
    """Split and rename; the inverse of `to_megavl`, without the unused tensors.

    Args:
        state: whole tensors by megavl's names.
        model: the sizes that the state has.
        dialect: whose names.

    Returns:
        Tensors by the names of `dialect`.

    Raises:
        ValueError: a tensor is missing.
    """
    result: dict[str, LazyTensor] = {}
    for entry in entries(model):
        if entry.ours not in state:
            raise ValueError(f"no tensor {entry.ours} among {len(state)}")
        names = entry.names(dialect)
        result.update(zip(names, _split(entry, state[entry.ours], len(names), model, dialect), strict=True))
    return result


def transformers_dialect(names: Iterable[str]) -> Dialect:
    """Which version of transformers has these names."""
    nested = any(name.startswith("model.vision_model.vision_model.") for name in names)
    return "transformers-4" if nested else "transformers"


def fuse_qkv(query: LazyTensor, key: LazyTensor, value: LazyTensor, groups: int) -> LazyTensor:
    """Megatron's layout: group by group the query heads, then the key head, then the value head.

    Args:
        query: [n*d, h].
        key: [g*d, h].
        value: [g*d, h].
        groups: g.

    Returns:
        [(n + 2*g)*d, h].
    """
    parts: list[LazyTensor] = []
    for group in range(groups):
        for tensor in (query, key, value):
            size = tensor.num_rows // groups
            parts.append(row_range(tensor, group * size, (group + 1) * size))
    return replace(stacked(parts), source=", ".join(tensor.source for tensor in (query, key, value)))


def split_qkv(fused: LazyTensor, heads: int, groups: int) -> tuple[LazyTensor, LazyTensor, LazyTensor]:
    """The inverse of `fuse_qkv`: [(n + 2*g)*d, h] -> [n*d, h], [g*d, h], [g*d, h]."""
    head_size = fused.num_rows // (heads + 2 * groups)
    sizes = [heads // groups * head_size, head_size, head_size]
    starts = [0, sizes[0], sizes[0] + head_size]

    def part(start: int, size: int) -> LazyTensor:
        firsts = [group * sum(sizes) + start for group in range(groups)]
        return replace(stacked([row_range(fused, first, first + size) for first in firsts]), source=fused.source)

    query, key, value = (part(start, size) for start, size in zip(starts, sizes, strict=True))
    return query, key, value


def _part(table: dict[str, _Names], ours: str, original: str, transformers: str, layers: int) -> list[Entry]:
    """Entries of a part whose megavl names are the original ones under another prefix."""
    return [
        Entry(ours + left, (original + left,), tuple(transformers + name for name in right))
        for template, theirs in table.items()
        for left, right in _fill(template, theirs, layers)
    ]


def _fill(left: str, right: _Names, layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Put every layer number and weight, bias into a rule."""
    names = (right,) if isinstance(right, str) else right
    for layer in range(layers) if "{N}" in left else (0,):
        for p in ("weight", "bias") if "{p}" in left else ("",):
            yield (
                left.replace("{N}", str(layer)).replace("{p}", p),
                tuple(name.replace("{N}", str(layer)).replace("{p}", p) for name in names),
            )


def _join(entry: Entry, parts: list[LazyTensor], model: ModelConfig) -> LazyTensor:
    if entry.ours.endswith("linear_qkv.weight"):
        size = model.decoder
        head_size = size.hidden // size.heads
        expected = [(count * head_size, size.hidden) for count in (size.heads, size.kv_heads, size.kv_heads)]
        actual = [tuple(part.shape) for part in parts]
        if actual != expected:
            raise ValueError(f"{', '.join(entry.transformers)} have shapes {actual}, the model has {expected}")
        return fuse_qkv(parts[0], parts[1], parts[2], groups=size.kv_heads)
    if entry.ours.endswith("siglip.pos_embed") and len(parts[0].shape) == 2:
        return computed(parts, (1, *parts[0].shape), lambda table: table[None])
    return parts[0] if len(parts) == 1 else stacked(parts)


def _split(
    entry: Entry, tensor: LazyTensor, count: int, model: ModelConfig, dialect: Dialect
) -> tuple[LazyTensor, ...]:
    if entry.ours.endswith("linear_qkv.weight"):
        return split_qkv(tensor, model.decoder.heads, model.decoder.kv_heads)
    if entry.ours.endswith("siglip.pos_embed") and dialect != "original":
        return (computed([tensor], tensor.shape[1:], lambda table: table[0]),)
    if count == 1:
        return (tensor,)
    size = tensor.num_rows // count
    return tuple(row_range(tensor, part * size, (part + 1) * size) for part in range(count))
