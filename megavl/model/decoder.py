"""The decoder's parts, named for megatron-core's `TransformerBlock`: pre-norm, attention, SwiGLU, as in LLaMA.

Out: specs only. The linear layers are megatron-core's own tensor-parallel ones, norm and core attention are ours.
Parameter names follow megatron-core: `layers.N.{input_layernorm, self_attention.linear_qkv, self_attention.linear_proj,
pre_mlp_layernorm, mlp.linear_fc1, mlp.linear_fc2}.weight`, then `final_layernorm.weight`.
"""

from collections.abc import Callable

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megavl.model.attention import DocumentAttention
from megavl.model.norm import RMSNorm
from megavl.ops import Operator, Ops


def block_spec(num_layers: int, ops: Ops) -> TransformerBlockSubmodules:
    """The parts of a block with `num_layers` layers; the final norm is built on the last stage only."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(ops)] * num_layers, layer_norm=norm_spec(ops))


def norm_spec(ops: Ops) -> ModuleSpec:
    """A norm."""
    return ModuleSpec(module=RMSNorm, params={"fused": ops.rmsnorm})


def layer_spec(ops: Ops) -> ModuleSpec:
    """One layer."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=DocumentAttention, params={"rope": ops.rope}),
            linear_proj=RowParallelLinear,
        ),
    )
    activation = None if ops.swiglu is None else ModuleSpec(module=FusedActivation, params={"swiglu": ops.swiglu})
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=activation
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm_spec(ops),
            self_attention=attention,
            self_attn_bda=add_residual,
            pre_mlp_layernorm=norm_spec(ops),
            mlp=mlp,
            mlp_bda=add_residual,
        ),
    )


class FusedActivation(MegatronModule):
    """megatron-core's slot for an activation module, used where a kernel replaces its own SwiGLU."""

    def __init__(self, config: TransformerConfig, swiglu: Operator) -> None:
        """No parameters.

        Args:
            config: the decoder's.
            swiglu: `Ops.swiglu`.
        """
        super().__init__(config)
        self.swiglu = swiglu

    def forward(self, gate_up: Tensor) -> Tensor:
        """Gate and up projection side by side, [t, 1, 2f] -> [t, 1, f]."""
        return self.swiglu(gate_up)


def add_residual(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """megatron-core's slot for "add bias, drop out, add residual"; there is neither bias nor dropout here.

    Its own function calls dropout with probability 0, which in training still draws a mask and keeps it.
    """

    def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
        return residual + output_with_bias[0]

    return add
