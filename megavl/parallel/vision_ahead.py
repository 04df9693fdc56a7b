"""Frozen towers that run on every tensor and pipeline rank before the schedule of a step (`vision = split_model`).

In: the micro-batches of a step. Out: the same, on the first stage with the frozen towers' outputs for the images of
this tensor rank; what is trained behind them runs in the schedule as in `split_tensor`.

Image k of the step is encoded by tensor rank k % tp, as in `split_tensor`, of pipeline rank (k // tp) % pp, in batches
of `parallel.vision_batch` images. The ranks of one pipeline group send what they made to its first rank, which needs
just that: per image SAM's neck map [k, g, g] and first global block's output [g, g, c], and where SigLIP is frozen its
features [p, c_low]; for the 7B in bf16 2.1 + 6.3 + 1.2 = 9.6 MB.

A rank encodes its own images of the next step at the tail of the one before (`begin`), when its last backward pass is
launched: on CUDA beside the backward passes, reduction and update, on the CPU in the time that later pipeline ranks
would wait. The weights are frozen, so nothing depends on the update; sending waits until the step itself begins.

Memory: features on a first-stage rank are those of 1/tp of the step's images and, from `begin` on, 1/(tp*pp) of the
next; together at most `parallel.vision_ahead_mib`. Micro-batches beyond that are encoded in the schedule. On top comes
one round of messages (pp * `vision_batch` images) and, in the side stream's pool, one batch's activations.

Each rank holds a copy of the frozen towers, broadcast from the first pipeline rank after weights were loaded. How many
messages there are, and their sizes, follows from the image counts of the micro-batches, which all ranks of the group
know: a rank with fewer images pads.

Shapes: b images of a batch, S side of an image in pixels.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.config import ModelConfig, ParallelConfig
from megavl.data.feature_cache import FeatureCache
from megavl.data.microbatch import ImageShare, MicroBatch
from megavl.model.stage import Stage
from megavl.model.vision.tower import CLIP_MEAN, CLIP_STD, HALF, VisionTowers
from megavl.ops import PLAIN, Ops
from megavl.parallel.groups import Groups
from megavl.parallel.side_stream import SideStream


class AheadEncoder:
    """Encodes a step's images, as far as no trainable parameter has a part in it."""

    def __init__(
        self,
        towers: VisionTowers,
        model: ModelConfig,
        parallel: ParallelConfig,
        groups: Groups,
        *,
        frozen: Collection[str],
        cache: FeatureCache | None = None,
    ) -> None:
        """See `make_ahead_encoder`."""
        self.towers, self.frozen, self.groups, self.cache = towers, frozen, groups, cache
        self.batch = parallel.vision_batch
        self.dtype = next(towers.parameters()).dtype
        self.column = ImageShare(every=groups.tensor_size, first=groups.tensor_rank)
        """Images whose features this pipeline group's first rank needs."""
        self.own = own_images(groups)
        """Images that this rank encodes."""
        self.shapes = encoded_shapes(model, frozen)
        self.limit = images_ahead(model, parallel, frozen, self.dtype.itemsize)
        """Images of a step, from its first on, that are encoded here; micro-batches with a later one are not."""
        self.side = SideStream(groups.device)
        self._begun: tuple[Sequence[MicroBatch], dict[str, Tensor]] | None = None

    @torch.no_grad()
    def begin(self, micro_batches: Sequence[MicroBatch], mark: AbstractContextManager[None] | None = None) -> None:
        """Encode this rank's own images of a step that is still to come: no collective, and no neighbour is waited for.

        On CUDA this only launches kernels, on the side stream; with a cache the host waits for what is read or written.

        Args:
            micro_batches: those that the encoder will be called with.
            mark: entered where the work is done, to time it.
        """
        ahead = self._ahead(micro_batches)
        pixels = [image for b in ahead if self.own.of(b) for image in b.pixels_of(self.own)]
        images = sum(len(self.column.of(b)) for b in ahead)
        most = -(-images // self.groups.pipeline_size)  # of one rank: that of the first, as images are dealt in turn
        with self.side.block(), mark or nullcontext():
            own = {
                k: torch.empty(most, *s, dtype=self.dtype, device=self.groups.device) for k, s in self.shapes.items()
            }
            for start in range(0, len(pixels), self.batch):
                for kind, features in self._encode(pixels[start : start + self.batch]).items():
                    own[kind][start : start + len(features)] = features
        self._begun = micro_batches, own

    @torch.no_grad()
    def __call__(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Encode the images of a step, or take what was begun; all ranks of a model-parallel group must call it.

        Args:
            micro_batches: of one data-parallel rank, all of the step, in order; pixels may be on the host.

        Returns:
            The same, with `encoded` filled in on the first stage as far as `vision_ahead_mib` reaches.

        Raises:
            ValueError: pixels that this rank should encode were not loaded.
        """
        ahead = self._ahead(micro_batches)
        counts = [len(self.column.of(b)) for b in ahead]
        features = self._gather(self._take(micro_batches), sum(counts))
        if not self.groups.is_first_stage or not any(b.num_images for b in ahead):
            return list(micro_batches)
        parts = {kind: of_all.split(counts) for kind, of_all in features.items()}
        encoded = [{kind: part[index] for kind, part in parts.items()} for index in range(len(ahead))]
        with_features = [self._with_features(b, e) for b, e in zip(ahead, encoded, strict=True)]
        return [*with_features, *micro_batches[len(ahead) :]]

    def _ahead(self, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """The micro-batches of a step that lie within the limit."""
        counted = accumulate((b.num_images for b in micro_batches), initial=0)
        assert all(b.images_before == c for b, c in zip(micro_batches, counted, strict=False)), "not a whole step"
        return [b for b in micro_batches if b.images_before + b.num_images <= self.limit]

    def _take(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """This rank's own features, [most, ...] by kind, begun for these very micro-batches or made now."""
        if self._begun is None or self._begun[0] is not micro_batches:
            self.begin(micro_batches)
        assert self._begun is not None
        (_, own), self._begun = self._begun, None
        self.side.hand_over(own.values())
        return own

    def _with_features(self, batch: MicroBatch, encoded: dict[str, Tensor]) -> MicroBatch:
        """`batch` with `encoded`, without pixels that nobody will read."""
        return replace(batch, encoded=encoded, pixels=batch.pixels if self.towers.needs_pixels(encoded) else None)

    def _encode(self, pixels: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is frozen, [b, ...] by kind, of b images uint8 [3, S, S]."""
        if self.cache is None:
            return self._compute(pixels)
        return self.cache.encode(torch.stack(list(pixels)), self._compute, self.groups.device)

    def _compute(self, pixels: Iterable[Tensor]) -> dict[str, Tensor]:
        # One by one: each lies in pinned memory, a stack of them would not, and copying that waits for the stream.
        images = torch.stack([image.to(self.groups.device, non_blocking=True) for image in pixels])
        return self.towers.encode_frozen(images.float() / 255, self.frozen)

    def _gather(self, own: dict[str, Tensor], images: int) -> dict[str, Tensor]:
        """Features of the pipeline group's `images` images in order, [images, ...] by kind, on its first rank."""
        group, first = self.groups.pg.pp, self.groups.is_first_stage
        if group.size() == 1:
            return own
        gathered = {}
        for kind, features in own.items():
            in_turn = features.new_empty(len(features), group.size(), *features.shape[1:]) if first else None
            for start in range(0, len(features), self.batch):
                sent = features[start : start + self.batch]
                received = sent.new_empty(group.size(), *sent.shape) if first else None
                dist.gather(sent, None if received is None else list(received), group=group, group_dst=0)
                if in_turn is not None and received is not None:
                    in_turn[start : start + len(sent)] = received.transpose(0, 1)
            if in_turn is not None:
                gathered[kind] = in_turn.flatten(0, 1)[:images]
        return gathered


def make_ahead_encoder(
    stages: Sequence[Stage],
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: Groups,
    *,
    frozen: Collection[str],
    ops: Ops = PLAIN,
) -> AheadEncoder | None:
    """The encoder of this rank; all ranks must call it, after weights were loaded.

    Args:
        stages: this rank's chunks.
        model: sizes.
        parallel: layout.
        groups: this rank's groups.
        frozen: parts of the model that the training stage does not train, as `Stage.component_of` names them.
        ops: fused operators.

    Returns:
        None where nothing runs ahead: under another placement, or where no tower is frozen.

    Raises:
        ValueError: `parallel.vision_cache` cannot be made.
    """
    if parallel.vision != "split_model" or not encoded_shapes(model, frozen):
        return None
    first_stage = stages[0].first_stage
    if first_stage is not None:
        towers = first_stage.towers
    else:
        with torch.device("meta"):  # nothing is drawn, values come from the first stage
            towers = VisionTowers(model, ops=ops)
        if "siglip" not in frozen:
            del towers.siglip  # trained on the first stage only
        towers = towers.to(stages[0].config.params_dtype).to_empty(device=groups.device).requires_grad_(False)
        if parallel.compile_vision:  # those of the first stage are compiled already
            towers.compile_frozen()
    for name, parameter in towers.named_parameters():
        if Stage.component_of(f"first_stage.towers.{name}") in frozen and groups.pipeline_size > 1:
            dist.broadcast(parameter.data, group_src=0, group=groups.pg.pp)
    cache = None
    if parallel.vision_cache:
        limit = int(parallel.vision_cache_gib * 2**30)
        cache = FeatureCache(Path(parallel.vision_cache), limit, fingerprint(towers, model, frozen))
    return AheadEncoder(towers, model, parallel, groups, frozen=frozen, cache=cache)


def fingerprint(towers: VisionTowers, model: ModelConfig, frozen: Collection[str]) -> str:
    """A hash of what `encode_frozen` depends on beside pixels: sizes, normalisation, weights and their type, device."""
    constants = (sorted(encoded_shapes(model, frozen)), model.siglip, model.sam, CLIP_MEAN, CLIP_STD, HALF)
    total = hashlib.blake2b(repr(constants).encode(), digest_size=20)
    for name, parameter in towers.named_parameters():
        if Stage.component_of(f"first_stage.towers.{name}") in frozen:
            total.update(f"{name} {parameter.dtype} {parameter.device.type}".encode())
            total.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()


def own_images(groups: Groups) -> ImageShare:
    """The images of a step that this rank encodes ahead."""
    place = groups.tensor_rank + groups.tensor_size * groups.pipeline_rank
    return ImageShare(every=groups.tensor_size * groups.pipeline_size, first=place)


def encoded_bytes(model: ModelConfig, frozen: Collection[str], element: int) -> int:
    """Bytes of an image's features, of `element` bytes a number."""
    return sum(math.prod(shape) for shape in encoded_shapes(model, frozen).values()) * element


def images_ahead(model: ModelConfig, parallel: ParallelConfig, frozen: Collection[str], element: int) -> int:
    """Images of a step, from its first on, for which `parallel.vision_ahead_mib` has room: n on each of tp * pp ranks.

    A first-stage rank holds most: pp * n features of the step in hand and n of its own of the next.
    """
    per_image = encoded_bytes(model, frozen, element)
    each = (parallel.vision_ahead_mib << 20) // (per_image * (parallel.pipeline + 1)) if per_image else 0
    return each * parallel.tensor * parallel.pipeline


def encoded_shapes(model: ModelConfig, frozen: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Kind -> shape per image of what `VisionTowers.encode_frozen` returns."""
    shapes: dict[str, tuple[int, ...]] = {}
    if model.sam is not None and "sam" in frozen:
        shapes["neck"] = (model.sam.neck, model.sam.grid, model.sam.grid)
        shapes["branch"] = (model.sam.grid, model.sam.grid, model.sam.width)
    if "siglip" in frozen:
        shapes["siglip"] = (model.siglip.grid**2, model.siglip.width)
    return shapes
