"""The state of a run besides its weights, and the description of it that a checkpoint keeps.

In: a description as `state.json` holds it. Out: `Training`; or the other way round.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavl.checkpoint.convert.contents import Training
from megavl.checkpoint.convert.lazy import LazyTensor
from megavl.checkpoint.folder import CheckpointError


def training_from(state: Mapping[str, Any], optimizer: Mapping[str, LazyTensor], path: Path) -> Training:
    """Training state from its description.

    Raises:
        CheckpointError: the description lacks a number.
    """
    try:
        step, adam_step = int(state["step"]), int(state["adam_step"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no usable step and adam_step ({type(error).__name__}: {error})") from None
    return Training(step=step, adam_step=adam_step, optimizer=optimizer, description=dict(state))


def description_of(training: Training) -> dict[str, Any]:
    """The description for `state.json`. No layout is named: random states, which belong to one, are not converted."""
    return {
        "format": 1,
        "tokenizer": "",
        "recipe": {},
        "extra": {},
        **training.description,
        "step": training.step,
        "adam_step": training.adam_step,
        "layout": {},
    }
