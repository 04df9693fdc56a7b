"""The sizes as literals, and the closed-form parameter count of each component.

In: nothing. Out: `SIZES`, one `ModelConfig` per name. `1.3b` and `7b` are the released models; `1.3b_hybrid` is the
small decoder behind both towers; `tiny` and `tiny_hybrid` train on a laptop.
"""

from megavl.config import DecoderConfig, ModelConfig, SamConfig, SiglipConfig

CLIP_MEAN_COLOUR = (122, 116, 104)
"""int(255 * CLIP's mean colour): the padding of models with a high-resolution tower."""
GREY = (127, 127, 127)
"""int(255 * 0.5): the padding of models with SigLIP alone."""

_SIGLIP_LARGE = SiglipConfig(image_size=384, patch_size=16, width=1024, layers=24, heads=16, mlp=4096)
_SAM_BASE = SamConfig(
    image_size=1024,
    patch_size=16,
    width=768,
    layers=12,
    heads=12,
    mlp=3072,
    window=14,
    global_layers=(2, 5, 8, 11),
    neck=256,
    upsample=96,
    downsample=(512, 1024),
)
_SIGLIP_TINY = SiglipConfig(image_size=32, patch_size=8, width=64, layers=2, heads=4, mlp=256)
_SAM_TINY = SamConfig(
    image_size=64,
    patch_size=8,
    width=64,
    layers=4,
    heads=4,
    mlp=256,
    window=4,
    global_layers=(1, 3),
    neck=32,
    upsample=16,
    downsample=(64, 64),
)
_DECODER_TINY = DecoderConfig(
    layers=4, hidden=128, heads=4, kv_heads=4, ffn=352, vocab=1024, max_positions=2048, init_std=0.05
)
_DECODER_1B = DecoderConfig(layers=24, hidden=2048, heads=16, kv_heads=16, ffn=5632, vocab=102400)
_DECODER_7B = DecoderConfig(layers=30, hidden=4096, heads=32, kv_heads=32, ffn=11008, vocab=102400)

SIZES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(decoder=_DECODER_TINY, siglip=_SIGLIP_TINY, sam=None, adaptor="mlp_gelu", background=GREY),
    "tiny_hybrid": ModelConfig(
        decoder=_DECODER_TINY, siglip=_SIGLIP_TINY, sam=_SAM_TINY, adaptor="hybrid", background=CLIP_MEAN_COLOUR
    ),
    "1.3b": ModelConfig(decoder=_DECODER_1B, siglip=_SIGLIP_LARGE, sam=None, adaptor="mlp_gelu", background=GREY),
    "1.3b_hybrid": ModelConfig(
        decoder=_DECODER_1B, siglip=_SIGLIP_LARGE, sam=_SAM_BASE, adaptor="hybrid", background=CLIP_MEAN_COLOUR
    ),
    "7b": ModelConfig(
        decoder=_DECODER_7B, siglip=_SIGLIP_LARGE, sam=_SAM_BASE, adaptor="hybrid", background=CLIP_MEAN_COLOUR
    ),
}
"""Every size by name; a recipe may also write its own `ModelConfig`."""


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of each component, by arithmetic from the sizes alone.

    Args:
        model: any model.

    Returns:
        Counts by component of the freeze table: `sam` (backbone and neck), `sam_adaptor` (the stride-2 convolutions
        and the `neck_hd` branch), `siglip`, `aligner` (the adaptor proper), `decoder` (embedding, layers, norm, head).
        A model without a high-resolution tower has 0 for the first two.
    """
    return {
        "sam": _sam_backbone(model.sam) + _sam_neck(model.sam) if model.sam else 0,
        "sam_adaptor": _sam_adaptor(model.sam) if model.sam else 0,
        "siglip": _siglip(model.siglip),
        "aligner": _aligner(model),
        "decoder": _decoder(model.decoder),
    }


def count_unused_parameters(model: ModelConfig) -> int:
    """Parameters that the published checkpoints hold and no forward pass reads; megavl does not build them.

    They are SigLIP's attention-pooling head and, beside two towers, one LayerNorm per tower.
    """
    width, mlp = model.siglip.width, model.siglip.mlp
    pooling = width + _linear(width, width) + _linear(width, 2 * width) + _linear(width, width)
    pooling += _norm(width) + _linear(width, mlp) + _linear(mlp, width)
    return pooling + (_norm(model.sam.downsample[-1]) + _norm(width) if model.sam else 0)


def _decoder(size: DecoderConfig) -> int:
    head_size = size.hidden // size.heads
    attention = size.hidden * head_size * (2 * size.heads + 2 * size.kv_heads)
    layer = attention + 3 * size.hidden * size.ffn + 2 * size.hidden
    return 2 * size.vocab * size.hidden + size.layers * layer + size.hidden


def _vision_block(width: int, mlp: int) -> int:
    attention = _linear(width, 3 * width) + _linear(width, width)
    return attention + _linear(width, mlp) + _linear(mlp, width) + 2 * _norm(width)


def _siglip(size: SiglipConfig) -> int:
    embedding = _linear(3 * size.patch_size**2, size.width) + size.grid**2 * size.width
    return embedding + size.layers * _vision_block(size.width, size.mlp) + _norm(size.width)


def _sam_backbone(size: SamConfig) -> int:
    embedding = _linear(3 * size.patch_size**2, size.width) + size.grid**2 * size.width
    areas = [size.grid if layer in size.global_layers else size.window for layer in range(size.layers)]
    relative = sum(2 * (2 * area - 1) * (size.width // size.heads) for area in areas)
    return embedding + size.layers * _vision_block(size.width, size.mlp) + relative


def _sam_neck(size: SamConfig) -> int:
    return size.width * size.neck + 9 * size.neck**2 + 2 * _norm(size.neck)


def _sam_adaptor(size: SamConfig) -> int:
    middle, last = size.downsample
    return _sam_neck(size) + 9 * (size.neck * middle + middle * last) + 1


def _aligner(model: ModelConfig) -> int:
    low, hidden = model.siglip.width, model.decoder.hidden
    if model.sam is None:
        return _linear(low, hidden) + _linear(hidden, hidden)
    high = model.sam.downsample[-1]
    return {
        "hybrid": _linear(high, hidden // 2) + _linear(low, hidden // 2) + _linear(hidden, hidden),
        "shared": _linear(high + low, hidden) + _linear(hidden, hidden),
        "separate": _linear(high, hidden // 2) + _linear(low, hidden // 2) + 2 * _linear(hidden // 2, hidden // 2),
        "pool_w": _linear(2 * high, hidden) + _linear(2 * low, hidden) + _linear(hidden, hidden),
        "pool_h": _linear(2 * high, hidden) + _linear(2 * low, hidden) + _linear(hidden, hidden),
    }[model.adaptor]


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _norm(width: int) -> int:
    return 2 * width
