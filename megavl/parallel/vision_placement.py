"""Who encodes the images: `parallel.vision`.

In: the layout and this rank's groups. Out: what `FirstStage` and the loader need to know of it.

- `replicate`: every tensor rank of the first stage encodes every image.
- `split_tensor`: image k of a step (counted over the micro-batches of a data-parallel rank) is encoded by tensor rank
  k % tp. Each rank puts its images through towers *and* adaptor, and the features that fill the sequence are gathered:
  p*h numbers an image, 4.7 MB for the 7B in bf16 (p 576, h 4096), and as much back in the backward pass.
- `split_model`: the same division of adaptor and trained towers; what is frozen of the towers has run on all tensor and
  pipeline ranks before the step's schedule began (`megavl/parallel/vision_ahead.py`).

Which collectives run, and their sizes, follows from the number of images in the micro-batch, which every tensor rank
knows: a rank without an image of its own pads like any other and takes part, so nobody waits in vain.

Shapes: i images of a micro-batch, c the most that one tensor rank has of them, p positions per image, h hidden.
"""

from collections.abc import Collection, Sequence

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megavl.config import ModelConfig, ParallelConfig
from megavl.data.microbatch import EVERY_IMAGE, ImageShare, MicroBatch, PixelRule
from megavl.model.stage import Stage
from megavl.parallel.groups import Groups
from megavl.parallel.vision_ahead import images_ahead, own_images


class TensorGroupImages:
    """`SharedImages` of the first stage: the images of a micro-batch dealt to the tensor ranks one by one."""

    def __init__(self, tp_group: ProcessGroup) -> None:
        self.tp_group = tp_group
        self.share = ImageShare(every=tp_group.size(), first=tp_group.rank())

    def join(self, features: Tensor, batch: MicroBatch) -> Tensor:
        """Gather the features of all shares.

        The backward pass is a reduce-scatter. Every rank has the full gradient of all features, so each gets tp times
        the gradient of its share; `parallel/gradients.py` averages over the tensor group what follows from that.

        Args:
            features: of this rank's images, [0 to c, p, h]; needs a gradient on all ranks of the group or on none.
            batch: the micro-batch, the same on all of them.

        Returns:
            [i, p, h] in reading order.
        """
        size, images = self.share.every, batch.num_images
        most = -(-images // size)
        padded = functional.pad(features, (0, 0, 0, 0, 0, most - features.shape[0]))  # [c, p, h]
        gathered = gather_from_sequence_parallel_region(padded, group=self.tp_group)  # [tp*c, p, h]
        by_rank = gathered.unflatten(0, (size, most))
        # The first image of the micro-batch belongs to this rank; from there on in turn.
        by_turn = by_rank.roll(-(batch.images_before % size), 0).transpose(0, 1)  # [c, tp, p, h]
        return by_turn.flatten(0, 1)[:images]


def place_vision(stages: Sequence[Stage], parallel: ParallelConfig, groups: Groups) -> None:
    """Hand the first stage, if it is on this rank, its part of the images."""
    for stage in stages:
        if stage.first_stage is not None and parallel.vision != "replicate":
            stage.first_stage.shared_images = TensorGroupImages(groups.pg.tp)


def pixel_rule(
    model: ModelConfig, parallel: ParallelConfig, groups: Groups, *, frozen: Collection[str], dtype: torch.dtype
) -> PixelRule:
    """The images of a training step that this rank decodes; of each data-parallel copy one rank answers for each.

    Under `split_model` the first stage reads the pixels of its column (as in `split_tensor`) for what runs in the
    schedule: micro-batches beyond the limit, and all of them where a tower is trained.

    Args:
        model: sizes.
        parallel: layout.
        groups: this rank's groups.
        frozen: parts of the model that the training stage does not train.
        dtype: of the parameters.
    """
    first = groups.is_first_stage
    if parallel.vision == "replicate":
        return PixelRule(rest=EVERY_IMAGE if first else None, answers=first and groups.tensor_rank == 0)
    column = ImageShare(every=groups.tensor_size, first=groups.tensor_rank) if first else None
    if parallel.vision == "split_tensor":
        return PixelRule(rest=column, answers=first)
    trained = "siglip" not in frozen or (model.sam is not None and "sam" not in frozen)
    return PixelRule(
        rest=column,
        ahead=column if first and trained else own_images(groups),
        limit=images_ahead(model, parallel, frozen, dtype.itemsize),
        answers=first or not trained,
    )
