"""The 7B's towers and adaptor at full width against `transformers`: one image of 1024 pixels, forward, fp32.

Layers are alike, and 36 of them took a minute: here there is one of each kind (windows; the whole grid, from which the
side branch leaves; the whole grid, from which the main path leaves), and two of SigLIP. That the released depth is ours
is asked of `transformers`. Both sides read the same weights: the reference is built without storage and given views.
"""

from dataclasses import replace

import pytest
import torch
import transformers
from hf_reference import build_reference, randomise, reference_images, relative_difference
from torch import nn

from megavl.checkpoint.hf_names import entries
from megavl.config import DecoderConfig
from megavl.model.sizes import SIZES
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import VisionTowers

RELEASED = SIZES["7b"]
assert RELEASED.sam is not None
MODEL = replace(
    RELEASED,
    decoder=DecoderConfig(layers=1, hidden=4096, heads=32, kv_heads=32, ffn=8, vocab=8),
    siglip=replace(RELEASED.siglip, layers=2),
    sam=replace(RELEASED.sam, layers=3, global_layers=(1, 2)),
)


def test_released_depth() -> None:
    """SAM-B's is the default of `transformers`; SigLIP-L's 24 layers follow from the count of its parameters."""
    default = transformers.SamVisionConfig()
    assert RELEASED.sam is not None
    assert RELEASED.sam.layers == default.num_hidden_layers
    assert list(RELEASED.sam.global_layers) == list(default.global_attn_indexes)


@pytest.mark.slow
def test_one_image_through_the_seven_billion_vision_stage() -> None:
    with torch.device("meta"):
        ours = nn.ModuleDict({"towers": VisionTowers(MODEL), "adaptor": make_adaptor(MODEL)})
        reference = build_reference(MODEL, attention="sdpa")  # eager attention would take 3 GB more
    ours.to_empty(device="cpu")
    randomise(ours, seed=0)
    state = {}
    for entry in entries(MODEL):
        if entry.ours.startswith(("first_stage.towers", "first_stage.adaptor")):
            tensor = ours.get_parameter(entry.ours.removeprefix("first_stage.")).detach()
            state |= zip(entry.transformers, tensor.chunk(len(entry.transformers)), strict=True)
    position_table = "model.vision_model.embeddings.position_embedding.weight"
    state[position_table] = state[position_table].squeeze(0)
    reference.load_state_dict(state, strict=False, assign=True)
    reference.model.vision_model.embeddings.position_ids = torch.arange(MODEL.tokens_per_image)[None]

    pixels = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = ours["adaptor"](*ours["towers"](pixels))
        expected = reference.model.get_image_features(**reference_images(pixels, MODEL)).pooler_output
    assert features.shape == (1, 576, 4096)
    assert relative_difference(features, expected) <= 1e-4
