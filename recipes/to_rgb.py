"""From a picture of any kind to 8 bits of red, green and blue, with notes on what was changed.

    16 bits a pixel      divided by 257, so that 65535 is white; Pillow's conversion clips at 255
    orientation of EXIF  turned upright, as viewers show it
    transparency         put on white, which hides the colours under transparent parts
    CMYK, LAB            by Pillow, without colour profiles, as in the public training code
    frames               the first

Pixels without a known white, floating-point or with 32 bits, are refused.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = ["to_rgb"]

_ORIENTATION, _BITS, _WHITE_IS_ZERO = 274, 258, 262  # tags of TIFF, the first of EXIF too


def to_rgb(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """An opened picture in mode RGB, and notes on what was changed.

    Raises:
        ValueError: If its pixels have no known white. Decoders raise other errors.
    """
    notes = []
    # Read before the picture is loaded, which may close the file, and turns a TIFF.
    tags, kind = dict(getattr(picture, "tag_v2", {})), picture.format
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and kind != "MPO":  # a JPEG with previews, as phones write it
        notes.append(f"the first of {frames} frames")
    picture.load()
    upright = ImageOps.exif_transpose(picture) if _orientation(picture) != 1 else picture
    if upright is not picture or tags.get(_ORIENTATION, 1) != 1:
        notes.append("turned upright")
    if upright.mode == "F" or (upright.mode == "I" and kind == "TIFF"):
        raise ValueError(
            f"its numbers have no known white ({upright.mode}, 32 bits): write it with 8 or 16 bits"
        )
    if upright.mode.startswith("I"):
        notes.append("16 bits to 8")
        upright = _to_8_bits(upright, tags)
    if "A" in upright.getbands() or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent parts on white")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB"), notes
    if upright.mode in ("CMYK", "LAB"):
        notes.append(f"{upright.mode} to RGB")
    return upright.convert("RGB"), notes


def _orientation(picture: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF is no damaged picture
        return 1


def _to_8_bits(picture: Image.Image, tags: dict[int, Any]) -> Image.Image:
    pixels = np.asarray(picture).astype(np.int64)
    bits = tags.get(_BITS, (16,))
    white = 2 ** int(bits[0]) - 1  # 12 bits are stored in 16
    grey = (pixels * 255 + white // 2) // white
    if tags.get(_WHITE_IS_ZERO) == 0:
        grey = 255 - grey
    hidden = picture.info.get("transparency")
    if hidden is not None:
        grey[pixels == hidden] = 255
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))
