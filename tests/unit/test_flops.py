"""Our formulas against torch's FLOP counter on real modules, frozen and not, and against published totals."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavl.config import DecoderConfig, ModelConfig, ParallelConfig
from megavl.data.microbatch import MicroBatch
from megavl.model.build import build_stages
from megavl.model.sizes import SIZES
from megavl.model.stage import Stage
from megavl.model.vision import sam
from megavl.model.vision.adaptor import make_adaptor
from megavl.model.vision.tower import VisionTowers
from megavl.parallel.groups import Groups, destroy_groups, init_groups
from megavl.training.flops import StepCounts, decoder_flops, hardware_flops, image_flops, peak_flops, step_flops
from megavl.training.synthetic_batches import global_batch
from megavl.training.throughput import throughput

STAGES = {
    0: (),
    1: ("sam_adaptor", "aligner"),
    2: ("sam_adaptor", "aligner", "decoder"),
    3: ("sam_adaptor", "aligner", "decoder", "siglip"),
    4: ("sam", "sam_adaptor", "siglip", "aligner", "decoder"),
}
"""What each training stage trains; 4 is everything, which no stage does."""


def tiny(adaptor: str) -> ModelConfig:
    """Both towers with a window that does not divide the grid; every size differs from every other."""
    model = SIZES["tiny_hybrid"]
    assert model.sam is not None
    tower = dataclasses.replace(model.sam, window=3, width=48, heads=3, mlp=96, downsample=(24, 40))
    decoder = dataclasses.replace(model.decoder, hidden=72, layers=2, ffn=80, heads=4, kv_heads=2, vocab=96)
    small = dataclasses.replace(model, sam=tower, decoder=decoder, adaptor=adaptor)  # type: ignore[arg-type]
    return dataclasses.replace(small, sam=None) if adaptor == "mlp_gelu" else small


class Vision(nn.Module):
    """Towers and adaptor under the names by which `Stage.component_of` tells components apart."""

    def __init__(self, model: ModelConfig, trained: tuple[str, ...]) -> None:
        super().__init__()
        self.first_stage = nn.ModuleDict({"towers": VisionTowers(model), "adaptor": make_adaptor(model)})
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(Stage.component_of(name) in trained)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.first_stage["adaptor"](*self.first_stage["towers"](pixels))


def counted(run: nn.Module, *inputs: object) -> int:
    """What torch counts for forward and, if anything is trained, backward; attention as plain matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = run(*inputs)
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


def textbook_relative_positions(
    query: torch.Tensor, key: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two products of the definition; the model then appends their results to queries and keys, which makes the
    score product wider but saves a bias of [n, t, t]: work of this implementation, not of the model.
    """
    b, n, _, d = query.shape
    rows = rel_pos_h[:side].expand(side, side, d)
    columns = rel_pos_w[:side].expand(side, side, d)
    by_place = query.view(b, n, side, side, d)
    row_term = torch.einsum("bnrsd,rud->bnrsu", by_place, rows)
    column_term = torch.einsum("bnrsd,svd->bnrsv", by_place, columns)
    return query + (row_term + column_term).sum(-1).view(b, n, -1, 1), key


def each_path_by_itself(tower: sam.SamTower, main: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """As the model is defined and its operations are counted; computing it, both paths are added first."""
    return tower._to_slots(main) + tower._to_slots(side) * tower.hd_alpha_downsamples


@pytest.mark.parametrize("stage", sorted(STAGES))
@pytest.mark.parametrize("adaptor", ["mlp_gelu", "hybrid", "shared", "separate", "pool_w"])
def test_image_against_counter(adaptor: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam, "fold_relative_positions", textbook_relative_positions)
    monkeypatch.setattr(
        sam, "resize_bilinear", lambda x, side: functional.interpolate(x, (side, side), mode="bilinear")
    )
    monkeypatch.setattr(sam.SamTower, "_join_paths", each_path_by_itself)
    model, trained = tiny(adaptor), STAGES[stage]
    pixels = torch.rand(3, 3, model.image_size, model.image_size)
    ours = 3 * sum(image_flops(model, trained, padded_windows=True).values())
    assert counted(Vision(model, trained), pixels) == ours


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    yield init_groups(ParallelConfig(device="cpu"))
    destroy_groups()


def text_batch(lengths: list[int], vocab: int) -> MicroBatch:
    tokens = torch.arange(sum(lengths)) % vocab
    return MicroBatch(
        tokens=tokens,
        labels=tokens.roll(-1),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        max_document=max(lengths),
        pixels=None,
        image_slots=torch.zeros(0, dtype=torch.int64),
        num_images=0,
        modality="language",
        sample_ids=(("text", 0),),
    )


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_decoder_against_counter(groups: Groups, stage: int) -> None:
    """Stage 1: the frozen decoder still passes gradients on, here to the adaptor's zero gradients."""
    model, trained, lengths = tiny("mlp_gelu"), STAGES[stage], [7, 12, 4]
    (chunk,) = build_stages(
        model, ParallelConfig(), dtype=torch.float32, seed=1, pg=groups.pg, device=torch.device("cpu")
    )
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(chunk.component_of(name) in trained)
    counts = StepCounts(images=0, tokens=23, squared_lengths=49 + 144 + 16, logits=23)
    terms = decoder_flops(model.decoder, counts, trained="decoder" in trained, passes=bool(trained))
    # The counter sees the masked half of the scores too.
    expected = terms["decoder"] + 2 * terms["attention"] + terms["head"]
    assert counted(chunk, text_batch(lengths, model.decoder.vocab)) == expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "recompute",
    [{}, {"recompute": "selective"}, {"recompute": "full", "recompute_vision": True}],
    ids=["plain", "selective", "full"],
)
def test_hardware_operations_against_counter(
    groups: Groups, stage: int, recompute: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole step of both towers and the decoder: images, two documents, padding and what is computed again."""
    monkeypatch.setattr(sam, "fold_relative_positions", textbook_relative_positions)
    monkeypatch.setattr(
        sam, "resize_bilinear", lambda x, side: functional.interpolate(x, (side, side), mode="bilinear")
    )
    model, trained, parallel = tiny("hybrid"), STAGES[stage], ParallelConfig(**recompute)
    (chunk,) = build_stages(model, parallel, dtype=torch.float32, seed=1, pg=groups.pg, device=torch.device("cpu"))
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(chunk.component_of(name) in trained)
    (batch,) = global_batch(model, "packed", micro_batches=1, tokens=128)
    squares = int((batch.cu_seqlens.long().diff() ** 2).sum())
    counts = StepCounts(images=batch.num_images, tokens=128, squared_lengths=squares, logits=128)
    terms = hardware_flops(model, trained, counts, parallel)
    assert counts.images == 2
    # The counter sees the masked half of the scores too.
    assert counted(chunk, batch) == sum(terms.values()) + terms["attention"]


def test_hardware_operations_by_hand() -> None:
    """Every tensor rank encodes every image, windows are padded, language terms grow with recomputation only."""
    model, trained = SIZES["1.3b_hybrid"], STAGES[2]
    counts = StepCounts(images=2, tokens=100, squared_lengths=100**2, logits=100)
    once = step_flops(model, trained, counts)
    four = hardware_flops(model, trained, counts, ParallelConfig(tensor=4, recompute="full"))
    assert four["siglip"] == 4 * once["siglip"]
    assert four["sam"] / once["sam"] == pytest.approx(4 * 965.6 / 935.3, rel=1e-3)
    assert four["decoder"] / once["decoder"] == pytest.approx(4 / 3)
    assert four["attention"] / once["attention"] == pytest.approx(4 / 3)
    assert four["head"] == once["head"]


def test_throughput_counts_in_three_ways() -> None:
    """By hand: a decoder of 2 * (4 * 16^2 + 3 * 16 * 24) * 2 operations a token and layer, trained: three times."""
    decoder = DecoderConfig(layers=2, hidden=16, heads=2, kv_heads=2, ffn=24, vocab=32)
    model = dataclasses.replace(SIZES["tiny_hybrid"], decoder=decoder)
    counts = StepCounts(images=3, tokens=80, squared_lengths=80**2, logits=50)
    padded = StepCounts(images=3, tokens=100, squared_lengths=80**2 + 20**2, logits=50)
    language = 3 * (2 * (8 * 16**2 + 6 * 16 * 24) * 80 + 2 * 2 * 16 * 80**2 + 2 * 16 * 32 * 80)
    images = 3 * sum(image_flops(model, STAGES[2]).values())
    speed = throughput(model, ParallelConfig(), STAGES[2], counts=counts, padded=padded, seconds=0.5, ranks=4, peak=1e9)
    assert (speed.tokens_per_s, speed.images_per_s) == (200, 6)
    assert speed.llm_tflops == pytest.approx(language / 0.5 / 4 / 1e12)
    unlabelled = 3 * 2 * 16 * 32 * 30  # other counters' heads compute them, this one does not
    assert speed.tflops == pytest.approx((language - unlabelled + images) / 0.5 / 4 / 1e12)
    assert speed.llm_mfu == pytest.approx(language / 0.5 / 4 / 1e9)
    hardware = sum(hardware_flops(model, STAGES[2], padded, ParallelConfig()).values())
    assert speed.hardware_tflops == pytest.approx(hardware / 0.5 / 4 / 1e12)
    unknown = throughput(
        model, ParallelConfig(), STAGES[2], counts=counts, padded=padded, seconds=0.5, ranks=4, peak=None
    )
    assert (unknown.mfu, unknown.llm_mfu, unknown.hfu) == (None, None, None)


def test_published_totals() -> None:
    """The multiplier table and per-token figures computed by hand for the released 7B and 1.3B, in 1e9."""
    seven = SIZES["7b"]
    once, adaptor, sft = (
        {name: value / 1e9 for name, value in image_flops(seven, STAGES[stage]).items()} for stage in (0, 1, 3)
    )
    expected = {"sam": 935.3, "sam neck": 6.4, "sam neck_hd": 6.4, "siglip": 381.4, "aligner": 24.2}
    assert {name: once[name] for name in expected} == pytest.approx(expected, rel=1e-2)
    assert image_flops(seven, (), padded_windows=True)["sam"] / 1e9 == pytest.approx(965.6, rel=1e-3)
    assert adaptor["sam neck_hd"] == pytest.approx(17.7, rel=1e-2)
    assert adaptor["sam convolutions"] == pytest.approx(27.2, rel=1e-2)
    assert adaptor["sam_hd convolutions"] == pytest.approx(32.6, rel=1e-2)
    assert adaptor["aligner"] == pytest.approx(70.1, rel=1e-2)
    assert sft["siglip"] == pytest.approx(1144.2, rel=1e-2)
    assert sft["aligner"] == pytest.approx(72.5, rel=1e-2)
    for size, per_token in (("7b", 41.96e9), ("1.3b", 9.865e9)):
        counts = StepCounts(images=0, tokens=4096, squared_lengths=4096**2, logits=4096)
        assert sum(step_flops(SIZES[size], ("decoder",), counts).values()) / 4096 == pytest.approx(per_token, rel=1e-3)


def test_frozen_decoder_passes_gradients() -> None:
    decoder = DecoderConfig(layers=2, hidden=16, heads=2, kv_heads=2, ffn=24, vocab=32)
    counts = StepCounts(images=0, tokens=10, squared_lengths=100, logits=10)
    forward = decoder_flops(decoder, counts, trained=False, passes=False)
    frozen = decoder_flops(decoder, counts, trained=False, passes=True)
    full = decoder_flops(decoder, counts, trained=True, passes=True)
    assert [frozen[n] / forward[n] for n in ("decoder", "attention", "head")] == [2, 3, 2]
    assert [full[n] / forward[n] for n in ("decoder", "attention", "head")] == [3, 3, 3]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
