"""Pictures of every kind that Pillow opens: what they are as 8 bits of RGB, and what is told."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stagewise.recipes.to_rgb import to_rgb

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def read(data):
    picture, notes = to_rgb(Image.open(io.BytesIO(data)))
    assert picture.mode == "RGB"
    return np.asarray(picture), notes


def stored(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def grey(pixels):
    return np.repeat(pixels[..., None], 3, axis=2)


def test_a_plain_picture_is_taken_as_it_is():
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        pixels, notes = read(stored(Image.fromarray(COLOUR), kind))
        assert np.array_equal(pixels, COLOUR)
        assert notes == []
    for mode in ("L", "P", "1"):
        picture = Image.fromarray(GREY).convert(mode)
        pixels, notes = read(stored(picture, "PNG"))
        assert np.array_equal(pixels, np.asarray(picture.convert("RGB")))
        assert notes == []


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind):
    wide = GREY.astype(np.uint16) * 257
    pixels, notes = read(stored(Image.fromarray(wide), kind))
    assert np.array_equal(pixels, grey(GREY))
    assert notes == ["16 bits to 8"]
    # To the nearest of the 256 levels; the ends are black and white.
    between = np.array([[0, 128, 129, 257, 65407, 65406, 65535]], dtype=np.uint16)
    pixels, _ = read(stored(Image.fromarray(between), kind))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 255, 254, 255]


def tiff(pixels, bits, photometric, data=None, order="<"):
    """A TIFF of one strip, by hand: of kinds that Pillow reads and does not write."""
    data = pixels.tobytes() if data is None else data
    height, width = pixels.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data))]
    start = 8 + len(data)
    found = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, start) + data
    found += struct.pack(order + "H", len(tags))
    for tag, value in tags:
        kind = "HHIHH" if value < 65536 else "HHII"
        found += struct.pack(order + kind, tag, 3, 1, value, *([0] if kind == "HHIHH" else []))
    return found + struct.pack(order + "I", 0)


def test_tiffs_whose_white_is_elsewhere():
    wide = GREY.astype("<u2") * 257
    assert np.array_equal(read(tiff(wide, 16, 0))[0], 255 - grey(GREY))
    assert np.array_equal(read(tiff(wide.astype(">u2"), 16, 1, order=">"))[0], grey(GREY))
    twelve = np.array([[0, 4095, 2048, 16]], dtype=np.uint16)
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x10])  # two numbers in three bytes
    pixels, notes = read(tiff(twelve, 12, 1, packed))
    assert pixels[0, :, 0].tolist() == [0, 255, 128, 1]
    assert notes == ["16 bits to 8"]


@pytest.mark.parametrize("kind", ["F", "I"])
def test_pixels_without_a_known_white_are_refused(kind):
    with pytest.raises(
        ValueError, match=f"no known white .{kind}, 32 bits.: write it with 8 or 16"
    ):
        read(stored(Image.fromarray(GREY).convert(kind), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(kind, orientation):
    """Against the table of the standard: where the first row and the first column belong."""
    blocks = np.kron(np.array([[0, 80, 160], [40, 120, 250]], dtype=np.uint8), np.ones((16, 16)))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    data = stored(Image.fromarray(blocks.astype(np.uint8)), kind, exif=exif, **options)
    pixels, notes = read(data)
    turned = {
        1: blocks,
        2: blocks[:, ::-1],
        3: blocks[::-1, ::-1],
        4: blocks[::-1],
        5: blocks.T,
        6: blocks[::-1].T,
        7: blocks[::-1, ::-1].T,
        8: blocks[:, ::-1].T,
    }[orientation]
    assert pixels.shape[:2] == turned.shape
    assert np.abs(pixels[..., 0] - turned).max() <= 4
    assert notes == ([] if orientation == 1 else ["turned upright"])


def test_16_bits_are_turned_too():
    exif = Image.Exif()
    exif[274] = 6
    wide = GREY[:4].astype(np.uint16) * 257
    pixels, notes = read(stored(Image.fromarray(wide), "PNG", exif=exif))
    assert np.array_equal(pixels, grey(GREY[:4][::-1].T))
    assert notes == ["turned upright", "16 bits to 8"]


def test_damaged_exif_is_no_damaged_picture():
    data = stored(Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1")
    pixels, notes = read(data)
    assert np.array_equal(pixels, COLOUR)
    assert notes == []


def with_alpha():
    alpha = np.zeros((8, 6), dtype=np.uint8)
    alpha[:3], alpha[3:5] = 255, 128
    share = alpha[..., None] / 255
    return alpha, COLOUR * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparent_parts_are_on_white(kind):
    alpha, wanted = with_alpha()
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    picture = Image.fromarray(np.dstack([COLOUR, alpha]))
    pixels, notes = read(stored(picture, kind, **options))
    assert np.abs(pixels - wanted).max() <= 1
    assert np.array_equal(pixels[:3], COLOUR[:3])
    assert notes == ["transparent parts on white"]
    # Where nothing is transparent, nothing changes and nothing is told.
    picture.putalpha(255)
    pixels, notes = read(stored(picture, kind, **options))
    assert np.array_equal(pixels, COLOUR)
    assert notes == []


def test_grey_with_alpha_and_colours_that_are_transparent():
    picture = Image.merge("LA", [Image.fromarray(part) for part in (GREY, GREY)])
    pixels, notes = read(stored(picture, "PNG"))
    share = GREY / 255
    assert np.abs(pixels - grey(GREY * share + 255 * (1 - share))).max() <= 1
    assert notes == ["transparent parts on white"]
    palette = Image.fromarray(GREY).convert("P")
    colours = np.asarray(palette.convert("RGB"))
    pixels, notes = read(stored(palette, "PNG", transparency=int(np.asarray(palette)[0, 0])))
    assert pixels[0, 0].tolist() == [255] * 3
    assert np.array_equal(pixels[1:], colours[1:])
    assert notes == ["transparent parts on white"]
    for picture, hidden in ((Image.fromarray(GREY), 8), (Image.fromarray(grey(GREY)), (8,) * 3)):
        pixels, notes = read(stored(picture, "PNG", transparency=hidden))
        assert np.array_equal(pixels, grey(np.where(GREY == 8, 255, GREY)))
        assert notes == ["transparent parts on white"]


def test_16_bits_with_a_transparent_level():
    wide = GREY.astype(np.uint16) * 257
    data = stored(Image.fromarray(wide), "PNG", transparency=8 * 257)
    if Image.open(io.BytesIO(data)).info.get("transparency") is None:  # Pillow does not write it
        chunk = b"tRNS" + struct.pack(">H", 8 * 257)
        chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
        at = data.index(b"IDAT") - 4
        data = data[:at] + chunk + data[at:]
    pixels, _ = read(data)
    assert np.array_equal(pixels, grey(np.where(GREY == 8, 255, GREY)))


def test_four_inks():
    picture = Image.fromarray(np.dstack([COLOUR, GREY[:, :6]]), "CMYK")
    pixels, notes = read(stored(picture, "TIFF"))
    inks, black = COLOUR.astype(float), GREY[:, :6, None].astype(float)
    assert np.abs(pixels - (255 - inks) * (255 - black) / 255).max() <= 1
    assert notes == ["CMYK to RGB"]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_of_frames_the_first_is_taken(kind):
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (250, 20, 90)]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    pixels, notes = read(
        stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    )
    assert (pixels == 250).all()
    assert notes == ["the first of 3 frames"]
