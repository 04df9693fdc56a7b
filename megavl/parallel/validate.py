"""Whether a recipe fits the number of ranks it was started on, checked before anything is built.

In: the recipe, the number of ranks. Out: one sentence per problem, with field and both numbers; none if it fits.
What shows without the machine is in `megavl/config.py:validate`. The guards of megatron-core's own command line (which
is not part of the library) are among these.
"""

import os

from megavl.config import ModelConfig, ParallelConfig, Recipe, StageConfig
from megavl.parallel.stage_plan import stage_plan


def check_layout(recipe: Recipe, world_size: int) -> list[str]:
    """Every way in which model, layout, batch and ranks contradict each other.

    Args:
        recipe: the run.
        world_size: ranks it was started on.
    """
    parallel = recipe.parallel
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "virtual_pipeline": parallel.virtual_pipeline}
    small = [f"parallel.{name} {size} is below 1" for name, size in sizes.items() if size < 1]
    if small:  # everything else divides by them
        return small
    return [
        *_check_model(recipe.model, parallel),
        *_check_switches(parallel),
        *_check_vision(parallel),
        *_check_batch(recipe.stage, parallel, world_size),
    ]


def _check_model(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Sizes that the tensor group cannot share, layers that the pipeline cannot."""
    decoder, tensor = model.decoder, parallel.tensor
    shared = {"heads": decoder.heads, "kv_heads": decoder.kv_heads, "ffn": decoder.ffn, "vocab": decoder.vocab}
    problems = [
        f"model.decoder.{name} {size} does not divide by parallel.tensor {tensor}"
        for name, size in shared.items()
        if size % tensor
    ]
    stages = parallel.pipeline * parallel.virtual_pipeline
    if decoder.layers < stages:
        return [
            *problems,
            f"model.decoder.layers {decoder.layers} is below parallel.pipeline * virtual_pipeline "
            f"{parallel.pipeline} * {parallel.virtual_pipeline} = {stages}; every stage needs a layer",
        ]
    try:
        stage_plan(model, parallel)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _check_switches(parallel: ParallelConfig) -> list[str]:
    """Switches that need another switch."""
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    problems = []
    if parallel.sequence and parallel.tensor == 1:
        problems.append("parallel.sequence cuts the sequence over the tensor group, but parallel.tensor is 1")
    if virtual > 1 and pipeline == 1:
        problems.append(f"parallel.virtual_pipeline {virtual} needs a pipeline, but parallel.pipeline is 1")
    if virtual > 1 and os.environ.get("TORCH_NCCL_AVOID_RECORD_STREAMS") == "1":
        problems.append(
            f"parallel.virtual_pipeline {virtual} with TORCH_NCCL_AVOID_RECORD_STREAMS=1 in the environment gives a "
            "wrong loss (Megatron-LM issue 1586); unset the variable"
        )
    if parallel.overlap_p2p_comm_warmup_flush and virtual == 1:
        problems.append(
            "parallel.overlap_p2p_comm_warmup_flush overlaps messages of interleaved stages, but "
            "parallel.virtual_pipeline is 1"
        )
    if parallel.overlap_param_gather:
        for name in ("distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(parallel, name):
                problems.append(f"parallel.overlap_param_gather needs parallel.{name}, which is off")
    if parallel.timeout_s < 1:
        problems.append(f"parallel.timeout_s {parallel.timeout_s} is below 1")
    return problems


def _check_vision(parallel: ParallelConfig) -> list[str]:
    """Settings of `parallel.vision`."""
    problems = []
    if parallel.vision_batch < 1:
        problems.append(f"parallel.vision_batch {parallel.vision_batch} is below 1")
    if parallel.vision_ahead_mib < 0:
        problems.append(f"parallel.vision_ahead_mib {parallel.vision_ahead_mib} is below 0")
    if parallel.vision_cache and parallel.vision != "split_model":
        problems.append(
            f"parallel.vision_cache {parallel.vision_cache} keeps what runs ahead under parallel.vision split_model, "
            f"but parallel.vision is {parallel.vision}"
        )
    if parallel.vision_cache_gib <= 0:
        problems.append(f"parallel.vision_cache_gib {parallel.vision_cache_gib} is not above 0")
    return problems


def _check_batch(stage: StageConfig, parallel: ParallelConfig, world_size: int) -> list[str]:
    """Ranks that the layout does not divide, and a global batch that the data-parallel ranks do not."""
    tensor, pipeline = parallel.tensor, parallel.pipeline
    if world_size % (tensor * pipeline):
        return [
            f"{world_size} ranks do not divide by parallel.tensor * pipeline {tensor} * {pipeline} = "
            f"{tensor * pipeline}"
        ]
    data = world_size // (tensor * pipeline)
    rows = stage.micro_batch * data
    if rows < 1:
        return []  # config.py says it
    if stage.global_batch % rows:
        return [
            f"stage.global_batch {stage.global_batch} does not divide by stage.micro_batch * data-parallel ranks "
            f"{stage.micro_batch} * {data} = {rows}"
        ]
    micro_batches = stage.global_batch // rows
    if parallel.virtual_pipeline > 1 and pipeline > 1 and micro_batches % pipeline:
        return [
            f"stage.global_batch {stage.global_batch} gives {micro_batches} micro-batches a rank; with "
            f"parallel.virtual_pipeline {parallel.virtual_pipeline} they must be a multiple of parallel.pipeline "
            f"{pipeline}"
        ]
    return []
