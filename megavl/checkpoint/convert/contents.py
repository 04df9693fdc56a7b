"""What a checkpoint holds, in the same words whatever its format: the middle of every conversion.

A reader of a format gives `Contents`; a writer of a format takes one. Names are those of the whole model on one rank
(`model/shards.py`), so every pair of formats meets here and none knows another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Training:
    """The state of a run besides its weights."""

    step: int
    """Optimizer steps done; with the recipe it is the data position too."""
    adam_step: int
    """Updates that Adam has done."""
    optimizer: Mapping[str, LazyTensor]
    """`<kind>.<full name>` -> fp32 tensor; kinds `exp_avg`, `exp_avg_sq` and, where weights are not fp32, `param`."""
    description: Mapping[str, Any]
    """The run's own description: what `state.json` holds (recipe, tokenizer fingerprint, extra, layout)."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """One checkpoint."""

    model: ModelConfig
    """Sizes, read from the checkpoint itself."""
    tensors: Mapping[str, LazyTensor]
    """Full name -> weights."""
    unused: Mapping[str, LazyTensor] = field(default_factory=dict)
    """Original name -> tensors that no forward pass reads (attn_pool, high_layer_norm, low_layer_norm)."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """File name -> file to hand on unchanged: tokenizer, processor, generation settings, the original config.json."""
    training: Training | None = None
    """State of a run, where there is one."""
