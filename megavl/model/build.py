"""From the sizes and the layout of a recipe to this rank's stages, with initial weights.

In: `ModelConfig`, `ParallelConfig`, process groups. Out: one `Stage` per virtual chunk. Only this file makes a
`TransformerConfig`. Initial weights depend on seed and parameter name alone: every layout starts from the same model.
"""

import hashlib
import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megavl.config import ModelConfig, ParallelConfig
from megavl.model.layer_split import split_layers
from megavl.model.shards import full_name, full_parameters, full_shape, load_full_state, mark_shards, take_shard
from megavl.model.stage import Stage
from megavl.model.vision.tower import initialise_vision
from megavl.ops import PLAIN, Ops

__all__ = ["build_stages", "full_name", "load_full_state", "split_layers", "transformer_config"]


def build_stages(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    pg: ProcessGroupCollection,
    device: torch.device,
    ops: Ops = PLAIN,
) -> list[Stage]:
    """Build and initialise the chunks of this rank.

    Args:
        model: sizes.
        parallel: layout; megatron-core's groups must have been formed for it.
        dtype: type of parameters and activations.
        seed: of the initial weights.
        pg: process groups, `tp`, `pp` and `cp` at least.
        device: where parameters live.
        ops: fused operators, from `make_ops`; by default plain PyTorch.

    Returns:
        One stage per virtual chunk, not wrapped.

    Raises:
        ValueError: the layout does not fit the model.
    """
    config = transformer_config(model, parallel, dtype=dtype, device=device, ops=ops)
    split = split_layers(model.decoder.layers, parallel)
    stages = []
    for chunk in range(parallel.virtual_pipeline):
        place = chunk * parallel.pipeline + pg.pp.rank()  # in pipeline order
        with device:
            stage = Stage(
                model,
                config,
                num_layers=split[place],
                pg=pg,
                pre_process=place == 0,
                post_process=place == len(split) - 1,
                vp_stage=chunk if parallel.virtual_pipeline > 1 else None,
                recompute_vision=parallel.recompute_vision,
                ops=ops,
            )
        for parameter in stage.parameters():  # towers and adaptor are made in fp32
            parameter.data = parameter.data.to(dtype)
        mark_shards(stage)
        initialise(stage, seed)
        stages.append(stage)
    return stages


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, dtype: torch.dtype, device: torch.device, ops: Ops = PLAIN
) -> TransformerConfig:
    """megatron-core's description of decoder and layout.

    Args:
        model: sizes.
        parallel: layout.
        dtype: type of parameters, activations and pipeline messages.
        device: where the model runs; on CUDA pointwise functions are fused.
        ops: fused operators.

    Raises:
        ValueError: sizes do not divide by the tensor size.
    """
    decoder = model.decoder
    check_tensor_size(model, parallel.tensor)
    on_cuda = device.type == "cuda"
    return TransformerConfig(
        num_layers=decoder.layers,
        hidden_size=decoder.hidden,
        ffn_hidden_size=decoder.ffn,
        num_attention_heads=decoder.heads,
        num_query_groups=decoder.kv_heads,
        kv_channels=decoder.hidden // decoder.heads,
        normalization="RMSNorm",
        layernorm_epsilon=decoder.norm_eps,
        activation_func=functional.silu,
        gated_linear_unit=True,
        # megatron-core's own fusion is compiled; on the CPU that would need a C++ compiler.
        bias_activation_fusion=on_cuda and ops.swiglu is None,
        use_te_activation_func=ops.swiglu is not None,  # "te": an activation module of the decoder's spec
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        init_method_std=decoder.init_std,
        perform_initialization=False,  # `initialise` does it, independently of the layout
        use_cpu_initialization=not on_cuda,
        calculate_per_token_loss=True,  # mean over the tokens of the global batch, not of micro-batch means
        **_layout_fields(model, parallel, on_cuda),
        **_recompute_fields(parallel),
    )


def _layout_fields(model: ModelConfig, parallel: ParallelConfig, on_cuda: bool) -> dict:
    virtual = parallel.virtual_pipeline > 1
    split = split_layers(model.decoder.layers, parallel)
    layout = [["decoder"] * count for count in split]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if virtual else None,
        "pipeline_model_parallel_layout": layout if parallel.pipeline > 1 else None,
        # Batched send/receive pairs mix up activations at two pipeline ranks with virtual stages (silently).
        "overlap_p2p_comm": virtual,
        "batch_p2p_comm": parallel.batch_p2p_comm and not virtual,
        "batch_p2p_sync": parallel.batch_p2p_sync,
        "overlap_p2p_comm_warmup_flush": parallel.overlap_p2p_comm_warmup_flush and virtual,
        # gloo may still be sending when the output's memory is given back: wrong gradients, silently.
        "deallocate_pipeline_outputs": on_cuda,
    }


def _recompute_fields(parallel: ParallelConfig) -> dict:
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def check_tensor_size(model: ModelConfig, tensor: int) -> None:
    """Refuse a tensor size that would cut a head, a row of the vocabulary or a feed-forward unit."""
    decoder = model.decoder
    for name, size in (
        ("heads", decoder.heads),
        ("kv_heads", decoder.kv_heads),
        ("ffn", decoder.ffn),
        ("vocab", decoder.vocab),
    ):
        if size % tensor:
            raise ValueError(f"model.decoder.{name} = {size} does not divide by parallel.tensor = {tensor}")


@torch.no_grad()
def initialise(stage: Stage, seed: int) -> None:
    """Give every parameter of `stage` its initial value.

    Each full tensor is drawn from a generator of its own, keyed by seed and full name, and the rank keeps its slice. So
    there is one full fp32 tensor at a time on the device (1.7 GB for the 7B's embedding). CPU and CUDA draw different
    numbers for the decoder; towers and adaptor are always drawn on the CPU. Matrices are normal with the decoder's
    `init_std`, those that write into the residual stream with `init_std / sqrt(2 * layers)`; norms are 1.
    """
    decoder = stage.model.decoder
    if stage.first_stage is not None:
        for part in ("towers", "adaptor"):
            initialise_vision(getattr(stage.first_stage, part), seeded_generator(seed, part))
    for name, _, parameter in full_parameters([stage]):
        if stage.component_of(name) != "decoder":
            continue
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        scale = math.sqrt(2 * decoder.layers) if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1.0
        full = torch.empty(full_shape(stage, parameter), device=parameter.device)
        full.normal_(std=decoder.init_std / scale, generator=seeded_generator(seed, name, parameter.device))
        parameter.copy_(take_shard(full, stage, parameter))


def seeded_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one full tensor, or of all towers (`towers`) or the adaptor (`adaptor`) together."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))
