"""Which parts of the model each training stage trains (report section 3.2, Figure 3; the table below is all of it).

In: stages as built, and the number of the training stage. Out: the same stages with `requires_grad` set. To be called
before the stages are wrapped for data parallelism: gradient buffers are made for trainable parameters only.

SAM stays frozen throughout, as in the report (its stage 3 names GPU memory as the reason); what follows it there, two
stride-2 convolutions and the side branch `neck_hd` with its factor, counts as adaptor and is always trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # planning reads the table and need not wait for megatron-core
    from megavl.model.stage import Stage

COMPONENTS = ("sam", "sam_adaptor", "siglip", "aligner", "decoder")
"""The parts of a model, as `Stage.component_of` names them."""

TRAINED: dict[int, dict[str, bool]] = {
    # 0 language pre-training of the decoder alone
    0: {"sam": False, "sam_adaptor": False, "siglip": False, "aligner": False, "decoder": True},
    # 1 adaptor warm-up
    1: {"sam": False, "sam_adaptor": True, "siglip": False, "aligner": True, "decoder": False},
    # 2 joint vision-language pre-training
    2: {"sam": False, "sam_adaptor": True, "siglip": False, "aligner": True, "decoder": True},
    # 3 supervised fine-tuning
    3: {"sam": False, "sam_adaptor": True, "siglip": True, "aligner": True, "decoder": True},
}
"""Training stage -> part of the model -> whether it is trained."""


def frozen_components(number: int) -> tuple[str, ...]:
    """The parts of the model that a training stage, 0 to 3, leaves as they are."""
    return tuple(name for name, trained in TRAINED[number].items() if not trained)


def apply_freeze(stages: Iterable[Stage], number: int) -> dict[str, int]:
    """Set `requires_grad` of every parameter of this rank.

    Args:
        stages: the chunks of this rank, not wrapped.
        number: training stage, 0 to 3.

    Returns:
        Trainable parameters of this rank (its shard, in elements) per component; all zero where a pipeline rank trains
        nothing.
    """
    table = TRAINED[number]
    trainable = dict.fromkeys(COMPONENTS, 0)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            component = stage.component_of(name)
            parameter.requires_grad_(table[component])
            trainable[component] += parameter.numel() if table[component] else 0
    return trainable


def trained_components(stages: Iterable[Stage]) -> set[str]:
    """The parts of which this rank holds something trainable, read from `requires_grad`."""
    return {
        stage.component_of(name)
        for stage in stages
        for name, parameter in stage.named_parameters()
        if parameter.requires_grad
    }


def compile_frozen_towers(stages: Iterable[Stage], backend: str = "inductor") -> int:
    """`VisionTowers.compile_frozen` where the towers are; to be called after `apply_freeze`.

    Args:
        stages: the chunks of this rank, not wrapped.
        backend: torch.compile's.

    Returns:
        Blocks that will be compiled when they first run.
    """
    return sum(s.first_stage.towers.compile_frozen(backend) for s in stages if s.first_stage is not None)
