"""What one micro-batch costs on one rank: operations and seconds of every part of the model, forward and backward.

In: a `Case` (sizes, training stage, layout, kernels, machine) and what the micro-batch holds. Out: `PartCost` by part,
and the seconds of each pipeline stage. All operation counts come from `megavl/training/flops.py`; here they become
time. A part takes its measured rate where the machine was calibrated; otherwise matrix products run at the assumed rate
and what only moves memory is added in bytes.

The parts: `sam` (backbone and frozen neck), `sam_adaptor` (its side branch and stride-2 convolutions), `siglip`,
`aligner`, `embedding`, `layer` (one decoder layer), `head` (products of the output head), `loss`.
Work is counted in operations; that of `embedding` in elements written, that of `loss` in logits.
"""

from dataclasses import dataclass, field

from megavl.config import KernelsConfig, ModelConfig, ParallelConfig, SamConfig
from megavl.model.layer_split import split_layers
from megavl.parallel import vision_ahead
from megavl.parallel.vision_ahead import encoded_bytes
from megavl.planning.hardware import Hardware
from megavl.training.flops import StepCounts, Terms, decoder_flops, image_flops
from megavl.training.freeze import TRAINED

VISION = ("sam", "sam_adaptor", "siglip", "aligner")
"""Parts of the first stage that are paid per image."""
TOWERS = ("sam", "siglip")
"""Parts that may run ahead of the pipeline while they are frozen."""

LOSS_BYTES = {True: 10.25, False: 73.0}
"""Fused or not -> bytes that head and loss move per logit beside the products, both passes: an estimate, 1.0 and 7.1 ms
for 4096 x 102400 logits at 4.3 TB/s."""
EAGER_SCORE_BYTES = 16.7
"""Bytes per score that SAM's attention moves in plain PyTorch: an estimate, 3.5 ms an image at 4.3 TB/s."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a plan is made for."""

    model: ModelConfig
    """Sizes."""
    stage: int
    """Training stage, for the freeze table."""
    parallel: ParallelConfig
    """Layout."""
    hardware: Hardware
    """Machine."""
    dtype: str = "bf16"
    """Compute type, `bf16` or `fp32`."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """Which operators are fused."""

    @property
    def trained(self) -> frozenset[str]:
        """Components that the training stage trains."""
        return frozenset(name for name, trains in TRAINED[self.stage].items() if trains)

    @property
    def element(self) -> int:
        """Bytes of a parameter or an activation."""
        return 2 if self.dtype == "bf16" else 4

    def fused(self, operator: str) -> bool:
        """Whether an operator of `KernelsConfig` is computed by its kernel."""
        choice = getattr(self.kernels, operator)
        return choice == "triton" or (choice == "auto" and self.hardware.gpu)


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """One part, one micro-batch, one rank of the tensor group."""

    forward_work: float
    """Operations of the forward pass (file docstring)."""
    backward_work: float
    """Operations of the backward pass, recomputation included."""
    forward_s: float
    """Seconds."""
    backward_s: float
    """Seconds."""


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds of one micro-batch on every pipeline stage, in pipeline order."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    transfer: float
    """Seconds that hidden states, or their gradients, take to the next stage."""

    @property
    def both(self) -> tuple[float, ...]:
        """Forward and backward together."""
        return tuple(f + b for f, b in zip(self.forward, self.backward, strict=True))


def part_costs(case: Case, counts: StepCounts) -> dict[str, PartCost]:
    """Cost of every part for one micro-batch.

    Args:
        case: the setting.
        counts: of one micro-batch; `images` are those whose features its rows hold.
    """
    costs = {}
    for name, (forward, both) in _vision_work(case).items():
        images = images_of_a_rank(case, counts.images)
        seconds = images * _sam_memory_s(case) if name == "sam" else 0.0
        again = forward if name == "siglip" and case.parallel.recompute_vision and both > forward else 0.0
        costs[name] = _cost(case, name, images * forward, images * (both - forward + again), seconds)
    costs.update(_decoder_costs(case, counts))
    return costs


def stage_times(case: Case, counts: StepCounts) -> StageTimes:
    """Seconds of one micro-batch on every pipeline stage."""
    pieces, split = stage_pieces(case, counts), split_layers(case.model.decoder.layers, case.parallel)
    directions = []
    for direction in (0, 1):
        seconds = [layers * pieces["layer"][direction] for layers in split]
        seconds[0] += pieces["first"][direction]
        seconds[-1] += pieces["last"][direction]
        directions.append(tuple(seconds))
    return StageTimes(forward=directions[0], backward=directions[1], transfer=transfer_s(case, counts.tokens))


def stage_pieces(case: Case, counts: StepCounts) -> dict[str, tuple[float, float]]:
    """Seconds, (forward, backward), of what stages are made of.

    They are one decoder `layer`, what the `first` stage has besides, and what the `last` one has.
    """
    costs, ahead = part_costs(case, counts), ahead_parts(case)
    parts = {
        "layer": ["layer"],
        "first": [name for name in (*VISION, "embedding") if name in costs and name not in ahead],
        "last": ["head", "loss"],
    }
    return {
        piece: (sum(costs[n].forward_s for n in names), sum(costs[n].backward_s for n in names))
        for piece, names in parts.items()
    }


def ahead_parts(case: Case) -> tuple[str, ...]:
    """Parts that leave the pipeline schedule under `split_model`: the towers that are frozen."""
    if str(case.parallel.vision) != "split_model":
        return ()
    return tuple(name for name in TOWERS if name not in case.trained)


def ahead_s(case: Case, images: int) -> float:
    """Seconds before the schedule in which every rank encodes its share of the step's images.

    Args:
        case: the setting.
        images: of one data-parallel rank in one step.
    """
    if not ahead_parts(case) or not images:
        return 0.0
    parallel = case.parallel
    share = -(-images // (parallel.tensor * parallel.pipeline))
    forward = {name: work for name, (work, _) in _vision_work(case).items()}
    towers = sum(_cost(case, n, forward[n], 0.0, 0.0).forward_s for n in ahead_parts(case) if n in forward)
    memory = _sam_memory_s(case) if "sam" in ahead_parts(case) else 0.0
    # The first pipeline rank takes in what the others made, a message of each after every pass of the towers.
    sent = (parallel.pipeline - 1) * share * ahead_bytes(case) / case.hardware.link(2 * parallel.tensor)
    rounds = -(-share // parallel.vision_batch) if parallel.pipeline > 1 else 0
    return share * (towers + memory) + sent + rounds * case.hardware.latency_s


def ahead_bytes(case: Case) -> int:
    """Bytes of an image's features that run ahead."""
    return encoded_bytes(case.model, ahead_parts(case), case.element)


def images_ahead(case: Case, images: int) -> int:
    """Of a step's images on one data-parallel rank, those for whose features there is room, about."""
    if not ahead_bytes(case):
        return 0
    return min(images, vision_ahead.images_ahead(case.model, case.parallel, ahead_parts(case), case.element))


def images_of_a_rank(case: Case, images: int) -> int:
    """Images that one tensor rank of the first stage computes in a micro-batch, by vision placement."""
    return images if str(case.parallel.vision) == "replicate" else -(-images // case.parallel.tensor)


def transfer_s(case: Case, tokens: int) -> float:
    """Seconds that the hidden states of one micro-batch take to the next pipeline rank."""
    parallel = case.parallel
    if parallel.pipeline == 1:
        return 0.0
    cut = parallel.tensor if parallel.sequence else 1
    size = tokens * case.model.decoder.hidden * case.element / cut
    # Neighbours in the pipeline are tensor * data ranks apart, which is another node but on small runs.
    return size / case.hardware.link(2 * parallel.tensor) + case.hardware.latency_s


def all_reduce_s(hardware: Hardware, size: float, ranks: int, span: int | None = None) -> float:
    """Seconds of a ring all-reduce of `size` bytes over `ranks` ranks that span `span` neighbouring ones."""
    if ranks == 1 or not size:
        return 0.0
    return 2 * (ranks - 1) / ranks * size / hardware.link(span or ranks) + hardware.latency_s


def _vision_work(case: Case) -> dict[str, tuple[float, float]]:
    """Part -> operations of one image, (forward, forward and backward)."""
    forward = _group(image_flops(case.model, (), padded_windows=True))
    both = _group(image_flops(case.model, case.trained, padded_windows=True))
    return {name: (forward[name], both[name]) for name in forward}


def _group(terms: Terms) -> Terms:
    """The terms of an image by part."""
    parts = {"sam": ("sam", "sam neck"), "siglip": ("siglip",), "aligner": ("aligner",)}
    parts["sam_adaptor"] = ("sam neck_hd", "sam convolutions", "sam_hd convolutions")
    grouped = {part: sum(terms[name] for name in names if name in terms) for part, names in parts.items()}
    return {part: value for part, value in grouped.items() if value}


def _sam_memory_s(case: Case) -> float:
    """Seconds an image's attention scores spend in memory where SAM's attention is plain PyTorch."""
    sam = case.model.sam
    if sam is None or case.fused("sam_attention") or "sam" in case.hardware.measured:
        return 0.0
    return EAGER_SCORE_BYTES * sam_scores(sam) / case.hardware.bandwidth


def sam_scores(sam: SamConfig) -> int:
    """Attention scores of one image over all of SAM's blocks."""
    windows = (-(-sam.grid // sam.window)) ** 2
    whole = len(sam.global_layers)
    return sam.heads * (whole * sam.grid**4 + (sam.layers - whole) * windows * sam.window**4)


def _decoder_costs(case: Case, counts: StepCounts) -> dict[str, PartCost]:
    decoder, tensor, trained = case.model.decoder, case.parallel.tensor, "decoder" in case.trained
    forward = decoder_flops(decoder, counts, trained=False, passes=False)
    both = decoder_flops(decoder, counts, trained=trained, passes=bool(case.trained))
    layer, attention = forward["decoder"] / decoder.layers, forward["attention"] / decoder.layers
    again = {"none": 0.0, "selective": attention, "full": layer + attention}[case.parallel.recompute]
    per_layer = (both["decoder"] + both["attention"]) / decoder.layers
    elements = counts.tokens * decoder.hidden
    logits = counts.logits * decoder.vocab / tensor
    moved = logits * LOSS_BYTES[case.fused("linear_cross_entropy")] / 2 / case.hardware.bandwidth
    # Two collectives over the tensor group in a layer's forward pass, two in its backward pass; `full` repeats two.
    shared = 2 * all_reduce_s(case.hardware, elements * case.element, tensor)
    repeated = shared if case.parallel.recompute == "full" else 0.0
    forward_work, backward_work = (layer + attention) / tensor, (per_layer - layer - attention + again) / tensor
    return {
        "embedding": _cost(case, "embedding", elements, elements * trained),
        "layer": _cost(case, "layer", forward_work, backward_work, shared, shared + repeated),
        "head": _cost(case, "head", forward["head"] / tensor, (both["head"] - forward["head"]) / tensor),
        "loss": PartCost(forward_work=logits, backward_work=logits, forward_s=moved, backward_s=moved)
        if "head" not in case.hardware.measured  # a measured head includes its loss
        else PartCost(forward_work=logits, backward_work=logits, forward_s=0.0, backward_s=0.0),
    }


def _cost(
    case: Case, part: str, forward: float, backward: float, more_forward: float = 0.0, more_backward: float = 0.0
) -> PartCost:
    """Work to seconds, by the measured rate or the assumed one, with what comes on top of either."""
    hardware = case.hardware
    rate = hardware.measured.get(part)
    if rate is not None:
        forward_s, backward_s = forward / rate.forward, backward / rate.backward
    elif part == "embedding":
        forward_s, backward_s = (2 * case.element * work / hardware.bandwidth for work in (forward, backward))
    else:
        forward_s, backward_s = (work / hardware.flops(case.dtype) for work in (forward, backward))  # type: ignore[arg-type]
    return PartCost(
        forward_work=forward,
        backward_work=backward,
        forward_s=forward_s + more_forward,
        backward_s=backward_s + more_backward,
    )
