"""`config.json` of a public checkpoint against the model's sizes: what the shapes of tensors do not show.

In: the parsed file and the sizes. Out: nothing, or one error that lists every field with both values. A field that the
file leaves out has the default of `transformers`, as it has there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megavl.checkpoint.folder import CheckpointError
from megavl.config import DecoderConfig, SamConfig, SiglipConfig


def check_language(config: Mapping[str, Any] | None, size: DecoderConfig, origin: str) -> None:
    """Refuse a language model that is no Llama, or one of other sizes.

    Raises:
        CheckpointError: there is no config.json, or a field differs.
    """
    if config is None:
        raise CheckpointError(f"{origin}: no config.json in it, which says how many heads the language model has")
    heads = config.get("num_attention_heads", 32)
    hidden = config.get("hidden_size", 4096)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, transformers 4
    fields = {
        "model_type": (config.get("model_type"), "llama"),
        "hidden_size": (hidden, size.hidden),
        "intermediate_size": (config.get("intermediate_size", 11008), size.ffn),
        "num_hidden_layers": (config.get("num_hidden_layers", 32), size.layers),
        "num_attention_heads": (heads, size.heads),
        "num_key_value_heads": (config.get("num_key_value_heads") or heads, size.kv_heads),
        "head_dim": (config.get("head_dim") or hidden // heads, size.hidden // size.heads),
        "vocab_size": (config.get("vocab_size", 32000), size.vocab),
        "rms_norm_eps": (config.get("rms_norm_eps", 1e-6), size.norm_eps),
        "rope_theta": (rope.get("rope_theta", config.get("rope_theta", 10000.0)), size.rope_theta),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "tie_word_embeddings": (config.get("tie_word_embeddings", False), False),
    }
    _refuse(fields, origin)


def check_siglip(config: Mapping[str, Any] | None, size: SiglipConfig, origin: str) -> None:
    """Refuse other heads than the model's, where a config.json tells them (timm's does not).

    Its activation is not compared: published SigLIP says tanh-GELU in one place and erf-GELU in another, and
    DeepSeek-VL computes the erf one with the same weights.

    Raises:
        CheckpointError: a field differs.
    """
    expected = {"num_attention_heads": size.heads, "layer_norm_eps": 1e-6}
    _refuse(dict(_told(config, expected)), origin)


def check_sam(config: Mapping[str, Any] | None, size: SamConfig, origin: str) -> None:
    """Refuse other heads, windows or activations than the model's, where a config.json tells them.

    Raises:
        CheckpointError: a field differs.
    """
    expected = {
        "num_attention_heads": size.heads,
        "window_size": size.window,
        "global_attn_indexes": list(size.global_layers),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    _refuse(dict(_told(config, expected)), origin)


def _told(config: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The expected fields that a vision config has, on its own or inside a larger one."""
    told = (config or {}).get("vision_config", config or {})
    for name, value in expected.items():
        if isinstance(told, Mapping) and name in told:
            yield name, (told[name], value)


def _refuse(fields: Mapping[str, tuple[Any, Any]], origin: str) -> None:
    """One error for all fields whose two values differ."""
    wrong = [
        f"{name} is {theirs!r}, the model has {ours!r}" for name, (theirs, ours) in fields.items() if theirs != ours
    ]
    if wrong:
        raise CheckpointError(f"{origin}/config.json: {'; '.join(wrong)}")
