"""Greedy decoding over several ranks writes what one process writes."""

import io

import numpy as np
import pytest
from layouts import LAYOUTS, MODEL
from PIL import Image
from trainer import Trainer
from world import World

from megavl.config import ParallelConfig
from megavl.data.collate import CollateSettings
from megavl.data.microbatch import EVERY_PIXEL, NO_PIXELS
from megavl.generate.decoding import greedy
from megavl.generate.parallel_logits import parallel_logits
from megavl.generate.samples import Sample

IMAGE_ID = MODEL.decoder.vocab - 1


def greedy_tokens(parallel: ParallelConfig) -> list[list[int]]:
    """Eight tokens for each of three prompts: text, an image in front, two images around text."""
    trainer = Trainer(parallel)
    image = [encoded(grey) for grey in (20, 200)]
    prompts = [
        Sample(np.array([1, 2, 3]), np.zeros(3, dtype=bool), ()),
        Sample(np.array([IMAGE_ID, 4]), np.zeros(2, dtype=bool), (image[0],)),
        Sample(np.array([5, IMAGE_ID, 6, IMAGE_ID]), np.zeros(4, dtype=bool), (image[1], image[0])),
    ]
    settings = CollateSettings(
        image_id=IMAGE_ID,
        pad_id=0,
        tokens_per_image=MODEL.tokens_per_image,
        image_size=MODEL.image_size,
        background=MODEL.background,
        separate_documents=True,
        pixels=EVERY_PIXEL if trainer.groups.is_first_stage else NO_PIXELS,
    )
    logits = parallel_logits(trainer.chunks, parallel, trainer.groups)
    return greedy(prompts, logits, settings, end_id=-1, max_new_tokens=8)


def encoded(grey: int) -> bytes:
    """A small PNG with a bright corner."""
    image = Image.new("L", (8, 8), grey)
    image.putpixel((0, 0), 255)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("layout", ["pp2", "pp2vpp2", "tp2pp2sp", "dp2 distributed overlap"])
def test_greedy_tokens_are_those_of_one_process(world: World, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    (expected,) = world.run(greedy_tokens, ParallelConfig(device="cpu"), ranks=1)
    assert [len(answer) for answer in expected] == [8, 8, 8]
    assert len({tuple(answer) for answer in expected}) == 3
    assert world.run(greedy_tokens, parallel, ranks=ranks) == [expected] * ranks
