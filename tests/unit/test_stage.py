"""A whole model on one process against a plain PyTorch one: logits, loss, every gradient; what text must not touch."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from plain_llama import plain_logits, plain_loss
from torch import Tensor

from megavl.config import DecoderConfig, ModelConfig, ParallelConfig, SamConfig, SiglipConfig
from megavl.data.microbatch import IGNORE, MicroBatch
from megavl.model.build import build_stages
from megavl.model.first_stage import place_image_features
from megavl.model.shards import full_parameters, load_full_state
from megavl.model.stage import Stage
from megavl.parallel.groups import Groups, destroy_groups, init_groups

MODEL = ModelConfig(
    decoder=DecoderConfig(layers=3, hidden=48, heads=4, kv_heads=2, ffn=40, vocab=64, init_std=0.1),
    siglip=SiglipConfig(image_size=16, patch_size=8, width=32, layers=1, heads=2, mlp=48),
    sam=None,
    adaptor="mlp_gelu",
    background=(127, 127, 127),
)
IMAGE = 5
"""Placeholder id."""
RECOMPUTE = ("none", "selective", "full")


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    yield init_groups(ParallelConfig())  # CUDA where there is a device; fp32 takes the exact path there too
    destroy_groups()


def build(groups: Groups, parallel: ParallelConfig | None = None, model: ModelConfig = MODEL, seed: int = 1) -> Stage:
    parallel = parallel or ParallelConfig()
    stages = build_stages(model, parallel, dtype=torch.float32, seed=seed, pg=groups.pg, device=groups.device)
    return stages[0]


def make_batch(lengths: list[int], images: dict[int, int] | None = None, model: ModelConfig = MODEL) -> MicroBatch:
    """Documents of the given lengths; `images` = {position in the stream: number of the image}."""
    generator = torch.Generator().manual_seed(sum(lengths))
    total, images = sum(lengths), images or {}
    tokens = torch.randint(6, model.decoder.vocab, (total,), generator=generator)
    labels = torch.randint(6, model.decoder.vocab, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.3] = IGNORE
    slots = [start + j for start in images for j in range(model.tokens_per_image)]
    tokens[slots], labels[slots] = IMAGE, IGNORE
    side = model.image_size
    pixels = torch.randint(0, 256, (len(images), 3, side, side), dtype=torch.uint8, generator=generator)
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        max_document=max(lengths),
        pixels=pixels if images else None,
        image_slots=torch.tensor(slots, dtype=torch.int64),
        num_images=len(images),
        modality=None,
        sample_ids=(("test", 0),),
    )


def run_plain(stage: Stage, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, losses and gradients of the plain model with the weights of `stage`."""
    tensors = {name: p.detach().clone().requires_grad_() for name, _, p in full_parameters([stage])}
    batch, features = on_device_of(stage, batch), None
    if batch.pixels is not None:
        below = "first_stage."
        vision = {n.removeprefix(below): t for n, t in tensors.items() if n.startswith((below + "tow", below + "ada"))}
        features = torch.func.functional_call(_Vision(stage), vision, (batch.pixels / 255,))
    with batch.tokens.device:
        logits = plain_logits(tensors, features, batch, stage.model.decoder)
    losses = plain_loss(logits, batch.labels)
    losses.sum().backward()
    return logits, losses, {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in tensors.items()}


def on_device_of(stage: Stage, batch: MicroBatch) -> MicroBatch:
    return batch.to(next(stage.parameters()).device)


class _Vision(torch.nn.Module):
    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.towers, self.adaptor = stage.first_stage.towers, stage.first_stage.adaptor

    def forward(self, pixels: Tensor) -> Tensor:
        return self.adaptor(*self.towers(pixels))


def run_stage(stage: Stage, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
    losses = stage(on_device_of(stage, batch))
    losses.sum().backward()
    return losses, {name: p.grad for name, _, p in full_parameters([stage])}


def assert_near(ours: Tensor, plain: Tensor, name: str = "", relative: float = 1e-5) -> None:
    scale = plain.abs().max().item()
    assert (ours - plain).abs().max().item() <= relative * max(scale, 1e-6), name


BATCHES = {
    "text": make_batch([17]),
    "packed": make_batch([5, 9, 1, 9]),
    "image inside text": make_batch([20], {7: 0}),
    "packed with images": make_batch([11, 4, 14], {3: 0, 16: 1, 22: 2}),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_equals_plain_model(groups: Groups, name: str, recompute: str) -> None:
    stage = build(groups, ParallelConfig(recompute=recompute, recompute_vision=recompute == "full"))
    batch = on_device_of(stage, BATCHES[name])
    with torch.no_grad():
        logits = stage.logits(batch)
    losses, gradients = run_stage(stage, batch)
    plain, plain_losses, plain_gradients = run_plain(stage, batch)
    assert_near(logits, plain)
    assert_near(losses, plain_losses)
    assert losses.dtype == torch.float32
    assert not losses[batch.labels == IGNORE].any()
    assert gradients.keys() == plain_gradients.keys()
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert_near(gradient, plain_gradients[key], key)


def hybrid() -> ModelConfig:
    """The same decoder behind both towers; grid 4 of SigLIP, so 16 positions per image."""
    sam = SamConfig(
        image_size=32,
        patch_size=4,
        width=16,
        layers=2,
        heads=2,
        mlp=16,
        window=4,
        global_layers=(1,),
        neck=8,
        upsample=16,
        downsample=(8, 16),
    )
    return replace(MODEL, sam=sam, siglip=replace(MODEL.siglip, patch_size=4), adaptor="hybrid")


def test_hybrid_equals_plain_model(groups: Groups) -> None:
    model = hybrid()
    batch = make_batch([21, 19], {2: 0, 22: 1}, model)
    stage = build(groups, model=model)
    with torch.no_grad():
        stage.first_stage.towers.sam.hd_alpha_downsamples.fill_(0.5)  # at 0 the branch would have no gradient
    losses, gradients = run_stage(stage, batch)
    _, plain_losses, plain_gradients = run_plain(stage, batch)
    assert_near(losses, plain_losses)
    for key, gradient in gradients.items():
        assert_near(gradient, plain_gradients[key], key)


def test_text_does_not_touch_the_towers(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = build(groups)
    for part in (stage.first_stage.towers, stage.first_stage.adaptor):
        monkeypatch.setattr(part, "forward", _refuse)
    losses, gradients = run_stage(stage, BATCHES["packed"])
    without = {n: g for n, g in gradients.items() if stage.component_of(n) in ("siglip", "aligner")}
    assert len(without) > 10
    assert all(g is not None and not g.any() for g in without.values())  # reported, and zero
    _, plain_losses, plain_gradients = run_plain(build(groups), BATCHES["packed"])
    assert_near(losses, plain_losses)
    for name in gradients.keys() - without.keys():
        assert_near(gradients[name], plain_gradients[name], name)
    with pytest.raises(RuntimeError, match="tower was run"):
        run_stage(stage, BATCHES["image inside text"])


def _refuse(*_: Tensor) -> Tensor:
    raise RuntimeError("a tower was run")


def test_frozen_parts_report_nothing(groups: Groups) -> None:
    stage = build(groups)
    stage.requires_grad_(False)
    stage.first_stage.adaptor.requires_grad_(True)
    _, gradients = run_stage(stage, BATCHES["text"])
    assert {stage.component_of(n) for n, g in gradients.items() if g is not None} == {"aligner"}
    stage.requires_grad_(False)
    assert not stage(on_device_of(stage, BATCHES["text"])).requires_grad


def test_recomputation_keeps_less(groups: Groups) -> None:
    kept = {r: _bytes_kept(build(groups, ParallelConfig(recompute=r)), BATCHES["packed"]) for r in RECOMPUTE}
    assert kept["none"] > kept["selective"] > kept["full"]
    picture = BATCHES["image inside text"]
    towers = [_bytes_kept(build(groups, ParallelConfig(recompute_vision=r)), picture) for r in (False, True)]
    assert towers[0] > towers[1]


def _bytes_kept(stage: Stage, batch: MicroBatch) -> int:
    """Bytes of distinct storages that the forward pass saves for the backward pass, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = stage(on_device_of(stage, batch))
        total = sum(kept.values())
    losses.sum().backward()
    return total


def test_same_image_in_another_place(groups: Groups) -> None:
    """Features go where the slots say: swapping two images of a batch swaps what their positions see."""
    stage = build(groups)
    batch = make_batch([12, 12], {3: 0, 15: 1})
    batch.tokens[12:] = batch.tokens[:12]
    batch = on_device_of(stage, batch)
    swapped = replace(batch, pixels=batch.pixels.flip(0))
    with torch.no_grad():
        one, other = stage.logits(batch), stage.logits(swapped)
    torch.testing.assert_close(one[:12], other[12:])
    assert not torch.allclose(one[:12], other[:12])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_slots": torch.arange(3)}, "3 image positions in the text, but 1 images take 4"),
        ({"pixels": None}, "0 images in pixels, 1 announced"),
        ({"num_images": 0, "image_slots": torch.arange(0)}, "1 images in pixels, 0 announced"),
    ],
)
def test_counts_that_differ(groups: Groups, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_stage(build(groups), replace(BATCHES["image inside text"], **change))


def test_features_that_differ_from_slots() -> None:
    with pytest.raises(ValueError, match="3 image positions in the text, 4 image features"):
        place_image_features(torch.zeros(9, 2), torch.zeros(1, 4, 2), torch.arange(3))


def test_components(groups: Groups) -> None:
    stage = build(groups, model=hybrid())
    found = {name: stage.component_of(f"module.module.{name}") for name, _ in stage.named_parameters()}
    assert set(found.values()) == {"sam", "sam_adaptor", "siglip", "aligner", "decoder"}
    towers = "first_stage.towers."
    assert found[f"{towers}sam.neck.0.weight"] == "sam"
    for name in ("neck_hd.0.weight", "downsamples.1.weight", "hd_alpha_downsamples"):
        assert found[f"{towers}sam.{name}"] == "sam_adaptor"
    assert found["first_stage.embedding.weight"] == found["last_stage.head.weight"] == "decoder"
    assert found["decoder.final_layernorm.weight"] == "decoder"


def test_sharded_state_names_every_parameter(groups: Groups) -> None:
    stage = build(groups)
    state = stage.sharded_state_dict()
    assert state.keys() == dict(stage.named_parameters()).keys()
    assert state["decoder.layers.2.mlp.linear_fc2.weight"].key == "decoder.layers.2.mlp.linear_fc2.weight"
    stage.load_state_dict({name: p.detach() for name, p in stage.named_parameters()})  # strict


def test_loading_says_what_is_wrong(groups: Groups) -> None:
    stage = build(groups)
    tensors = {name: p.detach().clone() for name, _, p in full_parameters([stage])}
    name = "last_stage.head.weight"
    with pytest.raises(ValueError, match=f"{name}: tensor of shape \\(3, 48\\), the model has \\(64, 48\\)"):
        load_full_state([stage], {**tensors, name: torch.zeros(3, 48)})
    with pytest.raises(ValueError, match=f"no tensor for parameter {name}"):
        load_full_state([stage], {n: t for n, t in tensors.items() if n != name})


def test_bf16_trains_in_bf16(groups: Groups) -> None:
    stages = build_stages(hybrid(), ParallelConfig(), dtype=torch.bfloat16, seed=1, pg=groups.pg, device=groups.device)
    assert {p.dtype for p in stages[0].parameters()} == {torch.bfloat16}
    batch = make_batch([21, 19], {2: 0, 22: 1}, hybrid())
    losses, gradients = run_stage(stages[0], batch)
    assert losses.dtype == torch.float32
    wide, _ = run_stage(build(groups, model=hybrid()), batch)
    assert_near(losses, wide, relative=0.03)
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
