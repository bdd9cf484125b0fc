"""Bytes from strangers to the one array that every later stage sees.

The structure of the file is walked before Pillow is given a byte, so that what Pillow opens is one still picture
of a known size with nothing behind it.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from robustkit.serve.refusal import Refused

Pixels = NDArray[np.uint8]

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}  # what eight bits a channel and a screen can show
_MOST_SCANS = 64  # of a progressive JPEG; each costs a pass over the whole picture, for a few bytes
# In a JPEG's scan, FF00 is a byte of data and FFD0 to FFD7 are restarts: any other marker ends the scan.
_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


def decode(body: bytes, shape: tuple[int, int, int], *, most_pixels: int = 16_000_000) -> Pixels:
    """The picture in `body`, upright, as a model of input `shape` takes it.

    A picture of exactly the model's size keeps its pixels; another is stretched to it (bilinear, antialiased).
    Transparent parts are laid on white, as a viewer shows them.
    Shapes: PNG or JPEG -> uint8 [H, W, C], C = 1 (grey) or 3 (RGB).
    Raises: Refused, 415 for another format, 413 for more than `most_pixels`, 422 for a file that is damaged,
    animated, or holds more than one picture.
    """
    if body.startswith(_PNG):
        form, (width, height) = "PNG", _walk_png(body)
    elif body.startswith(_JPEG):
        form, (width, height) = "JPEG", _walk_jpeg(body)
    else:
        raise Refused(415, "the body is neither a PNG nor a JPEG; send one of the two.")
    if width * height > most_pixels:
        raise Refused(
            413,
            f"the image has {width} x {height} pixels, at most {most_pixels:,} are taken; send a smaller one.",
        )
    try:
        return _pixels(body, form, shape)
    except Refused:
        raise
    # Whatever a decoder says about a stranger's bytes is the stranger's mistake, in any of its exceptions.
    except Exception as error:
        raise Refused(
            422, f"the {form} cannot be decoded ({type(error).__name__}); save it again."
        ) from error


def _pixels(body: bytes, form: str, shape: tuple[int, int, int]) -> Pixels:
    height, width, channels = shape
    with Image.open(io.BytesIO(body), formats=[form]) as image:
        if image.mode not in _MODES:
            raise Refused(422, f"the {form} is of mode {image.mode}; save it with 8 bits, grey or RGB.")
        upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    canonical = upright.convert("L" if channels == 1 else "RGB")
    if canonical.size != (width, height):
        canonical = canonical.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(canonical, dtype=np.uint8).reshape(shape)


# --- the structure of a file ------------------------------------------------------------------------


def _walk_png(body: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose chunks are whole and end where the file ends. Raises: Refused.

    Source: PNG, third edition (W3C), section 5: length, type, data and CRC of a chunk.
    """
    size, at, kind = (0, 0), len(_PNG), b""
    while kind != b"IEND":
        head = body[at : at + 8]
        length = int.from_bytes(head[:4], "big")
        kind = head[4:]
        end = at + 12 + length
        if len(head) < 8 or end > len(body):
            raise Refused(422, "the PNG is cut off; send the whole file.")
        data = body[at + 8 : end - 4]
        if zlib.crc32(kind + data) != int.from_bytes(body[end - 4 : end], "big"):
            raise Refused(422, "a chunk of the PNG is damaged; save it again.")
        if (kind == b"IHDR") != (at == len(_PNG)) or (kind == b"IHDR" and length != 13):
            raise Refused(422, "the PNG does not begin with its one header; save it again.")
        if kind == b"IHDR":
            size = struct.unpack(">II", data[:8])
        if kind in (b"acTL", b"fcTL", b"fdAT"):
            raise Refused(422, "the PNG is animated; send a still image.")
        at = end
    return _checked("PNG", size, rest=len(body) - at)


def _walk_jpeg(body: bytes) -> tuple[int, int]:
    """Width and height of a JPEG that holds one picture and ends where the file ends. Raises: Refused.

    Source: ITU-T T.81, annex B: markers, their lengths, and what may stand between them.
    """
    size, at, scans, marker = (0, 0), 2, 0, 0
    while marker != 0xD9:
        found = _END_OF_SCAN.match(body, at)
        if found is None or found.end() + (found[0][-1] != 0xD9) * 2 > len(body):
            raise Refused(422, "the JPEG is cut off or damaged; send the whole file.")
        marker, at = found[0][-1], found.end()
        if marker == 0xD9:
            break
        length = int.from_bytes(body[at : at + 2], "big")
        data = body[at + 2 : at + length]
        if length < 2 or at + length > len(body) or marker in (0x01, 0xD8):
            raise Refused(422, "the JPEG is cut off or damaged; send the whole file.")
        at += length
        if marker == 0xE2 and data.startswith(b"MPF\0"):
            raise Refused(422, "the JPEG holds several pictures; send one.")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if size != (0, 0) or len(data) < 6:
                raise Refused(422, "the JPEG has more than one frame, or half of one; save it again.")
            size = (int.from_bytes(data[3:5], "big"), int.from_bytes(data[1:3], "big"))
        if marker == 0xDA:
            scans += 1
            if scans > _MOST_SCANS:
                raise Refused(422, f"the JPEG has more than {_MOST_SCANS} scans; save it again.")
            end = _END_OF_SCAN.search(body, at)
            at = len(body) if end is None else end.start()
    return _checked("JPEG", size, rest=len(body) - at)


def _checked(form: str, size: tuple[int, int], *, rest: int) -> tuple[int, int]:
    if rest:
        raise Refused(422, f"{rest} bytes follow the end of the {form}; send the image alone.")
    if 0 in size:
        raise Refused(422, f"the {form} has no pixels; save it again.")
    return size
