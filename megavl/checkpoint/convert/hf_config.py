"""`config.json` of the two Hugging Face dialects, to and from our sizes.

In: a parsed `config.json`, or a `ModelConfig`. Out: the other. What the released `hf-deepseek` configuration cannot
name (towers of other sizes) stands as explicit fields, ours by name, beside `model_name`. Fields of the language model
that a file leaves out have LlamaConfig's defaults: the released 7B names only a few.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal

import torch

from megavl.checkpoint.folder import CheckpointError
from megavl.config import AdaptorKind, DecoderConfig, ModelConfig, SamConfig, SiglipConfig
from megavl.model.sizes import CLIP_MEAN_COLOUR, GREY, SIZES
from megavl.model.vision.tower import CLIP_MEAN, CLIP_STD

Json = dict[str, Any]

_SIGLIP_LARGE, _SAM_BASE = "siglip_large_patch16_384", "sam_b_downsample"
_PROJECTORS: dict[str, AdaptorKind] = {"mlp_gelu": "mlp_gelu", "low_high_hybrid_split_mlp_gelu": "hybrid"}
_LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA |= {"vocab_size": 32000, "max_position_embeddings": 2048}
_SIGLIP_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
}
_SAM_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "mlp_dim",
    "window": "window_size",
    "global_layers": "global_attn_indexes",
    "neck": "output_channels",
}
"""Our field -> transformers' field."""
_SIGLIP_DEFAULTS = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12}
_SIGLIP_DEFAULTS |= {"num_attention_heads": 12, "intermediate_size": 3072}
_SAM_DEFAULTS: Json = {theirs: getattr(SIZES["7b"].sam, ours) for ours, theirs in _SAM_FIELDS.items()}
"""transformers leaves out of a nested section what its class has by default; for SAM that is SAM-B."""


def read_config(config: Json, background: Any = None) -> ModelConfig:
    """Sizes from a `config.json` of either dialect.

    Args:
        config: the parsed file.
        background: colour that pads an image, where another file tells it; None: the released models' colour.

    Raises:
        CheckpointError: a field is missing, or asks for what megavl does not compute. The file is the caller's to name.
    """
    try:
        read = _read_deepseek if config["model_type"] == "multi_modality" else _read_transformers
        model = read(config)
    except KeyError as error:
        raise CheckpointError(f"no field {error.args[0]}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(str(error)) from None
    return replace(model, background=tuple(background or (CLIP_MEAN_COLOUR if model.sam else GREY)))


def _read_deepseek(config: Json) -> ModelConfig:
    vision, aligner = config["vision_config"], config["aligner_config"]["params"]
    hybrid = vision["cls"] == "HybridVisionTower"
    low = vision["params"]["low_res_cfg"] if hybrid else vision["params"]
    kind = aligner["projector_type"]
    _demand("aligner_config.params.projector_type", kind, *_PROJECTORS)
    _demand("vision_config.cls", vision["cls"], "HybridVisionTower", "CLIPVisionTower")
    _demand("vision_config select_layer", low.get("select_layer", -1), -1)
    if hybrid:
        _demand("vision_config.params.concat_type", vision["params"].get("concat_type", "tuple"), "tuple")
    released = SIZES["7b"]
    sam = _tower(vision["params"]["high_res_cfg"], SamConfig, released.sam, _SAM_BASE) if hybrid else None
    return ModelConfig(
        decoder=_read_llama(config["language_config"]),
        siglip=SiglipConfig(**_tower(low, SiglipConfig, released.siglip, _SIGLIP_LARGE)),
        sam=SamConfig(**sam) if sam else None,
        adaptor=_PROJECTORS[kind],
        background=GREY,
    )


def _tower(section: Json, kind: Any, released: Any, name: str) -> Json:
    """A tower's sizes: those that its name stands for, overridden by explicit fields."""
    known = asdict(released) if section.get("model_name") == name else {}
    table = {f.name: section[f.name] if f.name in section else known[f.name] for f in fields(kind)}
    return {field: tuple(value) if isinstance(value, list) else value for field, value in table.items()}


def _read_transformers(config: Json) -> ModelConfig:
    kind = config["model_type"]
    _demand("model_type", kind, "multi_modality", "deepseek_vl", "deepseek_vl_hybrid")
    vision, hybrid = config["vision_config"], kind == "deepseek_vl_hybrid"
    _demand("vision_config.hidden_act", vision.get("hidden_act", "gelu_pytorch_tanh"), "gelu")
    siglip = SiglipConfig(**{ours: (_SIGLIP_DEFAULTS | vision)[theirs] for ours, theirs in _SIGLIP_FIELDS.items()})
    sam = None
    if hybrid:
        high = _SAM_DEFAULTS | config["high_res_vision_config"]
        neck = high["output_channels"]
        table = {ours: high[theirs] for ours, theirs in _SAM_FIELDS.items()}
        table |= {"global_layers": tuple(table["global_layers"]), "downsample": (2 * neck, 4 * neck)}
        sam = SamConfig(**table, upsample=4 * siglip.grid)
    return ModelConfig(
        decoder=_read_llama(config["text_config"]),
        siglip=siglip,
        sam=sam,
        adaptor="hybrid" if hybrid else "mlp_gelu",
        background=GREY,
    )


def _read_llama(section: Json) -> DecoderConfig:
    table = {**_LLAMA, **{name: value for name, value in section.items() if value is not None}}
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    hidden, heads = table["hidden_size"], table["num_attention_heads"]
    _demand("model_type of the language model", table.get("model_type", "llama"), "llama")
    _demand("hidden_act of the language model", table.get("hidden_act", "silu"), "silu")
    _demand("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    _demand("head_dim", table.get("head_dim", hidden // heads), hidden // heads)
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        _demand(name, table.get(name, False), False)
    optional = {"init_std": table["initializer_range"]} if "initializer_range" in table else {}
    return DecoderConfig(
        layers=table["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=table.get("num_key_value_heads", heads),
        ffn=table["intermediate_size"],
        vocab=table["vocab_size"],
        max_positions=table["max_position_embeddings"],
        rope_theta=rope.get("rope_theta", table.get("rope_theta", 10000.0)),
        norm_eps=table.get("rms_norm_eps", 1e-6),
        **optional,
    )


def _demand(field: str, value: Any, *known: Any) -> None:
    """Raises ValueError: the value is none of those that megavl computes."""
    if value not in known:
        raise ValueError(f"{field} is {value!r}, megavl has {' and '.join(map(repr, known))}")


def deepseek_config(model: ModelConfig, dtype: torch.dtype) -> Json:
    """`config.json` of the released repositories."""
    released, hidden = SIZES["7b"], model.decoder.hidden
    low = _name_tower(model.siglip, released.siglip, _SIGLIP_LARGE) | {"select_feature": "same", "select_layer": -1}
    vision: Json = {"cls": "CLIPVisionTower", "model_type": "vision", "params": low}
    low |= {"pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3}
    if model.sam:
        high = _name_tower(model.sam, released.sam, _SAM_BASE) | {"select_feature": "same", "select_layer": -1}
        high |= {"pixel_mean": list(CLIP_MEAN), "pixel_std": list(CLIP_STD), "ckpt_path": ""}
        high["output_dim"], low["output_dim"] = model.sam.downsample[-1], model.siglip.width
        vision = {
            "cls": "HybridVisionTower",
            "model_type": "vision",
            "params": {
                "concat_type": "tuple",
                "freeze_high": True,
                "freeze_low": True,
                "high_res_cfg": high,
                "low_res_cfg": low | {"ckpt_path": ""},
            },
        }
    projector = {kind: name for name, kind in _PROJECTORS.items()}[model.adaptor]
    params = {"depth": 2, "input_dim": model.siglip.width, "n_embed": hidden, "projector_type": projector}
    return {
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": params},
        "architectures": ["MultiModalityCausalLM"],
        "language_config": _llama_section(model.decoder, nested_rope=False) | {"torch_dtype": _dtype_name(dtype)},
        "model_type": "multi_modality",
        "torch_dtype": _dtype_name(dtype),
        "vision_config": vision,
    }


def _name_tower(tower: Any, released: Any, name: str) -> Json:
    """The tower's released name, or its sizes field by field."""
    if tower == released:
        return {"image_size": tower.image_size, "model_name": name}
    sizes = {field: list(value) if isinstance(value, tuple) else value for field, value in asdict(tower).items()}
    return {"model_name": name.split("_")[0], **sizes}


def transformers_config(model: ModelConfig, dtype: torch.dtype, names: Literal["4.56", "5"], image_id: int) -> Json:
    """`config.json` of `DeepseekVL(Hybrid)ForConditionalGeneration`.

    Raises:
        CheckpointError: transformers derives sizes that the model has otherwise.
    """
    kind, colour = ("deepseek_vl_hybrid", CLIP_MEAN_COLOUR) if model.sam else ("deepseek_vl", GREY)
    if model.background != colour:
        raise CheckpointError(f"model.background is {model.background}, transformers pads such a model with {colour}")
    vision: Json = {theirs: getattr(model.siglip, ours) for ours, theirs in _SIGLIP_FIELDS.items()}
    vision |= {"model_type": "siglip_vision_model", "hidden_act": "gelu", "vision_use_head": False}
    config: Json = {
        "architectures": ["DeepseekVL" + ("Hybrid" if model.sam else "") + "ForConditionalGeneration"],
        "model_type": kind,
        "dtype" if names == "5" else "torch_dtype": _dtype_name(dtype),
        "image_token_id": image_id,
        "text_config": _llama_section(model.decoder, nested_rope=names == "5"),
        "tie_word_embeddings": False,
        "vision_config": vision | {"layer_norm_eps": 1e-6},
    }
    if model.sam:
        config["high_res_vision_config"] = _sam_section(model.sam)
    return config


def _sam_section(sam: SamConfig) -> Json:
    derived = (2 * sam.neck, 4 * sam.neck)
    if sam.downsample != derived:
        raise CheckpointError(
            f"model.sam.downsample is {sam.downsample}, transformers has {derived} behind a neck of {sam.neck} channels"
        )
    section: Json = {theirs: getattr(sam, ours) for ours, theirs in _SAM_FIELDS.items()}
    section |= {"model_type": "sam_vision_model", "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    return section | {"global_attn_indexes": list(sam.global_layers)}


def _llama_section(size: DecoderConfig, nested_rope: bool) -> Json:
    rope: Mapping[str, Any] = {"rope_theta": size.rope_theta}
    return {
        "model_type": "llama",
        "hidden_size": size.hidden,
        "initializer_range": size.init_std,
        "intermediate_size": size.ffn,
        "max_position_embeddings": size.max_positions,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": size.norm_eps,
        "tie_word_embeddings": False,
        "vocab_size": size.vocab,
        **({"rope_parameters": {"rope_type": "default", **rope}} if nested_rope else rope),
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
