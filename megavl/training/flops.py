"""Model FLOPs of a step, and what fraction of the hardware's peak that is (MFU).

In: sizes, which components are trained, what the step holds. Out: floating-point operations of its forward and backward
passes, term by term.

Counted: matrix products, convolutions and attention. Not counted: recomputation, padding tokens, padding of windows
(except with `padded_windows`), what an implementation adds of its own (SAM's relative positions folded into the score
product), embedding look-ups, norms and other element-wise work. Causal attention counts at half,
packed documents by the sum of their squared lengths.

A product costs as many forward passes as it has matrix products in training: 1, one more if its input needs a gradient,
one more if its weight does. So: 1 frozen with nothing trained before it; 2 frozen but passing gradients on, or trained
with an input that needs none; 3 otherwise. Attention scores have no weights: 3 wherever gradients pass, else 1.

The terms are those of a matrix product [m, k] x [k, n]: 2*m*k*n.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megavl.config import DecoderConfig, ModelConfig, ParallelConfig, SamConfig, SiglipConfig

PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 operations per second by a part of the device's name (vendor data sheets, SXM; the A100 also as PCIe)."""

Terms = dict[str, float]
"""Floating-point operations by name of the part."""


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What decides the cost of a step; sums over all micro-batches and data-parallel ranks."""

    images: int
    """Images encoded."""
    tokens: int
    """Tokens of the decoder, padding excluded."""
    squared_lengths: int
    """Sum over documents of their squared length (attention stays within a document)."""
    logits: int
    """Positions for which the head is computed."""


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 operations per second of a device, or None if it is not in the table.

    H100 variants other than SXM run slower and are left out rather than guessed.
    """
    if ("PCIe" in device_name and "H100" in device_name) or "NVL" in device_name:
        return None
    return next((peak for part, peak in PEAK_BF16.items() if part in device_name), None)


def step_flops(model: ModelConfig, trained: Collection[str], counts: StepCounts) -> Terms:
    """Operations of one step, forward and backward.

    Args:
        model: sizes.
        trained: names of the trained components (sam, sam_adaptor, siglip, aligner, decoder); empty: as a forward
            pass that keeps no gradients.
        counts: what the step holds.
    """
    image = image_flops(model, trained) if counts.images else {}
    terms = {name: counts.images * value for name, value in image.items()}
    # With a frozen decoder the gradients of the image features still pass through it.
    terms.update(decoder_flops(model.decoder, counts, trained="decoder" in trained, passes=bool(trained)))
    return terms


def hardware_flops(model: ModelConfig, trained: Collection[str], counts: StepCounts, parallel: ParallelConfig) -> Terms:
    """Operations that all ranks together carry out in one step.

    Beside those of the model: padding tokens, windows padded to their size, layers and attention that are computed
    again in the backward pass, and images that several tensor ranks encode. On the other hand SAM's two paths pass the
    stride-2 convolutions together. Attention counts at half, as kernels skip the masked half; what a kernel computes
    again within itself is not counted.

    Args:
        model: sizes.
        trained: names of the trained components.
        counts: what the step holds, padding included.
        parallel: recomputation and vision placement.
    """
    image = image_flops(model, trained, padded_windows=True) if counts.images else {}
    image.pop("sam convolutions", None)  # both paths are added before the convolutions, which cost the hd path's share
    copies = parallel.tensor if parallel.vision == "replicate" else 1
    if image and parallel.recompute_vision and "siglip" in trained:
        tower = model.siglip
        # torch stops a block's recomputation at the last tensor that is needed: before its last product.
        image["siglip"] += _siglip_blocks(tower) - tower.layers * 2.0 * tower.grid**2 * tower.width * tower.mlp
    terms = {name: counts.images * copies * value for name, value in image.items()}
    decoder = decoder_flops(model.decoder, counts, trained="decoder" in trained, passes=bool(trained))
    once = decoder_flops(model.decoder, counts, trained=False, passes=False)
    again = {"none": (), "selective": ("attention",), "full": ("decoder", "attention")}[parallel.recompute]
    for name in again if trained else ():
        decoder[name] += once[name]
    return terms | decoder


def image_flops(model: ModelConfig, trained: Collection[str], *, padded_windows: bool = False) -> Terms:
    """Operations of one image through towers and adaptor, forward and backward.

    Args:
        model: sizes.
        trained: names of the trained components.
        padded_windows: count what the hardware computes: SAM pads its grid to whole windows.
    """
    terms: Terms = {}
    if model.sam is not None:
        terms.update(_sam(model.sam, trained, padded_windows))
    terms["siglip"] = _siglip(model.siglip, "siglip" in trained)
    terms["aligner"] = _aligner(model, trained)
    return terms


def decoder_flops(decoder: DecoderConfig, counts: StepCounts, *, trained: bool, passes: bool) -> Terms:
    """Operations of the decoder and its head.

    Args:
        decoder: sizes.
        counts: tokens, squared lengths and head positions.
        trained: whether its weights are.
        passes: whether gradients pass through it (always if it is trained).
    """
    hidden, layers = decoder.hidden, decoder.layers
    key_value = hidden // decoder.heads * decoder.kv_heads
    per_token = 2 * (2 * hidden * hidden + 2 * hidden * key_value) + 6 * hidden * decoder.ffn
    times = _times(trained, trained or passes)
    return {
        "decoder": times * layers * per_token * counts.tokens,
        "attention": _times(False, trained or passes, attention=True) * 2.0 * layers * hidden * counts.squared_lengths,
        "head": times * 2.0 * hidden * decoder.vocab * counts.logits,
    }


def _times(weight: bool, grad_in: bool, *, attention: bool = False) -> int:
    """Forward passes that a product costs (file docstring)."""
    return 1 + (2 * grad_in if attention else weight + grad_in)


def _siglip(tower: SiglipConfig, trained: bool) -> float:
    patches, width = tower.grid**2, tower.width
    embedding = 2.0 * patches * 3 * tower.patch_size**2 * width
    scores = tower.layers * 4.0 * patches**2 * width
    linear = _siglip_blocks(tower) - scores
    # Pixels need no gradient, so the patch embedding costs one product less.
    return (
        _times(trained, False) * embedding
        + _times(trained, trained) * linear
        + _times(trained, trained, attention=True) * scores
    )


def _siglip_blocks(tower: SiglipConfig) -> float:
    """All blocks, forward."""
    patches, width = tower.grid**2, tower.width
    return tower.layers * (2.0 * patches * (4 * width * width + 2 * width * tower.mlp) + 4.0 * patches**2 * width)


def _sam(tower: SamConfig, trained: Collection[str], padded_windows: bool) -> Terms:
    patches, neck = tower.grid**2, tower.neck
    backbone, branch = "sam" in trained, "sam_adaptor" in trained
    embedding = 2.0 * patches * 3 * tower.patch_size**2 * tower.width
    linear, scores = _sam_blocks(tower, padded_windows)
    first, second = 2.0 * patches * tower.width * neck, 2.0 * patches * 9 * neck * neck  # 1x1 and 3x3 convolution
    up = (tower.upsample // 2) ** 2, (tower.upsample // 4) ** 2  # positions after each stride-2 convolution
    conv = [
        2.0 * up[0] * 9 * neck * tower.downsample[0],
        2.0 * up[1] * 9 * tower.downsample[0] * tower.downsample[1],
    ]
    either = backbone or branch
    return {
        "sam": _times(backbone, False) * embedding
        + _times(backbone, backbone) * linear
        + _times(False, backbone, attention=True) * scores,
        "sam neck": _times(backbone, backbone) * (first + second),
        "sam neck_hd": _times(branch, backbone) * first + _times(branch, either) * second,
        "sam convolutions": _times(branch, backbone) * conv[0] + _times(branch, either) * conv[1],
        "sam_hd convolutions": _times(branch, either) * sum(conv),
    }


def _sam_blocks(tower: SamConfig, padded_windows: bool) -> tuple[float, float]:
    """(linear layers, attention with its relative positions) of all blocks, forward."""
    patches, width, window = tower.grid**2, tower.width, tower.window
    head = width // tower.heads
    windows = (-(-tower.grid // window)) ** 2
    local = tower.layers - len(tower.global_layers)
    inside = windows * window**2 if padded_windows else patches  # the attention's linear layers run inside the windows
    linear = 8.0 * width**2 * (local * inside + len(tower.global_layers) * patches)
    linear += 4.0 * tower.layers * patches * width * tower.mlp

    def scores(tokens: int, side: int) -> float:
        """Scores and weighted sum, and two relative-position products with `side` rows each."""
        return 4.0 * tokens**2 * width + 4.0 * tokens * side * head * tower.heads

    attention = local * windows * scores(window**2, window) + len(tower.global_layers) * scores(patches, tower.grid)
    return linear, attention


def _aligner(model: ModelConfig, trained: Collection[str]) -> float:
    """The adaptor's linear layers; which input needs a gradient depends on the branch."""
    positions, hidden, weight = model.siglip.grid**2, model.decoder.hidden, "aligner" in trained
    low_in = "siglip" in trained
    if model.sam is None:
        first = 2.0 * positions * model.siglip.width * hidden
        return _times(weight, low_in) * first + _times(weight, weight or low_in) * 2.0 * positions * hidden**2
    high_in = "sam" in trained or "sam_adaptor" in trained
    # Pooling halves the positions of the first layers but doubles both of their widths; a shared MLP makes the whole
    # hidden size out of each tower.
    share = hidden if model.adaptor in ("pool_w", "pool_h", "shared") else hidden / 2
    high, low = 2.0 * positions * model.sam.downsample[1] * share, 2.0 * positions * model.siglip.width * share
    second = 2.0 * positions * hidden**2
    if model.adaptor == "separate":  # two square layers of half the width
        last = (_times(weight, weight or high_in) + _times(weight, weight or low_in)) * second / 4
    else:
        last = _times(weight, weight or high_in or low_in) * second
    if model.adaptor == "shared":  # one layer on the joined features
        high_in = low_in = high_in or low_in
    return _times(weight, high_in) * high + _times(weight, low_in) * low + last
