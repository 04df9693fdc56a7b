"""Pixels against `transformers`' image processors, on images where their rounding and the reference's floor agree.

The released models' own processor floors the shorter side, `transformers` rounds it; the rule itself is held against a
slow second writing of it in `tests/unit/test_pixels.py`.
"""

import numpy as np
import pytest
from PIL import Image
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from megavl.data.pixels import to_pixels
from megavl.model.sizes import SIZES
from megavl.model.vision.tower import CLIP_MEAN, HALF

SIDES = [(640, 480), (512, 512), (1500, 1000), (300, 900), (2000, 3), (1, 1), (97, 1024), (1024, 333)]


def photo(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def floor_equals_round(width: int, height: int, size: int) -> bool:
    longest = max(width, height)
    return all(int(side / longest * size) == round(side * (size / longest)) for side in (width, height))


@pytest.mark.parametrize(("width", "height"), [s for s in SIDES if floor_equals_round(*s, 1024)])
def test_seven_billion_pixels(width: int, height: int) -> None:
    image, model = photo(width, height), SIZES["7b"]
    processor = DeepseekVLHybridImageProcessorPil(high_res_image_mean=CLIP_MEAN, do_rescale=False, do_normalize=False)
    expected = processor(image)["high_res_pixel_values"][0]
    assert np.array_equal(to_pixels(image, model.image_size, model.background).numpy(), expected)


@pytest.mark.parametrize(("width", "height"), [s for s in SIDES if floor_equals_round(*s, 384)])
def test_one_billion_pixels(width: int, height: int) -> None:
    image, model = photo(width, height), SIZES["1.3b"]
    processor = DeepseekVLImageProcessorPil(image_mean=HALF, do_rescale=False, do_normalize=False)
    expected = processor(image)["pixel_values"][0]
    assert np.array_equal(to_pixels(image, model.image_size, model.background).numpy(), expected)


def test_enough_sizes_are_compared() -> None:
    assert sum(floor_equals_round(*sides, 1024) for sides in SIDES) >= 5
    assert sum(floor_equals_round(*sides, 384) for sides in SIDES) >= 5
