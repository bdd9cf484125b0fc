"""The decoder against files whose pixels are known, files that lie, and bytes that nobody meant as a file."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from robustkit.serve.decode import decode
from robustkit.serve.refusal import Refused

SHAPE = (32, 32, 3)
PIXELS = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def saved(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data, *extra):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(data, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PNG = saved(Image.fromarray(PIXELS))
JPEG = saved(Image.fromarray(PIXELS), "JPEG", quality=95)


def refusal(body, shape=SHAPE):
    with pytest.raises(Refused) as caught:
        decode(body, shape)
    assert str(caught.value).count(".") >= 1
    return caught.value.status, str(caught.value)


def test_a_png_of_the_models_size_keeps_every_pixel():
    assert (decode(PNG, SHAPE) == PIXELS).all()
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS)  # a PNG that no library wrote
    assert (decode(png(32, 32, rows), SHAPE) == PIXELS).all()


def test_grey_models_take_grey_and_colour():
    grey = PIXELS[:, :, 0]
    assert (decode(saved(Image.fromarray(grey)), (32, 32, 1))[:, :, 0] == grey).all()
    assert (decode(saved(Image.fromarray(grey)), SHAPE) == grey[:, :, None]).all()
    assert decode(PNG, (32, 32, 1)).shape == (32, 32, 1)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_jpegs_of_every_kind(options):
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 6, SHAPE).copy()
    body = saved(Image.fromarray(smooth), "JPEG", quality=95, **options)
    assert np.abs(decode(body, SHAPE).astype(int) - smooth).max() <= 6


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(form, orientation):
    # The standard's table, by hand: what a viewer must do to the stored pixels.
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    corner = np.zeros(SHAPE, np.uint8)
    corner[:16, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(saved(Image.fromarray(corner), form, exif=exif), SHAPE)
    assert np.abs(found.astype(int) - undo(corner)).mean() < 3


def test_transparent_parts_are_white_as_in_a_viewer():
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:, :16, 3] = 255
    found = decode(saved(Image.fromarray(clear)), SHAPE)
    assert (found[:, :16] == 0).all()
    assert (found[:, 16:] == 255).all()


def test_other_sizes_are_stretched_without_aliases():
    lines = np.zeros((320, 320, 3), np.uint8)
    lines[::2] = 255  # every second row: a sampler without a filter sees all black or all white
    found = decode(saved(Image.fromarray(lines)), SHAPE)
    assert found.shape == SHAPE
    assert np.abs(found.astype(int) - 127).max() <= 5


def test_a_bomb_is_refused_by_its_header():
    bomb = png(30_000, 30_000, b"\0" * 10_000_000)
    started = time.perf_counter()
    status, said = refusal(bomb)
    assert status == 413
    assert "30000 x 30000" in said
    assert time.perf_counter() - started < 0.05


def test_a_png_that_holds_more_or_less_than_its_header_says():
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS)
    assert (decode(png(32, 32, rows + bytes(20_000_000)), SHAPE) == PIXELS).all()  # never inflated further
    assert refusal(png(32, 32, rows[:500]))[0] == 422


def test_compressed_text_cannot_fill_the_memory():
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 9))
    assert refusal(png(32, 32, bytes(97 * 32), text))[0] == 422


@pytest.mark.parametrize("body", [PNG, JPEG], ids=["png", "jpeg"])
@pytest.mark.parametrize("tail", [b"\0", b"PK\x03\x04", b"<script>alert(1)</script>", PNG, JPEG])
def test_nothing_may_follow_the_picture(body, tail):
    status, said = refusal(body + tail)
    assert status == 422
    assert f"{len(tail)} bytes follow" in said


@pytest.mark.parametrize("body", [PNG, JPEG], ids=["png", "jpeg"])
def test_every_cut_is_refused(body):
    for end in range(len(body)):
        assert refusal(body[:end])[0] in (415, 422)


def test_animated_and_several_pictures():
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1])]
    assert "animated" in refusal(saved(frames[0], save_all=True, append_images=frames[1:]))[1]
    body = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert refusal(body)[0] == 422


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PDF", "EPS"])
def test_other_formats(form):
    assert refusal(saved(Image.fromarray(PIXELS), form))[0] == 415


def test_other_modes():
    deep = Image.fromarray(np.full((32, 32), 40_000, np.uint16))
    assert "8 bits" in refusal(saved(deep))[1]
    assert "mode CMYK" in refusal(saved(Image.new("CMYK", (32, 32)), "JPEG"))[1]


def test_a_jpeg_of_many_scans():
    scan = JPEG[JPEG.index(b"\xff\xda") : -2]
    assert "scans" in refusal(JPEG[:-2] + 70 * scan + b"\xff\xd9")[1]


def test_damage_shows():
    for at in range(8, len(PNG), 97):
        changed = bytearray(PNG)
        changed[at] ^= 1
        assert refusal(bytes(changed))[0] == 422  # each byte of a PNG lies under a checksum


def never_fails(body):
    """What every program that calls itself a decoder must satisfy: an image or a refusal, nothing else."""
    try:
        image = decode(body, SHAPE)
    except Refused as refused:
        status = refused.status
    else:
        assert (image.shape, image.dtype) == (SHAPE, np.uint8)
        status = 200
    assert status in (200, 413, 415, 422)


@given(st.binary(max_size=400), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]))
@example(b"\xd9", b"\xff\xd8\xff")
@settings(deadline=None, max_examples=200)
def test_any_bytes(body, start):
    never_fails(start + body)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_change_of_a_file(data):
    body = bytearray(data.draw(st.sampled_from([PNG, JPEG, saved(Image.fromarray(PIXELS).convert("P"))])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(body) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "repeat"]))
        if change == "set":
            body[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del body[at : at + data.draw(st.integers(1, 40))]
        else:
            body[at:at] = body[at : at + data.draw(st.integers(1, 40))]
        if not body:
            break
    never_fails(bytes(body))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=60), st.binary(max_size=12))
@settings(deadline=None, max_examples=200)
def test_any_header_whose_checksums_hold(width, height, data, kind):
    never_fails(png(width, height, data, chunk(kind[:4].ljust(4, b"a"), data)))
