"""The shape of every full tensor of a model, without building it.

In: sizes. Out: megavl's name -> shape of the whole tensor.
"""

import torch

from megavl.config import DecoderConfig, ModelConfig
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import VisionTowers

Shapes = dict[str, tuple[int, ...]]
"""megavl's name -> shape."""


def full_shapes(model: ModelConfig) -> Shapes:
    """Towers and adaptor as they are built (on the meta device, which takes no memory), the decoder by arithmetic."""
    with torch.device("meta"):
        parts = {"towers": VisionTowers(model), "adaptor": make_adaptor(model)}
    shapes = {
        f"first_stage.{part}.{name}": tuple(parameter.shape)
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }
    return shapes | _decoder_shapes(model.decoder)


def _decoder_shapes(size: DecoderConfig) -> Shapes:
    """Embedding, layers, norm and head."""
    qkv = (size.heads + 2 * size.kv_heads) * (size.hidden // size.heads)
    shapes: Shapes = {
        "first_stage.embedding.weight": (size.vocab, size.hidden),
        "last_stage.head.weight": (size.vocab, size.hidden),
        "decoder.final_layernorm.weight": (size.hidden,),
    }
    for layer in range(size.layers):
        prefix = f"decoder.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (size.hidden,),
            prefix + "self_attention.linear_qkv.weight": (qkv, size.hidden),
            prefix + "self_attention.linear_proj.weight": (size.hidden, size.hidden),
            prefix + "pre_mlp_layernorm.weight": (size.hidden,),
            prefix + "mlp.linear_fc1.weight": (2 * size.ffn, size.hidden),
            prefix + "mlp.linear_fc2.weight": (size.hidden, size.ffn),
        }
    return shapes
