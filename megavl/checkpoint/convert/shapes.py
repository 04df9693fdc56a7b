"""Full shape of every tensor of a model by arithmetic, and the check of a checkpoint against them.

In: sizes. Out: shapes by megavl's names, those of the whole model on one rank. Nothing is built.

Shapes: h hidden, n query heads, g key-value groups, d head size, f hidden size of the feed-forward network.
"""

from collections.abc import Mapping

import torch

from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.folder import CheckpointError
from megavl.config import DecoderConfig, ModelConfig
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import VisionTowers

Shapes = dict[str, tuple[int, ...]]


def full_shapes(model: ModelConfig) -> Shapes:
    """Every tensor of the model."""
    with torch.device("meta"):  # shapes without memory
        parts = {"first_stage.towers.": VisionTowers(model), "first_stage.adaptor.": make_adaptor(model)}
    shapes = {prefix + name: tuple(p.shape) for prefix, part in parts.items() for name, p in part.named_parameters()}
    return shapes | _decoder_shapes(model.decoder)


def _decoder_shapes(size: DecoderConfig) -> Shapes:
    table, norm = (size.vocab, size.hidden), (size.hidden,)
    shapes: Shapes = {
        "first_stage.embedding.weight": table,
        "decoder.final_layernorm.weight": norm,
        "last_stage.head.weight": table,
    }
    for layer in range(size.layers):
        qkv = (size.heads + 2 * size.kv_heads) * (size.hidden // size.heads)
        shapes |= {
            f"decoder.layers.{layer}.{name}.weight": shape
            for name, shape in (
                ("input_layernorm", norm),
                ("self_attention.linear_qkv", (qkv, size.hidden)),
                ("self_attention.linear_proj", (size.hidden, size.hidden)),
                ("pre_mlp_layernorm", norm),
                ("mlp.linear_fc1", (2 * size.ffn, size.hidden)),
                ("mlp.linear_fc2", (size.hidden, size.ffn)),
            )
        }
    return shapes


def check_shapes(tensors: Mapping[str, LazyTensor], model: ModelConfig) -> None:
    """Hold a checkpoint's tensors against its own sizes.

    Raises:
        CheckpointError: one is missing, has no place or another shape; the first is named.
    """
    expected = full_shapes(model)
    if tensors.keys() != expected.keys():
        missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} tensors are missing (first: {missing[:1]}) and {len(surplus)} have no "
            f"place in the model (first: {surplus[:1]})"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(f"{tensor.source}: shape {tensor.shape}, the model has {expected[name]} for {name}")


def check_types(tensors: Mapping[str, LazyTensor]) -> None:
    """Weights of a checkpoint have one type.

    Raises:
        CheckpointError: two have not.
    """
    first = next(iter(tensors.values()))
    for tensor in tensors.values():
        if tensor.dtype != first.dtype:
            raise CheckpointError(
                f"types are mixed: {first.source} is {first.dtype}, {tensor.source} is {tensor.dtype}; "
                "--dtype gives all of them one"
            )
