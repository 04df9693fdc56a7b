"""One chunk of the model on one pipeline stage: [towers, adaptor, embedding] + decoder layers + [head, loss].

In: a micro-batch (every stage reads the document structure from its own copy) and, on all stages but the first, the
hidden states that megatron-core's schedule received. Out: hidden states for the next stage, or the loss of each token.
Everything is flattened: hidden states are [t, 1, h], [t/tp, 1, h] under sequence parallelism.
"""

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavl.config import ModelConfig
from megavl.data.microbatch import MicroBatch
from megavl.model.attention import Documents, describe_documents
from megavl.model.decoder import block_spec
from megavl.model.first_stage import FirstStage
from megavl.model.last_stage import LastStage
from megavl.model.vision.tower import SAM_ADAPTOR_PREFIXES
from megavl.ops import PLAIN, Ops


class Stage(MegatronModule):
    """What one pipeline rank holds for one virtual stage. Parts that lie elsewhere are None, never half-built."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        num_layers: int,
        pg: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        recompute_vision: bool = False,
        ops: Ops = PLAIN,
    ) -> None:
        """Build the parts; parallel weights are not initialised (see `model/build.py`).

        Args:
            model: sizes.
            config: from `transformer_config`, shared by all chunks of a rank.
            num_layers: decoder layers of this chunk.
            pg: process groups.
            pre_process: the pipeline starts here.
            post_process: the pipeline ends here.
            vp_stage: index of the chunk on its rank, None without virtual stages.
            recompute_vision: recompute each SigLIP block in the backward pass.
            ops: fused operators.
        """
        super().__init__(config)
        self.model = model
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        # The next two names and `set_input_tensor` are what megatron-core's schedules and gradient code look for.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.tp_group = pg.tp
        self.first_stage = (
            FirstStage(model, config, pg, recompute_vision=recompute_vision, ops=ops) if pre_process else None
        )
        self.decoder = TransformerBlock(
            config,
            block_spec(num_layers, ops),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg,
            vp_stage=vp_stage,
        )
        self.last_stage = LastStage(config, model.decoder.vocab, pg, ops) if post_process else None

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Take the hidden states of the previous stage from the schedule."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Hidden states for the next stage; on the last one the loss of each token, fp32 [t], 0 where `IGNORE`."""
        hidden = self._hidden(batch)
        return hidden if self.last_stage is None else self.last_stage(hidden, batch.labels, batch.learnt)

    def logits(self, batch: MicroBatch) -> Tensor:
        """As `forward`, but the last stage gives the logits of its part of the vocabulary, [t, v/tp]."""
        hidden = self._hidden(batch)
        return hidden if self.last_stage is None else self.last_stage.logits(hidden)

    def _hidden(self, batch: MicroBatch) -> Tensor:
        embedded = None if self.first_stage is None else self.first_stage(batch)
        return self.decoder(
            hidden_states=embedded, attention_mask=None, packed_seq_params=self._describe_documents(batch)
        )

    def _describe_documents(self, batch: MicroBatch) -> Documents:
        decoder = self.model.decoder
        return describe_documents(batch, decoder.hidden // decoder.heads, decoder.rope_theta, self.config.params_dtype)

    @staticmethod
    def component_of(name: str) -> str:
        """The part of the model that a parameter belongs to, as the freeze table calls it.

        Args:
            name: parameter name within a stage; `module.` prefixes of wrappers are ignored.

        Returns:
            `sam`, `sam_adaptor`, `siglip`, `aligner` or `decoder` (which includes embedding and head).
        """
        name = name[name.rfind("module.") + len("module.") :] if "module." in name else name
        if name.startswith("first_stage.towers.siglip."):
            return "siglip"
        if name.startswith("first_stage.towers.sam."):
            below = name.removeprefix("first_stage.towers.sam.")
            return "sam_adaptor" if below.startswith(SAM_ADAPTOR_PREFIXES) else "sam"
        return "aligner" if name.startswith("first_stage.adaptor.") else "decoder"

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """What `megatron.core.dist_checkpointing` saves: layers under their global number, one tensor each.

        Stacking the layers in one tensor (megatron-core's default) cannot hold layers of which some are frozen. The
        empty `_extra_state` of the linear layers (only Transformer Engine uses it) is left out.
        """
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: value for name, value in state.items() if not name.endswith("_extra_state")}
