"""Bytes on every pipeline rank: parameters, gradients, optimizer state, activations, and what is live for a moment.

In: a `Case`, what a micro-batch holds, how many there are, the data-parallel size. Out: one `RankMemory` per pipeline
rank (of each of its tensor ranks). The first three are exact: they are those of the model that gets built. Activations
follow what the layers keep for their backward pass; the working space is the largest of the short-lived tensors.

Per parameter: the weight in the compute type; where it is trained, an fp32 gradient, two fp32 moments and, in bf16, an
fp32 master weight; moments and master are cut over the data-parallel ranks by the distributed optimizer.
"""

import dataclasses
from dataclasses import dataclass

from megavl.config import DecoderConfig
from megavl.model.sizes import count_parameters
from megavl.parallel.stage_plan import StagePlace, stage_plan
from megavl.planning.costs import VISION, Case, ahead_bytes, ahead_parts, images_ahead, images_of_a_rank
from megavl.planning.hardware import GIB
from megavl.planning.schedule import peak_held
from megavl.training.flops import StepCounts

LOSS_ROWS = 1024
"""Rows of logits that the fused loss holds at a time, about."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    """Kept between forward and backward passes, all micro-batches in flight; on rank 0 features made ahead of them."""
    working: float
    """Short-lived: logits, attention scores of the towers."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))

    def largest(self) -> str:
        """What dominates, such as `optimizer 12.3 GiB`."""
        name = max((f.name for f in dataclasses.fields(self)), key=lambda n: getattr(self, n))
        return f"{name} {getattr(self, name) / GIB:.1f} GiB"


def rank_memory(case: Case, counts: StepCounts, *, micro_batches: int, data: int) -> list[RankMemory]:
    """Memory of every pipeline rank.

    Args:
        case: the setting.
        counts: of the micro-batch that takes most.
        micro_batches: of a step, on one data-parallel rank.
        data: data-parallel ranks.
    """
    places = stage_plan(case.model, case.parallel)
    return [
        _rank_memory(case, counts, places, rank, micro_batches=micro_batches, data=data)
        for rank in range(case.parallel.pipeline)
    ]


def activation_bytes(case: Case, place: StagePlace, counts: StepCounts) -> float:
    """What one stage keeps of one micro-batch for its backward pass."""
    if not case.trained:
        return 0.0
    kept = len(place.layers) * layer_bytes(case, counts.tokens)
    kept += vision_bytes(case, counts.images) if place.first else 0.0
    return kept + (head_bytes(case, counts) if place.last else 0.0)


def layer_bytes(case: Case, tokens: int) -> float:
    """What one decoder layer keeps of `tokens` tokens, on one tensor rank.

    Whole on every tensor rank, unless the sequence is cut: the input of each norm and its result. Cut by heads or by
    columns: query, key and value, rotated query and key, attended values, both halves of SwiGLU and their product.
    Frozen weights keep no inputs of their products.
    """
    decoder, parallel = case.model.decoder, case.parallel
    hidden, key_value = decoder.hidden, _key_value(decoder)
    whole = parallel.tensor if parallel.sequence else 1
    if parallel.recompute == "full":
        return tokens * case.element * hidden / whole
    trained = "decoder" in case.trained
    norms = 2 * hidden + 2 * hidden * trained + (0 if case.fused("rmsnorm") else 2 * _NORM_FP32 / case.element * hidden)
    rotated = 0 if parallel.recompute == "selective" else hidden + key_value
    attention = hidden + 2 * key_value + rotated + hidden
    feed_forward = (2 + trained + (not case.fused("swiglu"))) * decoder.ffn
    return tokens * case.element * (norms / whole + (attention + feed_forward) / parallel.tensor)


_NORM_FP32 = 8
"""Bytes per element that a norm of plain PyTorch keeps besides: its input in fp32, and that times the scale."""


def vision_bytes(case: Case, images: int) -> float:
    """What towers and adaptor keep of a micro-batch's images; frozen towers keep nothing."""
    model, trained = case.model, case.trained
    elements = 0.0
    if "siglip" in trained:
        tower = model.siglip
        per_layer = tower.width if case.parallel.recompute_vision else 8 * tower.width + 2 * tower.mlp
        elements += images_of_a_rank(case, images) * tower.layers * tower.grid**2 * per_layer
    if "sam_adaptor" in trained and model.sam is not None:
        sam = model.sam
        first, second = (sam.upsample // 2) ** 2 * sam.downsample[0], (sam.upsample // 4) ** 2 * sam.downsample[1]
        branch = sam.grid**2 * (sam.width + 4 * sam.neck)
        path = sam.upsample**2 * sam.neck + first + second
        elements += images_of_a_rank(case, images) * (branch + 2 * path)  # twice: so held to built models
    if "aligner" in trained:
        high = model.sam.downsample[1] if model.sam is not None else 0
        width = model.siglip.width + high + 3 * model.decoder.hidden
        elements += images_of_a_rank(case, images) * model.tokens_per_image * width
    return case.element * elements


def head_bytes(case: Case, counts: StepCounts) -> float:
    """What head and loss keep: the last norm's input and result, and without the fused loss the fp32 logits."""
    decoder, parallel = case.model.decoder, case.parallel
    whole = parallel.tensor if parallel.sequence else 1
    kept = 2.0 * counts.tokens * case.element * decoder.hidden / whole
    if case.fused("linear_cross_entropy"):
        return kept
    return kept + 4.0 * counts.logits * decoder.vocab / parallel.tensor


def _rank_memory(
    case: Case, counts: StepCounts, places: list[StagePlace], rank: int, *, micro_batches: int, data: int
) -> RankMemory:
    mine = [place for place in places if place.rank == rank]
    vision = count_parameters(case.model)
    held, trained = sum(place.parameters for place in mine), 0
    for place in mine:
        own = sum(vision[name] for name in VISION) if place.first else 0
        trained += (place.parameters - own) * ("decoder" in case.trained)
        trained += sum(vision[name] for name in VISION if name in case.trained) if place.first else 0
    if rank > 0:  # copies of the towers that run ahead of the pipeline
        held += sum(vision[name] for name in ahead_parts(case))
    state = 8 + (4 if case.dtype == "bf16" else 0)
    sizes = [activation_bytes(case, place, counts) for place in places]
    images = images_ahead(case, counts.images * micro_batches)
    tensor, pipeline = case.parallel.tensor, case.parallel.pipeline
    of_step = -(-images // tensor) if rank == 0 else 0
    features = (of_step + -(-images // (tensor * pipeline))) * ahead_bytes(case)  # of this step, and own of the next
    flights = min(micro_batches, 2 * len(places))  # more change nothing; a multiple of the pipeline where that is asked
    return RankMemory(
        parameters=case.element * held,
        gradients=4 * trained,
        optimizer=state * trained / (data if case.parallel.distributed_optimizer else 1),
        activations=features
        + peak_held(rank, case.parallel.pipeline, case.parallel.virtual_pipeline, [sizes] * flights),
        working=_working_bytes(case, counts, mine),
    )


def _working_bytes(case: Case, counts: StepCounts, mine: list[StagePlace]) -> float:
    """The largest of: a layer that is computed again, the images in SAM, the logits and their gradient."""
    parallel, sam = case.parallel, case.model.sam
    plain = dataclasses.replace(case, parallel=dataclasses.replace(parallel, recompute="none"))
    largest = layer_bytes(plain, counts.tokens)
    if sam is not None and counts.images and (mine[0].first or ahead_parts(case)):
        ahead = "sam" in ahead_parts(case)
        images = parallel.vision_batch if ahead else images_of_a_rank(case, counts.images)
        scores = 0 if case.fused("sam_attention") else 3 * sam.heads * sam.grid**4
        largest = max(largest, images * case.element * (scores + 10 * sam.grid**2 * sam.width))
    if mine[-1].last:
        fused = case.fused("linear_cross_entropy")
        rows = min(counts.logits, LOSS_ROWS) if fused else counts.logits
        largest = max(largest, rows * case.model.decoder.vocab / parallel.tensor * (4 + 2 * case.element))
    return largest


def _key_value(decoder: DecoderConfig) -> int:
    return decoder.hidden // decoder.heads * decoder.kv_heads
