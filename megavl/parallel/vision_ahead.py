"""Frozen towers that run on every tensor and pipeline rank before the schedule of a step (`vision = split_model`).

In: the micro-batches of a step. Out: the same, on the first stage with the frozen towers' outputs for the images of
this tensor rank; what is trained behind them runs in the schedule as in `split_tensor`.

Image k of the step is encoded by tensor rank k % tp, as in `split_tensor`, of pipeline rank (k // tp) % pp, in batches
of `parallel.vision_batch` images. The ranks of one pipeline group send what they made to its first rank, which needs
just that: per image SAM's neck map [k, g, g] and first global block's output [g, g, c], and where SigLIP is frozen its
features [p, c_low]; for the 7B in bf16 2.1 + 6.3 + 1.2 = 9.6 MB. Held at once on a first-stage rank: 1/tp of the step's
images, at most `parallel.vision_ahead_mib`; micro-batches beyond that are encoded in the schedule.

Each rank holds a copy of the frozen towers, broadcast from the first pipeline rank after weights were loaded. How many
messages there are, and their sizes, follows from the image counts of the micro-batches, which all ranks of the group
know: a rank with fewer images pads.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
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
        place = groups.tensor_rank + groups.tensor_size * groups.pipeline_rank
        self.own = ImageShare(every=groups.tensor_size * groups.pipeline_size, first=place)
        """Images that this rank encodes."""
        self.shapes = encoded_shapes(model, frozen)
        per_image = sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize
        self.limit = (parallel.vision_ahead_mib << 20) // per_image
        """Images that a first-stage rank may hold."""

    @torch.no_grad()
    def __call__(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Encode the images of a step; all ranks of a model-parallel group must call it.

        Args:
            micro_batches: of one data-parallel rank, all of the step, in order; pixels may be on the host.

        Returns:
            The same, with `encoded` filled in on the first stage as far as `vision_ahead_mib` reaches.

        Raises:
            ValueError: pixels that this rank should encode were not loaded.
        """
        counted = accumulate((b.num_images for b in micro_batches), initial=0)
        assert all(b.images_before == c for b, c in zip(micro_batches, counted, strict=False)), "not a whole step"
        within = [-(-(b.images_before + b.num_images) // self.column.every) <= self.limit for b in micro_batches]
        ahead, rest = micro_batches[: sum(within)], micro_batches[sum(within) :]
        counts = [len(self.column.of(b)) for b in ahead]
        features = self._collect(ahead, sum(counts))
        if not self.groups.is_first_stage or not any(b.num_images for b in ahead):
            return list(micro_batches)
        parts = {kind: of_all.split(counts) for kind, of_all in features.items()}
        encoded = [{kind: part[index] for kind, part in parts.items()} for index in range(len(ahead))]
        return [*(self._with_features(b, e) for b, e in zip(ahead, encoded, strict=True)), *rest]

    def _with_features(self, batch: MicroBatch, encoded: dict[str, Tensor]) -> MicroBatch:
        """`batch` with `encoded`, without pixels that nobody will read."""
        return replace(batch, encoded=encoded, pixels=batch.pixels if self.towers.needs_pixels(encoded) else None)

    def _collect(self, ahead: Sequence[MicroBatch], images: int) -> dict[str, Tensor]:
        """Features of the pipeline group's `images` images in order, [images, ...] by kind, on its first rank."""
        pixels = [b.pixels_of(self.own) for b in ahead if self.own.of(b)]
        own = torch.cat(pixels) if pixels else torch.empty(0)
        most = -(-images // self.groups.pipeline_size)  # of one rank: that of the first, as images are dealt in turn
        rounds = []
        for start in range(0, most, self.batch):
            size = min(self.batch, most - start)
            rounds.append(self._gather(self._encode(own[start : start + size]), size))
        return {kind: torch.cat([r[kind] for r in rounds])[:images] for kind in (rounds[0] if rounds else ())}

    def _encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """What is frozen, [b, ...] by kind, of pixels uint8 [b, 3, S, S]; b may be 0."""
        device = self.groups.device
        if not len(pixels):
            return {k: torch.empty(0, *s, dtype=self.dtype, device=device) for k, s in self.shapes.items()}
        return self._compute(pixels) if self.cache is None else self.cache.encode(pixels, self._compute, device)

    def _compute(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.towers.encode_frozen(pixels.to(self.groups.device, non_blocking=True).float() / 255, self.frozen)

    def _gather(self, features: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """Features of the ranks of the pipeline group in turn, [pp * size, ...] by kind, on the first; else nothing."""
        group, first = self.groups.pg.pp, self.groups.is_first_stage
        if group.size() == 1:
            return features
        gathered = {}
        for kind, shape in self.shapes.items():
            own = features[kind].new_zeros(size, *shape)
            own[: len(features[kind])] = features[kind]
            received = own.new_empty(group.size(), size, *shape) if first else None
            dist.gather(own, None if received is None else list(received), group=group, group_dst=0)
            if received is not None:
                gathered[kind] = received.transpose(0, 1).flatten(0, 1)
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


def encoded_shapes(model: ModelConfig, frozen: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Kind -> shape per image of what `VisionTowers.encode_frozen` returns."""
    shapes: dict[str, tuple[int, ...]] = {}
    if model.sam is not None and "sam" in frozen:
        shapes["neck"] = (model.sam.neck, model.sam.grid, model.sam.grid)
        shapes["branch"] = (model.sam.grid, model.sam.grid, model.sam.width)
    if "siglip" in frozen:
        shapes["siglip"] = (model.siglip.grid**2, model.siglip.width)
    return shapes
