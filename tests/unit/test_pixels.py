"""Decoding against hand-made files of every kind, and the resize rule against a slow second writing of it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megavl.data.pixels import MAX_PIXELS, decode_image, to_pixels

CLIP_GREY = (122, 116, 104)
RED_LEFT = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]] * 3, dtype=np.uint8))
"""2 x 3 pixels (width x height), red left, blue right."""


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference_pixels(image: Image.Image, size: int, background: tuple[int, int, int]) -> Tensor:
    """Spec section 2 pixel by pixel: floor, at least 14, bicubic on the 8-bit image, centred on the background."""
    width, height = image.size
    longest = width if width > height else height
    sides = []
    for side in (height, width):
        length = 0
        while length + 1 <= side / longest * size:  # floor by counting
            length += 1
        sides.append(length if length > 14 else 14)
    resized = np.array(image.resize((sides[1], sides[0]), resample=Image.Resampling.BICUBIC))
    square = torch.zeros(3, size, size, dtype=torch.uint8)
    top, left = (size - sides[0]) // 2, (size - sides[1]) // 2
    for channel in range(3):
        square[channel] = background[channel]
        square[channel, top : top + sides[0], left : left + sides[1]] = torch.from_numpy(resized[:, :, channel].copy())
    return square


@pytest.mark.parametrize("size", [32, 64, 384])
@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (64, 64), (640, 480), (333, 500), (767, 1023), (2, 1000), (3000, 1), (1, 3000), (500, 499), (13, 14)],
)
def test_rule_equals_the_slow_reference(width: int, height: int, size: int) -> None:
    image = photo(width, height)
    pixels = to_pixels(image, size, CLIP_GREY)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert torch.equal(pixels, reference_pixels(image, size, CLIP_GREY))


def test_sides_are_floored_and_padding_is_centred() -> None:
    pixels = to_pixels(Image.new("RGB", (1023, 767)), 1024, CLIP_GREY)  # 767 / 1023 * 1024 = 767.7: floor, not round
    rows = (pixels == 0).all(dim=0).all(dim=1)
    assert int(rows.sum()) == 767
    assert rows.nonzero()[0].item() == (1024 - 767) // 2
    assert pixels[:, 0, 0].tolist() == list(CLIP_GREY)


def test_extreme_strip_keeps_fourteen_pixels() -> None:
    pixels = to_pixels(Image.new("RGB", (5000, 1)), 384, (127, 127, 127))
    assert int((pixels == 0).all(dim=0).any(dim=1).sum()) == 14


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [["red", "blue"]] * 3),
        (2, [["blue", "red"]] * 3),
        (3, [["blue", "red"]] * 3),
        (4, [["red", "blue"]] * 3),
        (5, [["red"] * 3, ["blue"] * 3]),
        (6, [["red"] * 3, ["blue"] * 3]),
        (7, [["blue"] * 3, ["red"] * 3]),
        (8, [["blue"] * 3, ["red"] * 3]),
    ],
)
def test_exif_rotation(orientation: int, expected: list[list[str]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encode(RED_LEFT, "PNG", exif=exif))
    names = {(255, 0, 0): "red", (0, 0, 255): "blue"}
    assert [[names[tuple(pixel)] for pixel in row] for row in np.array(image).tolist()] == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_of_an_asymmetric_image_equals_pillows(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(5, 7), "PNG", exif=exif)
    assert np.array_equal(decode_image(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def test_damaged_exif_is_ignored() -> None:
    assert decode_image(encode(RED_LEFT, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xffgarbage")).size == (2, 3)


def test_cmyk_jpeg() -> None:
    image = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = image.getpixel((8, 8))
    assert image.mode == "RGB"
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    samples = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    image = decode_image(encode(Image.fromarray(samples), kind))
    assert np.array(image)[0].tolist() == [[value] * 3 for value in (0, 1, 128, 255)]


def test_sixteen_bit_samples_of_pnm() -> None:
    assert np.array(decode_image(b"P5 2 1 65535\n\x80\x00\xff\xff"))[0].tolist() == [[128] * 3, [255] * 3]


def test_palette_with_transparency_shows_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 0, 0, 0])
    image.putdata([0, 1])
    decoded = decode_image(encode(image, "PNG", transparency=1))
    assert np.array(decoded)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_palette_without_transparency() -> None:
    image = RED_LEFT.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(decode_image(encode(image, "GIF")), RED_LEFT)


def test_rgba_is_blended_with_white() -> None:
    decoded = decode_image(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))
    assert decoded.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(("mode", "colour"), [("L", 200), ("1", 1), ("LA", (200, 255))])
def test_grey_kinds(mode: str, colour: object) -> None:
    decoded = decode_image(encode(Image.new(mode, (3, 2), colour), "PNG"))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((0, 0)) == ((255,) * 3 if mode == "1" else (200,) * 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_multi_picture_jpeg_gives_its_first_picture() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("keep", [0.03, 0.5, 0.9])
def test_truncated_file_is_one_sentence(kind: str, keep: float) -> None:
    data = encode(photo(64, 48), kind)
    cut = data[: int(len(data) * keep)]
    with pytest.raises(ValueError, match=rf"^cat\.x: {len(cut)} bytes .*") as caught:
        decode_image(cut, source="cat.x")
    assert "\n" not in str(caught.value)


def test_damaged_checksum() -> None:
    data = bytearray(encode(photo(64, 48), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError, match=r"^image: \d+ bytes do not decode to 64 x 48"):
        decode_image(bytes(data))


def test_zero_bytes_and_text() -> None:
    with pytest.raises(ValueError, match=r"^a\.png: the image has 0 bytes$"):
        decode_image(b"", source="a.png")
    with pytest.raises(ValueError, match=r"^a\.png: 13 bytes that are not an image"):
        decode_image(b"<html></html>", source="a.png")


def test_no_program_is_started_for_postscript() -> None:
    with pytest.raises(ValueError, match="not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(RED_LEFT, "PNG"))
    assert np.array_equal(decode_image(tmp_path / "a.png"), RED_LEFT)
    assert np.array_equal(decode_image(str(tmp_path / "a.png")), RED_LEFT)
    with pytest.raises(ValueError, match=r"none\.png: the image cannot be read: No such file"):
        decode_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="Is a directory"):
        decode_image(tmp_path)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises any size and that holds one byte of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_bomb_is_refused_from_its_header() -> None:
    with pytest.raises(ValueError, match=rf"^b: 9000 x 9000 = 81000000 pixels, the limit is {MAX_PIXELS}$"):
        decode_image(png_header(9000, 9000), source="b")
    with pytest.raises(ValueError, match=rf"^b: Image size \(3600000000 pixels\).*limit here {MAX_PIXELS}$"):
        decode_image(png_header(60_000, 60_000), source="b")
    with pytest.raises(ValueError, match=r"^b: a side of 70000 pixels \(limit 65535\)"):
        decode_image(png_header(70_000, 2), source="b")
    with pytest.raises(ValueError, match=r"100 x 10 = 1000 pixels, the limit is 999"):
        decode_image(encode(photo(100, 10), "PNG"), max_pixels=999)


def test_floating_point_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point samples have no defined white"):
        decode_image(encode(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF"))
