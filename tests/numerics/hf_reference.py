"""The same model in `transformers`, with random weights, and the comparison of two sets of tensors.

In: a `ModelConfig` that both sides can express. Out: a reference model with eager attention, its inputs, and
`assert_close`. Every weight is random, norms, biases and alpha included: a zero or a one would hide a missing tensor.
The weights are fp32 numbers, the reference computes in fp64: two fp32 sides would add their errors, and the gradient of
alpha, one number summed over all slots, then differs by 4e-5 where it is small (measured).

Shapes: i images, S side in pixels, s side of the low-resolution image.
"""

from collections.abc import Mapping

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.hf_names import from_megavl, to_megavl, transformers_dialect
from megavl.config import ModelConfig
from megavl.model.vision.tower import CLIP_MEAN, CLIP_STD

TOLERANCE = 1e-5
"""Largest difference of an fp32 tensor over the largest value of the reference."""


def reference_model(
    model: ModelConfig, *, image_id: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.nn.Module:
    """`build_reference` with random fp32 weights, computing in `dtype`."""
    reference = build_reference(model, image_id=image_id).float().eval()
    randomise(reference, seed)
    return reference.to(dtype)


def build_reference(model: ModelConfig, *, image_id: int = 5, attention: str = "eager") -> torch.nn.Module:
    """`DeepseekVL(Hybrid)ForConditionalGeneration` of these sizes, weights as `transformers` initialises them."""
    siglip, decoder = model.siglip, model.decoder
    sections: dict = {
        "text_config": {
            "model_type": "llama",
            "hidden_size": decoder.hidden,
            "intermediate_size": decoder.ffn,
            "num_hidden_layers": decoder.layers,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "vocab_size": decoder.vocab,
            "max_position_embeddings": decoder.max_positions,
            "rms_norm_eps": decoder.norm_eps,
            "rope_theta": decoder.rope_theta,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": siglip.image_size,
            "patch_size": siglip.patch_size,
            "hidden_size": siglip.width,
            "num_hidden_layers": siglip.layers,
            "num_attention_heads": siglip.heads,
            "intermediate_size": siglip.mlp,
            "hidden_act": "gelu",
            "vision_use_head": False,
            "layer_norm_eps": 1e-6,
        },
        "image_token_id": image_id,
        "tie_word_embeddings": False,
        "attn_implementation": attention,
    }
    if model.sam is None:
        return transformers.DeepseekVLForConditionalGeneration(transformers.DeepseekVLConfig(**sections))
    config = transformers.DeepseekVLHybridConfig(**sections, high_res_vision_config=_sam_section(model))
    return transformers.DeepseekVLHybridForConditionalGeneration(config)


def _sam_section(model: ModelConfig) -> dict:
    sam = model.sam
    assert sam is not None
    assert sam.downsample == (2 * sam.neck, 4 * sam.neck), "transformers derives the convolutions' widths"
    return {
        "model_type": "sam_vision_model",
        "image_size": sam.image_size,
        "patch_size": sam.patch_size,
        "hidden_size": sam.width,
        "num_hidden_layers": sam.layers,
        "num_attention_heads": sam.heads,
        "mlp_dim": sam.mlp,
        "window_size": sam.window,
        "global_attn_indexes": list(sam.global_layers),
        "output_channels": sam.neck,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random values of a sensible size everywhere: matrices keep the size of activations, norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2 and "pos" not in name.rsplit(".", 2)[-2]:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(std=0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)


def reference_images(pixels: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """The pre-normalised tensors that `transformers` wants, from pixels in [0, 1], [i, 3, S, S], in their type."""
    side = model.siglip.image_size
    low = functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    images = {"pixel_values": (low - 0.5) / 0.5}
    if model.sam is not None:
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        images["high_res_pixel_values"] = (pixels - mean) / std
    return images


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient; one that is missing is an error, not a zero."""
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value of the reference."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """The same names, and each tensor within `tolerance`; the message lists the worst."""
    assert ours.keys() == theirs.keys(), f"only on one side: {sorted(ours.keys() ^ theirs.keys())}"
    differences = {name: relative_difference(ours[name], theirs[name]) for name in ours}
    worst = sorted(differences.items(), key=lambda item: -item[1])[:5]
    assert all(value <= tolerance for value in differences.values()), f"beyond {tolerance}: {worst}"


def from_transformers(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """A state dict of transformers, either version's names, by megavl's names."""
    lazy = {name: in_memory(tensor, name) for name, tensor in state.items()}
    return {name: t.read() for name, t in to_megavl(lazy, model, transformers_dialect(state)).items()}


def to_transformers(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse, with the names of transformers 5."""
    lazy = {name: in_memory(tensor, name) for name, tensor in state.items()}
    return {name: tensor.read() for name, tensor in from_megavl(lazy, model, "transformers").items()}
