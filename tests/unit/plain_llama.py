"""An independent reading of the model in plain PyTorch, one document at a time, without megatron-core.

In: full parameters by full name, a micro-batch. Out: logits and loss. It shares no code with `megavl/model` except
towers and adaptor, which have tests of their own: dense attention over one document, rotation by complex numbers,
separate query, key and value.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from megavl.config import DecoderConfig
from megavl.data.microbatch import IGNORE, MicroBatch


def plain_logits(
    tensors: Mapping[str, Tensor], features: Tensor | None, batch: MicroBatch, size: DecoderConfig
) -> Tensor:
    """Logits of every position, [t, v].

    Args:
        tensors: full parameters by full name.
        features: image features in the decoder's space, [i, p, h], or None.
        batch: documents of one micro-batch.
        size: of the decoder.
    """
    hidden = tensors["first_stage.embedding.weight"][batch.tokens]  # [t, h]
    if features is not None:
        is_image = torch.zeros(len(hidden), dtype=torch.bool)
        is_image[batch.image_slots] = True
        place = is_image.cumsum(0) - 1
        hidden = torch.where(is_image[:, None], features.flatten(0, 1)[place.clamp(min=0)], hidden)
    bounds = batch.cu_seqlens.tolist()
    documents = [
        _document(tensors, hidden[start:stop], batch.positions[start:stop], size)
        for start, stop in itertools.pairwise(bounds)
    ]
    return torch.cat(documents) @ tensors["last_stage.head.weight"].T


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each position, [t]; 0 where nothing is learnt."""
    return functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")


def _document(tensors: Mapping[str, Tensor], hidden: Tensor, positions: Tensor, size: DecoderConfig) -> Tensor:
    """Normalised output of the last layer for one document, [s, h]."""
    for layer in range(size.layers):
        weights = {n.split(f"layers.{layer}.")[1]: w for n, w in tensors.items() if f"decoder.layers.{layer}." in n}
        hidden = hidden + _attention(weights, _norm(hidden, weights["input_layernorm.weight"], size), positions, size)
        normed = _norm(hidden, weights["pre_mlp_layernorm.weight"], size)
        gate, up = weights["mlp.linear_fc1.weight"].split(size.ffn)
        activated = functional.silu(normed @ gate.T) * (normed @ up.T)
        hidden = hidden + activated @ weights["mlp.linear_fc2.weight"].T
    return _norm(hidden, tensors["decoder.final_layernorm.weight"], size)


def _attention(weights: Mapping[str, Tensor], hidden: Tensor, positions: Tensor, size: DecoderConfig) -> Tensor:
    """Dense causal attention, [s, h]; `linear_qkv` holds for each key head its query heads, the key, the value."""
    head_dim, share = size.hidden // size.heads, size.heads // size.kv_heads
    qkv = (hidden @ weights["self_attention.linear_qkv.weight"].T).unflatten(1, (size.kv_heads, share + 2, head_dim))
    query = _turn(qkv[:, :, :share], positions, size)  # [s, g, n/g, d]
    key = _turn(qkv[:, :, share : share + 1], positions, size)
    value = qkv[:, :, share + 1]  # [s, g, d]
    scores = torch.einsum("sgnd,ugd->gnsu", query, key[:, :, 0]) / head_dim**0.5
    future = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
    weighted = torch.einsum("gnsu,ugd->sgnd", scores.masked_fill(future, float("-inf")).softmax(-1), value)
    return weighted.flatten(1) @ weights["self_attention.linear_proj.weight"].T


def _turn(heads: Tensor, positions: Tensor, size: DecoderConfig) -> Tensor:
    """Rotary embedding: component j and j + d/2 are one complex number. [s, ..., d]"""
    half = heads.shape[-1] // 2
    frequencies = size.rope_theta ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(()), positions[:, None] * frequencies)[:, None, None]  # [s, 1, 1, d/2]
    numbers = torch.complex(heads[..., :half].contiguous(), heads[..., half:].contiguous()) * turn
    return torch.cat((numbers.real, numbers.imag), dim=-1)


def _norm(hidden: Tensor, weight: Tensor, size: DecoderConfig) -> Tensor:
    return weight * hidden / (hidden.square().mean(-1, keepdim=True) + size.norm_eps).sqrt()
