"""Towers and adaptors against `transformers`: features and every gradient, at sizes where nothing divides evenly."""

from dataclasses import replace

import pytest
import torch
from hf_reference import (
    assert_close,
    from_transformers,
    gradients,
    reference_images,
    reference_model,
    relative_difference,
)
from torch import Tensor, nn
from torch.nn import functional

from megavl.config import DecoderConfig, ModelConfig, SamConfig, SiglipConfig
from megavl.model.sizes import SIZES
from megavl.model.vision.adaptor import make_adaptor, stack_neighbours
from megavl.model.vision.sam import (
    SamAttention,
    SamTower,
    fold_relative_positions,
    interpolation_matrix,
    join_windows,
    partition_windows,
    resize_bilinear,
)
from megavl.model.vision.tower import VisionTowers, initialise_vision, resize_antialiased

DECODER = DecoderConfig(layers=1, hidden=48, heads=4, kv_heads=2, ffn=40, vocab=32)
ONE_TOWER = ModelConfig(
    decoder=DECODER,
    siglip=SiglipConfig(image_size=45, patch_size=9, width=30, layers=3, heads=5, mlp=50),
    sam=None,
    adaptor="mlp_gelu",
    background=(127, 127, 127),
)
PADDED_WINDOWS = replace(  # a grid of 7 in windows of 3: two rows and columns of padding; 7 interpolated to 20
    ONE_TOWER,
    siglip=SiglipConfig(image_size=40, patch_size=8, width=30, layers=2, heads=3, mlp=50),
    sam=SamConfig(
        image_size=56, patch_size=8, width=36, layers=4, heads=3, mlp=44, window=3, global_layers=(1, 3), neck=10,
        upsample=20, downsample=(20, 40),
    ),
    adaptor="hybrid",
)  # fmt: skip
LATE_BRANCH = replace(  # windows that fit, the branch from the last layer, 16 interpolated down to 12
    PADDED_WINDOWS,
    siglip=SiglipConfig(image_size=21, patch_size=7, width=24, layers=1, heads=2, mlp=40),
    sam=SamConfig(
        image_size=64, patch_size=4, width=24, layers=3, heads=2, mlp=40, window=4, global_layers=(2,), neck=6,
        upsample=12, downsample=(12, 24),
    ),
)  # fmt: skip


class Vision(nn.Module):
    """Towers and adaptor under their names in the whole model."""

    def __init__(self, model: ModelConfig, recompute: bool = False) -> None:
        super().__init__()
        self.first_stage = nn.Module()
        self.first_stage.towers = VisionTowers(model, recompute=recompute)
        self.first_stage.adaptor = make_adaptor(model)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.first_stage.adaptor(*self.first_stage.towers(pixels))


def each_path_by_itself(tower: SamTower, main: Tensor, side: Tensor) -> Tensor:
    """F = D(up(main)) + alpha D(up(side)), as the model is defined."""
    return tower._to_slots(main) + tower._to_slots(side) * tower.hd_alpha_downsamples


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_adding_the_paths_first_changes_nothing(alpha: float) -> None:
    """Features and gradients; without the branch (alpha 0) the same bits."""
    vision, generator = Vision(PADDED_WINDOWS), torch.Generator().manual_seed(3)
    tower = vision.first_stage.towers.sam
    for parameter in tower.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    tower.hd_alpha_downsamples.data.fill_(alpha)
    shape = (2, 10, 7, 7)
    main, side = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    inputs = [main, side, tower.hd_alpha_downsamples, *(layer.weight for layer in tower.downsamples)]
    together, apart = tower._join_paths(main, side), each_path_by_itself(tower, main, side)
    weight = torch.randn(together.shape, generator=generator)
    if alpha == 0.0:
        assert torch.equal(together, apart)
    assert relative_difference(together, apart) < 1e-5
    ours, theirs = (torch.autograd.grad((weight * y).sum(), inputs) for y in (together, apart))
    for a, b in zip(ours, theirs, strict=True):  # without the branch its gradient is zero in both
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def random_pixels(model: ModelConfig, images: int) -> Tensor:
    return torch.rand(images, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(images))


@pytest.mark.parametrize("model", [ONE_TOWER, PADDED_WINDOWS, LATE_BRANCH], ids=["one", "padded", "late"])
def test_features_and_gradients_equal_transformers(model: ModelConfig) -> None:
    reference, pixels = reference_model(model), random_pixels(model, images=3)
    expected = reference.model.get_image_features(**reference_images(pixels.double(), model)).pooler_output
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()

    ours = Vision(model)
    state = from_transformers(reference.state_dict(), model)
    names = {name for name, _ in ours.named_parameters()}
    ours.load_state_dict({name: state[name] for name in names})
    features = ours(pixels)
    (features * weight).sum().backward()

    assert relative_difference(features, expected) <= 1e-5
    for parameter in reference.parameters():  # the decoder takes no part here
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    theirs = from_transformers(gradients(reference), model)
    assert_close(gradients(ours), {name: theirs[name] for name in names})


def test_high_resolution_image_is_resized_after_padding() -> None:
    """The low branch against triangle weights written out: support 56/40, normalised at the border."""
    pixels = random_pixels(PADDED_WINDOWS, images=2)
    scale = 56 / 40
    centre = (torch.arange(40, dtype=torch.float64) + 0.5) * scale
    weights = (1 - ((torch.arange(56) + 0.5)[None, :] - centre[:, None]).abs() / scale).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    expected = weights @ pixels.double() @ weights.T
    assert relative_difference(resize_antialiased(pixels, 40), expected) <= 56 * 2**-24  # centres up to 56 in fp32


@pytest.mark.parametrize(("side", "window"), [(7, 3), (8, 4), (3, 5), (64, 14)])
def test_windows_come_back(side: int, window: int) -> None:
    grid = torch.rand(2, side, side, 3, dtype=torch.float64)
    windows = partition_windows(grid, window)
    assert windows.shape == (2 * (-(-side // window)) ** 2, window, window, 3)
    assert torch.equal(windows[0, : min(side, window), : min(side, window)], grid[0, :window, :window])
    assert torch.equal(join_windows(windows, side), grid)
    assert windows.sum().isclose(grid.sum())  # padding is zeros


def test_folded_positions_equal_the_bias_patch_by_patch() -> None:
    side, d = 3, 5
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 4, side * side, d, generator=generator, dtype=torch.float64)
    rel_h, rel_w = torch.randn(2, 2 * side - 1, d, generator=generator, dtype=torch.float64)
    folded_query, folded_key = fold_relative_positions(query, key, rel_h, rel_w, side)
    assert folded_query.shape[-1] % 8 == 0
    scores = folded_query @ folded_key.transpose(-1, -2)
    for i in range(side * side):
        for j in range(side * side):
            rows, columns = i // side - j // side + side - 1, i % side - j % side + side - 1
            expected = (query[..., i, :] * key[..., j, :]).sum(-1) * d**-0.5
            expected = expected + query[..., i, :] @ rel_h[rows] + query[..., i, :] @ rel_w[columns]
            torch.testing.assert_close(scores[..., i, j], expected)


def test_attention_in_bf16_is_close_to_fp32() -> None:
    attention = SamAttention(width=32, heads=2, area=7)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(3))
    areas = torch.randn(2, 7, 7, 32, generator=torch.Generator().manual_seed(4))
    exact = attention(areas)
    rounded = attention.to(torch.bfloat16)(areas.bfloat16())
    assert relative_difference(rounded, exact) <= 4 * 2**-8


@pytest.mark.parametrize(("source", "target"), [(64, 96), (7, 20), (16, 12), (5, 5)])
def test_interpolation_equals_torch(source: int, target: int) -> None:
    features = torch.randn(2, 3, source, source, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(2, 3, target, target, generator=torch.Generator().manual_seed(1))
    exact = features.double()
    expected = functional.interpolate(exact, size=(target, target), mode="bilinear", align_corners=False)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), features)
    resized = resize_bilinear(features, target)
    (gradient,) = torch.autograd.grad((resized * weight).sum(), features)
    assert relative_difference(resized, expected) <= 1e-6
    assert relative_difference(gradient, expected_gradient) <= 1e-6
    torch.testing.assert_close(interpolation_matrix(source, target, features.device).sum(1), torch.ones(target))


def test_interpolation_stays_fp32_inside_a_bf16_model() -> None:
    features = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = functional.interpolate(features.double(), size=(96, 96), mode="bilinear")
    error = (resize_bilinear(features, 96).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-6).all()  # rounded once, to the nearest bf16


def test_convolutions_behind_the_necks_read_channels_last() -> None:
    model = SIZES["tiny_hybrid"]
    assert model.sam is not None
    tower, seen = SamTower(model.sam), []
    for conv in tower.downsamples:
        conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride(1)))
    tower(torch.rand(1, 3, model.image_size, model.image_size))
    assert seen == [1, 1]


def test_two_runs_give_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        vision = Vision(PADDED_WINDOWS)
        initialise_vision(vision, torch.Generator().manual_seed(7))
        vision.first_stage.towers.sam.hd_alpha_downsamples.data.fill_(0.5)
        vision(random_pixels(PADDED_WINDOWS, images=2)).square().sum().backward()
        runs.append(gradients(vision))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_zero_alpha_is_the_main_path_and_alpha_still_learns() -> None:
    vision = Vision(PADDED_WINDOWS)
    initialise_vision(vision, torch.Generator().manual_seed(7))
    sam, pixels = vision.first_stage.towers.sam, random_pixels(PADDED_WINDOWS, images=1)
    features = vision(pixels)
    features.square().sum().backward()
    assert sam.hd_alpha_downsamples.grad.abs().item() > 0
    assert all((p.grad == 0).all() for p in sam.neck_hd.parameters())
    with torch.no_grad():
        for parameter in sam.neck_hd.parameters():
            parameter.normal_()
    assert torch.equal(vision(pixels), features)


def test_initial_weights_depend_on_the_generator_alone() -> None:
    first, second, other = Vision(SIZES["tiny_hybrid"]), Vision(SIZES["tiny_hybrid"]), Vision(SIZES["tiny_hybrid"])
    initialise_vision(first, torch.Generator().manual_seed(1))
    torch.rand(5)  # the global random state plays no part
    initialise_vision(second, torch.Generator().manual_seed(1))
    initialise_vision(other.to(torch.bfloat16), torch.Generator().manual_seed(1))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.state_dict()[name])
        assert torch.equal(parameter.bfloat16(), other.state_dict()[name])
        if name.endswith("bias") or "alpha" in name:
            assert (parameter == 0).all()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            assert 0.01 < parameter.std() < 0.5
    initialise_vision(second, torch.Generator().manual_seed(2))
    assert not torch.equal(first.first_stage.adaptor.layers[1].weight, second.first_stage.adaptor.layers[1].weight)


def test_recomputed_blocks_give_the_same_gradients_and_keep_less() -> None:
    kept, results = {}, {}
    for recompute in (False, True):
        vision = Vision(ONE_TOWER, recompute=recompute)
        initialise_vision(vision, torch.Generator().manual_seed(7))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = vision(random_pixels(ONE_TOWER, images=2)).square().sum()
        kept[recompute] = sum(sizes)
        loss.backward()
        results[recompute] = gradients(vision)
    assert all(torch.equal(results[True][name], results[False][name]) for name in results[False])
    assert kept[True] < kept[False] / 2


def test_pooling_stacks_neighbours_of_the_grid() -> None:
    features = torch.arange(16).view(1, 16, 1)  # a 4 x 4 grid that counts
    assert stack_neighbours(features, 4, "width")[0].tolist() == [[i, i + 1] for i in range(0, 16, 2)]
    pairs = [[row + column, row + column + 4] for row in (0, 8) for column in range(4)]
    assert stack_neighbours(features, 4, "height")[0].tolist() == pairs


@pytest.mark.parametrize("kind", ["shared", "separate", "pool_w", "pool_h"])
def test_ablation_adaptors_keep_the_slots_and_learn(kind: str) -> None:
    model = replace(SIZES["tiny_hybrid"], adaptor=kind)
    vision = Vision(model)
    initialise_vision(vision, torch.Generator().manual_seed(7))
    features = vision(random_pixels(model, images=2))
    assert features.shape == (2, model.tokens_per_image, model.decoder.hidden)
    features.square().sum().backward()
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients(vision).items() if "neck_hd" not in name)
