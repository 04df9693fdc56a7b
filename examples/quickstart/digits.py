"""Scanned handwritten digits as images with questions and captions.

In: scikit-learn's copy of the UCI digits (1797 scans of 8x8 pixels, inside the package, nothing is downloaded).
Out: grey PNG images of 64x64 pixels with their digit, split into train, validation and test; the training part is
repeated with small rotations, scalings and shifts, so that the model cannot learn the scans by heart.
"""

import io
import random
from dataclasses import dataclass

import numpy as np
from corpus import Split, part
from PIL import Image

SIDE = 64
"""Pixels along a side of the images handed to the model."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

QUESTIONS = (
    "Which digit is this?",
    "What digit is written here?",
    "Read the digit in the image.",
    "Which number did somebody write?",
    "Name the handwritten digit.",
)
"""Questions of the training data; the answer is the digit alone."""

CAPTIONS = (
    "A handwritten {digit}.",
    "The digit {digit}, written by hand.",
    "Somebody wrote the number {digit}.",
    "A scan of the digit {digit}.",
    "This is a {digit}.",
)
"""Descriptions of the alignment data."""

_SIZES = {"validation": 180, "test": 300}
_VARIED_COPIES = 7
_MAX_ROTATION = 10.0  # degrees
_SCALES = (0.85, 1.05)
_MAX_SHIFT = 4.0  # pixels of the 64


@dataclass(frozen=True, kw_only=True)
class DigitImage:
    """One image of a digit."""

    png: bytes
    """Encoded grey image, 64x64."""
    digit: int
    """0 to 9."""


def digits(split: Split, seed: int = 0, varied_copies: int = _VARIED_COPIES, share: float = 1.0) -> list[DigitImage]:
    """The digits of one split: every scan once as it is, those of the training part also varied.

    Args:
        split: which part; the parts share no scan.
        seed: of the variations; the split itself never changes.
        varied_copies: variations of each training scan.
        share: part of the scans to use.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the quickstart's digits come with scikit-learn: pip install 'megavl[quickstart]'") from error
    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 8, 8)
    chosen = part(_split_indices(len(scans))[split].tolist(), share)
    copies = varied_copies if split == "train" else 0
    found = []
    for index in chosen:
        large = _enlarge(scans[index])
        variations = [_vary(large, random.Random(f"{seed} {index} {copy}")) for copy in range(copies)]
        found += [DigitImage(png=encode(image), digit=int(labels[index])) for image in (large, *variations)]
    return found


def _split_indices(count: int) -> dict[Split, np.ndarray]:
    order = np.random.default_rng(20240311).permutation(count)
    validation, test = _SIZES["validation"], _SIZES["test"]
    return {
        "validation": order[:validation],
        "test": order[validation : validation + test],
        "train": order[validation + test :],
    }


def _enlarge(scan: np.ndarray) -> Image.Image:
    grey = Image.fromarray((255 - scan * (255 / 16)).astype(np.uint8), mode="L")  # dark ink on white paper
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _vary(image: Image.Image, rng: random.Random) -> Image.Image:
    """Rotate, scale and shift about the centre; PIL wants the inverse map, output pixel to input pixel."""
    angle = np.deg2rad(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
    scale = rng.uniform(*_SCALES)
    shift_x, shift_y = rng.uniform(-_MAX_SHIFT, _MAX_SHIFT), rng.uniform(-_MAX_SHIFT, _MAX_SHIFT)
    cos, sin, centre = np.cos(angle) / scale, np.sin(angle) / scale, SIDE / 2
    affine = (
        cos, sin, centre - cos * (centre + shift_x) - sin * (centre + shift_y),
        -sin, cos, centre + sin * (centre + shift_x) - cos * (centre + shift_y),
    )  # fmt: skip
    return image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=255)


def encode(image: Image.Image) -> bytes:
    """PNG bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
