"""Every tensor of a model and its shape, from the sizes alone: no process group, no memory.

In: `ModelConfig`. Out: full name -> shape, in the model's order.

Shapes: h hidden, n query heads, g key-value groups, d head size, f feed-forward units, v vocabulary.
"""

from collections.abc import Mapping

import torch

from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.folder import CheckpointError
from megavl.config import DecoderConfig, ModelConfig
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import VisionTowers
from megavl.ops import PLAIN

Shape = tuple[int, ...]


def full_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The names and shapes that a whole model has on one rank."""
    with torch.device("meta"):
        parts = {"towers": VisionTowers(model), "adaptor": make_adaptor(model, PLAIN)}
    decoder = model.decoder
    return {
        **{f"first_stage.{p}.{n}": tuple(t.shape) for p, module in parts.items() for n, t in module.named_parameters()},
        "first_stage.embedding.weight": (decoder.vocab, decoder.hidden),
        **{f"decoder.layers.{i}.{n}": s for i in range(decoder.layers) for n, s in _layer(decoder).items()},
        "decoder.final_layernorm.weight": (decoder.hidden,),
        "last_stage.head.weight": (decoder.vocab, decoder.hidden),
    }


def check_shapes(tensors: Mapping[str, LazyTensor], model: ModelConfig, where: str) -> None:
    """Compare the tensors of a checkpoint with those that its sizes ask for.

    Args:
        tensors: by full name.
        model: the sizes that the checkpoint claims.
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: one is missing, surplus or of another shape.
    """
    expected = full_shapes(model)
    missing, surplus = [n for n in expected if n not in tensors], [n for n in tensors if n not in expected]
    if missing or surplus:
        first = f"no {missing[0]}" if missing else f"{surplus[0]}, which has no place in it"
        raise CheckpointError(
            f"{where}: {len(missing)} of the model's {len(expected)} tensors are missing and {len(surplus)} are too "
            f"many; the first problem: {first}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(f"{where}: {name} has shape {tensor.shape}, the model's sizes say {expected[name]}")


def _layer(size: DecoderConfig) -> dict[str, Shape]:
    """One decoder layer."""
    head_size = size.hidden // size.heads
    return {
        "input_layernorm.weight": (size.hidden,),
        "self_attention.linear_proj.weight": (size.hidden, size.heads * head_size),  # [h, n*d]
        "self_attention.linear_qkv.weight": ((size.heads + 2 * size.kv_heads) * head_size, size.hidden),
        "pre_mlp_layernorm.weight": (size.hidden,),
        "mlp.linear_fc1.weight": (2 * size.ffn, size.hidden),  # [2*f, h], gate above up
        "mlp.linear_fc2.weight": (size.hidden, size.ffn),  # [h, f]
    }
