"""Anybody's picture comes out as the 32x32 that it should."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import bomb, encoded, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from classifier import UserError, letterbox, read_image, to_pixels

GRAY = (128, 128, 128)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 60), st.booleans())
def test_any_size_becomes_32x32_with_centered_bars(long, short, tall):
    size = (short, long) if tall else (long, short)
    pixels = np.asarray(letterbox(Image.new("RGB", size, (255, 0, 0))))
    assert pixels.shape == (32, 32, 3)
    red = (pixels == (255, 0, 0)).all(2)
    gray = (pixels == GRAY).all(2)
    assert (red | gray).all() and red.any()
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    scale = 32 / max(size)
    assert (len(columns), len(rows)) == tuple(max(1, round(side * scale)) for side in size)
    for found in (rows, columns):
        assert abs(found[0] - (31 - found[-1])) <= 1


def test_resampling_is_lanczos():
    picture = noise(100, 50)
    expected = np.asarray(picture.resize((32, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(np.asarray(letterbox(picture))[8:24], expected)


def test_to_pixels():
    pixels = to_pixels(Image.new("RGB", (3, 2), (1, 2, 3)))
    assert (
        pixels.shape == (3, 2, 3)
        and pixels.dtype == torch.uint8
        and pixels[:, 0, 0].tolist() == [1, 2, 3]
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = Image.new("RGB", (40, 20), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 0, 20, 10))  # top left: blue
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_image(encoded(stored, exif=exif))
    assert found.size == (40, 20)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_the_letterboxs_gray(mode):
    picture = Image.new("RGBA", (10, 10), (255, 0, 0, 255))
    picture.paste((9, 9, 9, 0), (0, 0, 5, 10))
    picture = picture.convert(mode) if mode != "P" else picture.quantize(4)
    found = np.asarray(read_image(encoded(picture)))
    assert tuple(found[0, 0]) == GRAY and tuple(found[0, 9]) != GRAY


def two_pixels(depth, colour, row, transparent):
    """A PNG of two pixels, the first transparent; Pillow does not write all depths."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)
    content = {
        b"IHDR": header,
        b"tRNS": transparent,
        b"IDAT": zlib.compress(b"\0" + row),
        b"IEND": b"",
    }
    chunks = [(struct.pack(">I", len(data)), kind + data) for kind, data in content.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        length + chunk + struct.pack(">I", zlib.crc32(chunk)) for length, chunk in chunks
    )


@pytest.mark.parametrize(
    "depth,colour,row,transparent,other",
    [
        (8, 0, bytes([10, 200]), [10], (200, 200, 200)),
        (16, 0, struct.pack(">2H", 1000, 60000), [1000], (233, 233, 233)),
        (8, 2, bytes([10, 20, 30, 200, 0, 0]), [10, 20, 30], (200, 0, 0)),
    ],
    ids=["gray 8", "gray 16", "RGB 8"],
)
def test_a_transparent_colour_becomes_the_letterboxs_gray(depth, colour, row, transparent, other):
    key = struct.pack(f">{len(transparent)}H", *transparent)
    found = read_image(two_pixels(depth, colour, row, key))
    assert found.getpixel((0, 0)) == GRAY
    assert np.abs(np.subtract(found.getpixel((1, 0)), other)).max() <= 1


@pytest.mark.parametrize(
    "mode,kind", [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "GIF")]
)
def test_other_modes_keep_their_brightness(mode, kind):
    white, black = (
        np.asarray(
            read_image(encoded(Image.new("RGB", (16, 16), colour).convert(mode), kind))
        ).mean()
        for colour in ("white", "black")
    )
    assert white > 250 and black < 5


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_gray_keeps_its_levels(order):
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(order).reshape(64, 64)
    picture = Image.frombytes("I;16" if order == "<u2" else "I;16B", (64, 64), ramp.tobytes())
    levels = np.asarray(read_image(encoded(picture, "TIFF")))[..., 0]
    np.testing.assert_allclose(levels, ramp.astype(float) / 257, atol=0.51)


def test_float_and_32_bit_pictures():
    for values in (
        np.linspace(0, 1, 256, dtype=np.float32),
        np.arange(256, dtype=np.int32) * 257,
        np.arange(256, dtype=np.int32),
    ):
        levels = np.asarray(read_image(Image.fromarray(values.reshape(16, 16))))[..., 0].ravel()
        np.testing.assert_allclose(levels, np.arange(256), atol=1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    found = read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(np.subtract(found.getpixel((5, 5)), (255, 0, 0))).max() <= 2


def test_big_jpegs_are_decoded_at_a_fraction_and_look_the_same():
    picture = noise(20, 15).resize((2000, 1500), Image.Resampling.BICUBIC)
    data = encoded(picture, "JPEG", quality=95)
    plain = letterbox(Image.open(io.BytesIO(data)).convert("RGB"))
    quick = read_image(data)
    assert quick.size == (250, 188)
    assert np.abs(np.asarray(plain, dtype=int) - np.asarray(letterbox(quick))).mean() < 2


@pytest.mark.parametrize(
    "data,words",
    [
        (b"", "empty"),
        (b"hello, I am a text", "not a picture"),
        (encoded(noise(64, 64))[:900], "truncated"),
        (encoded(noise(64, 64), "JPEG")[:700], "truncated"),
        (bomb(), "900000000 pixels. exceeds limit"),
        (bomb(7000, 4000), "7000x4000 pixels.*25 million"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "HEIC"),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "bomb", "too many pixels", "HEIC"],
)
def test_unreadable_pictures_say_why(data, words):
    with pytest.raises(UserError, match=words):
        read_image(data)


def test_unreadable_paths_say_why(tmp_path):
    with pytest.raises(UserError, match="no such picture"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="(?i)directory"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")  # nobody writes: opening it would wait for ever
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            read_image(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I;16", "CMYK", "L"])
def test_large_pictures_are_averaged_first(mode):
    values = np.add.outer(np.linspace(0, 120, 1500), np.linspace(0, 120, 2500))
    picture = (
        Image.fromarray((values * 257).astype(np.uint16))
        if mode == "I;16"
        else Image.fromarray(values.astype(np.uint8)).convert(mode)
    )
    found = read_image(encoded(picture, "TIFF" if mode == "CMYK" else "PNG"))
    assert found.size == (625, 375)
    plain = Image.fromarray(values.astype(np.uint8)).resize((32, 19), Image.Resampling.LANCZOS)
    difference = np.asarray(
        found.resize((32, 19), Image.Resampling.LANCZOS).convert("L"), int
    ) - np.asarray(plain)
    assert np.abs(difference).mean() < 2
