"""Everything before the first decoder layer, as one module: towers, adaptor, text embedding.

In: one micro-batch of token ids and pixels. Out: the input of the first layer, [t, 1, h] ([t/tp, 1, h] under sequence
parallelism), in which text and image positions are alike.
Shapes: t tokens, i images, p positions per image, h hidden, S side of an image in pixels.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavl.config import ModelConfig
from megavl.data.microbatch import ImageShare, MicroBatch
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import VisionTowers
from megavl.ops import PLAIN, Operator, Ops


class SharedImages(Protocol):
    """How tensor ranks divide the images of a micro-batch (`megavl/parallel/vision_placement.py`)."""

    share: ImageShare
    """What this rank encodes."""

    def join(self, features: Tensor, batch: MicroBatch) -> Tensor:
        """Features of this rank's share, any number from 0 on -> those of all images [i, p, h] in reading order."""


class FirstStage(MegatronModule):
    """Embeds text and images.

    Each tensor rank encodes every image, or its share of them where `shared_images` was handed in. The sequence is cut
    over the tensor group here, once, after the features of all images are placed; the backward pass of that cut
    gathers, so each rank holds the *full* gradient of all features. What that means for the gradients of towers and
    adaptor is written down in `megavl/parallel/gradients.py`.
    """

    shared_images: SharedImages | None = None

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        pg: ProcessGroupCollection,
        *,
        recompute_vision: bool = False,
        ops: Ops = PLAIN,
    ) -> None:
        """Towers and adaptor are initialised (torch's random state), the embedding is not.

        Args:
            model: sizes.
            config: the decoder's.
            pg: process groups; those of `tp` share the vocabulary and, under sequence parallelism, the sequence.
            recompute_vision: recompute each SigLIP block in the backward pass.
            ops: fused operators.
        """
        super().__init__(config)
        self.tp_group = pg.tp
        self.tokens_per_image = model.tokens_per_image
        self.towers = VisionTowers(model, recompute=recompute_vision, ops=ops)
        self.adaptor = make_adaptor(model, ops)
        self.fused_scatter = ops.image_scatter
        self.embedding = VocabParallelEmbedding(
            model.decoder.vocab,
            model.decoder.hidden,
            init_method=config.init_method,
            config=config,
            tp_group=pg.tp,
        )

    def forward(self, batch: MicroBatch) -> Tensor:
        """Embed one micro-batch.

        Raises:
            ValueError: images, features and places for them differ in number. Filling anyway would move every later
                image onto the wrong text without any visible error.
        """
        check_image_counts(batch, self.tokens_per_image)
        embedded = self.embedding(batch.tokens)  # [t, h], the same on every tensor rank
        if batch.num_images:
            features = self.image_features(batch)
            embedded = place_image_features(embedded, features, batch.image_slots, self.fused_scatter)
        elif torch.is_grad_enabled():
            embedded = self._without_images(embedded)
        hidden = embedded.unsqueeze(1)  # [t, 1, h]
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)  # [t/tp, 1, h]
        return hidden

    def image_features(self, batch: MicroBatch) -> Tensor:
        """Features of all images in the decoder's space, [i, p, h]; every tensor rank calls it or none."""
        if self.shared_images is None:
            return self.encode(batch.pixels, batch.encoded)
        share = self.shared_images.share
        if share.of(batch):
            pixels = batch.pixels_of(share) if self.towers.needs_pixels(batch.encoded) else None
            features = self.encode(pixels, batch.encoded)
        else:
            features = self.embedding.weight.new_zeros(0, self.tokens_per_image, self.config.hidden_size)
            if torch.is_grad_enabled():  # the backward pass of `join` is a collective: this rank must take part in it
                features = self._without_images(features)
        return self.shared_images.join(features, batch)

    def encode(self, pixels: Tensor | None, encoded: Mapping[str, Tensor] | None = None) -> Tensor:
        """Image features in the decoder's space, [i, p, h], from pixels uint8 [i, 3, S, S] and what is made already."""
        return self.adaptor(*self.towers(None if pixels is None else pixels.float() / 255, encoded))

    def _without_images(self, embedded: Tensor) -> Tensor:
        """`embedded`, tied to the trainable parameters that this micro-batch does not use."""
        unused = [p for part in (self.towers, self.adaptor) for p in part.parameters() if p.requires_grad]
        return _ZeroGradients.apply(embedded, *unused) if unused else embedded


def place_image_features(embedded: Tensor, features: Tensor, slots: Tensor, fused: Operator | None = None) -> Tensor:
    """Fill the image positions of `embedded`, images in reading order.

    Args:
        embedded: embedded text, [t, h].
        features: [i, p, h].
        slots: positions to fill, int64 [i*p].
        fused: `Ops.image_scatter`.

    Returns:
        The filled stream, [t, h].

    Raises:
        ValueError: slots and features differ in number.
    """
    num_features = features.shape[0] * features.shape[1]
    if slots.numel() != num_features:
        raise ValueError(f"{slots.numel()} image positions in the text, {num_features} image features")
    if fused is not None:
        return fused(embedded, features, slots)
    return embedded.index_copy(0, slots, features.flatten(0, 1).to(embedded.dtype))


def check_image_counts(batch: MicroBatch, tokens_per_image: int) -> None:
    """Compare images, pixels and places for them; sizes only, so the device is not waited for.

    Raises:
        ValueError: two of the counts differ.
    """
    expected = batch.num_images * tokens_per_image
    if batch.image_slots.numel() != expected:
        raise ValueError(
            f"samples {batch.sample_ids}: {batch.image_slots.numel()} image positions in the text, but "
            f"{batch.num_images} images take {expected}"
        )
    loaded, announced = 0 if batch.pixels is None else batch.pixels.shape[0], len(batch.pixel_share.of(batch))
    if loaded != announced and batch.encoded is None:
        raise ValueError(f"samples {batch.sample_ids}: {loaded} images in pixels, {announced} announced")


class _ZeroGradients(torch.autograd.Function):
    """Identity on the first input; every other input gets a gradient of zeros.

    megatron-core reduces a gradient bucket when each of its parameters has reported a gradient in the last micro-batch.
    Parameters of towers that did not run would never report, and their bucket's collective would be missed on this
    rank only. Zeros (one stored value, expanded) make them report without running the towers.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters  # not saved tensors: shapes are all that is needed, values may change meanwhile
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        zeros = tuple(p.new_zeros(()).expand_as(p) for p in ctx.parameters)
        return (gradients[0] if ctx.needs_input_grad[0] else None, *zeros)
