"""From an encoded image to the square of pixels that the towers read.

In: the bytes of an image file, or its path. Out: an RGB image, then uint8 [3, S, S]: resized so that the longer side is
S, padded to a square. Scaling to [0, 1], normalising and the low-resolution copy happen in the towers.

Whatever is wrong with a file becomes one `ValueError` of one sentence that names the source, so that the importer and
the loader can count it, name it and go on.

Shapes: S side of the square in pixels.
"""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 64 * 2**20
"""Largest image that is decoded, in pixels (192 MiB of RGB); more is refused from the header, before any decoding."""
MAX_SIDE = 65535
"""Longest side that is decoded, in pixels (JPEG's own limit)."""
MIN_SIDE = 14
"""Shortest side after resizing, in pixels."""
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""What Pillow may try. A closed list: some of its other readers start programs (EPS runs Ghostscript)."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image with this EXIF orientation upright."""


def decode_image(
    data: bytes | str | Path, *, source: str = "", max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE
) -> Image.Image:
    """Decode an image of any usual kind to upright RGB.

    The first frame of an animation is taken, EXIF rotation is applied, 16-bit samples are scaled to 8 bits, and
    transparent parts show white (dropping the alpha channel, as `convert("RGB")` does, would show colours nobody
    saw: black text on a transparent page turns into black on black).

    Args:
        data: the encoded bytes, or the file that holds them.
        source: how errors call the image; the path if empty.
        max_pixels: largest area that is decoded.
        max_side: longest side that is decoded, in pixels.

    Returns:
        An RGB image with its pixels loaded.

    Raises:
        ValueError: the file is missing, empty, not an image, cut short, damaged or too large.
    """
    source = source or ("image" if isinstance(data, bytes) else str(data))
    encoded = data if isinstance(data, bytes) else _read(Path(data), source)
    if not encoded:
        raise ValueError(f"{source}: the image has 0 bytes")
    image = _open(encoded, source)
    width, height = image.size
    if max(width, height) > max_side:
        raise ValueError(f"{source}: a side of {max(width, height)} pixels (limit {max_side}) in {width} x {height}")
    if width * height > max_pixels:
        raise ValueError(f"{source}: {width} x {height} = {width * height} pixels, the limit is {max_pixels}")
    try:
        image.load()  # frame 0 of an animation
        orientation = _orientation(image)  # after load: a PNG may hold it behind its pixels
        image = _to_rgb(image)
    except Exception as error:  # Pillow's readers raise almost anything on damaged data
        reason = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"{source}: {len(encoded)} bytes do not decode to {width} x {height}: {reason}") from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_pixels(image: Image.Image, size: int, background: tuple[int, int, int]) -> Tensor:
    """Resize an image to fit a square and pad it, exactly as the reference preprocessing does.

    Args:
        image: RGB.
        size: S, side of the square in pixels, at least 14.
        background: RGB colour of the padding, 0 to 255.

    Returns:
        Pixels, uint8 [3, S, S]; the image is in the centre, an odd pixel of padding goes below or right of it.
    """
    width, height = image.size
    longest = max(width, height)
    # int() floors, and the order of the operations matters: h / M * S and h * S / M differ in the last bit.
    new_height = max(int(height / longest * size), MIN_SIDE)
    new_width = max(int(width / longest * size), MIN_SIDE)
    resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), background)
    square.paste(resized, ((size - new_width) // 2, (size - new_height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()  # [3, S, S]


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{source}: the image cannot be read: {error.strerror or error}") from error


def _open(encoded: bytes, source: str) -> Image.Image:
    """Read the header only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own size warning: the limit here is lower and an error
        try:
            return Image.open(io.BytesIO(encoded), formats=FORMATS)
        except Image.DecompressionBombError as error:  # above Pillow's own limit, which it checks first
            raise ValueError(f"{source}: {str(error).split(',')[0]}, limit here {MAX_PIXELS}") from error
        except Exception as error:
            kinds = ", ".join(FORMATS)
            raise ValueError(f"{source}: {len(encoded)} bytes that are not an image ({kinds})") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or it is damaged: bad metadata does not spoil good pixels."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it at 255, almost everywhere white
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError(f"samples from {samples.min()} to {samples.max()}, 0 to 65535 are supported")
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point samples have no defined white")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")
