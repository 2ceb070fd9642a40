"""A PNG whose data is stored instead of compressed decodes to the same pixels, or not at all."""

import random
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bt_core.scans.codestream import decode_with_opencv
from bt_core.scans.png import plain_size, with_stored_data
from tests.fuzz_decode import mutate
from tests.scan_files import GREY, GREY16, RGB, RGB16, encode, encode_cv2

RGBA = np.dstack([RGB, GREY])
KINDS = {
    "grey": encode(GREY, "PNG"),
    "grey 16": encode_cv2(GREY16, ".png"),
    "rgb": encode(RGB, "PNG"),
    "rgb 16": encode_cv2(RGB16, ".png"),
    "rgba": encode(RGBA, "PNG"),
    "grey and alpha": encode(Image.fromarray(GREY).convert("LA"), "PNG"),
    "palette": encode(Image.fromarray(RGB).convert("P"), "PNG"),
    "one bit": encode(Image.fromarray(GREY > 128), "PNG"),
    "one row in many chunks": b"",
    "all filters": encode_cv2(GREY, ".png", (cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_ALL_FILTERS)),
}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def in_small_chunks(content):
    """The same PNG with its data in chunks of 100 bytes."""
    start = content.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", content, start)
    data = content[start + 8 : start + 8 + length]
    parts = [chunk(b"IDAT", data[i : i + 100]) for i in range(0, length, 100)]
    return content[:start] + b"".join(parts) + content[start + length + 12 :]


KINDS["one row in many chunks"] = in_small_chunks(KINDS["grey"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_stored_and_keeps_its_pixels(kind):
    content = KINDS[kind]
    stored = with_stored_data(content)
    assert stored != content
    image = decode_with_opencv(content)
    assert image is not None
    np.testing.assert_array_equal(decode_with_opencv(stored), image)


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(sorted(KINDS)))
def test_a_damaged_one_is_judged_the_same(seed, kind):
    content = mutate(random.Random(seed), [KINDS[kind]])
    if content[12:16] != b"IHDR":
        return
    before, after = decode_with_opencv(content), decode_with_opencv(with_stored_data(content))
    assert (before is None) == (after is None)
    assert before is None or np.array_equal(before, after)


def with_data(png, data):
    """The PNG with other data in its one data chunk."""
    start = png.index(b"IDAT") - 4
    return png[:start] + chunk(b"IDAT", data) + png[-12:]


def data_of(png):
    start = png.index(b"IDAT") - 4
    return png[start + 8 : start + 8 + int.from_bytes(png[start : start + 4], "big")]


def small_window(png):
    """Packed over the whole picture, but stating a window of 256 bytes."""
    data = bytearray(data_of(png))
    data[0], data[1] = 0x08, data[1] & 0xC0
    data[1] += 31 - int.from_bytes(data[:2], "big") % 31  # RFC 1950: a multiple of 31
    return with_data(png, bytes(data))


def split_by_a_text(png):
    data = data_of(png)
    start = png.index(b"IDAT") - 4
    parts = [chunk(b"IDAT", data[:50]), chunk(b"tEXt", b"a\0b"), chunk(b"IDAT", data[50:])]
    return png[:start] + b"".join(parts) + png[-12:]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda png: png[:-16] + bytes([png[-16] ^ 1]) + png[-15:],  # checksum of the data
        lambda png: png[:30],
        lambda png: png[:33] + png[-12:],  # no data
        lambda png: png[:28] + b"\1" + png[29:],  # claims to be interlaced
        lambda png: png[:16] + struct.pack(">I", 57) + png[20:],  # wider than its data
        lambda png: png[:16] + struct.pack(">I", 55) + png[20:],
        lambda png: png[:25] + b"\7" + png[26:],  # no such colour type
        lambda png: with_data(png, data_of(png) + b"more"),
        lambda png: with_data(png, zlib.compress(bytes(30_000_000))),  # a bomb
        small_window,
        split_by_a_text,
        lambda png: png[:-12] + chunk(b"IDAT", b"") * 5000 + png[-12:],
    ],
)
def test_what_is_odd_is_left_as_it_is(spoil):
    content = spoil(KINDS["grey"])
    assert with_stored_data(content) == content


def test_a_bomb_is_not_unpacked():
    bomb = with_data(KINDS["grey"], zlib.compress(bytes(200_000_000), 9))
    tracemalloc.start()
    with_stored_data(bomb)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(2100, 2100), (500, 500)])
def test_what_would_not_gain_is_left_as_it_is(shape):
    rng = np.random.default_rng(0)
    large, noise = np.zeros((2100, 2100), np.uint8), rng.integers(0, 256, (500, 500), np.uint8)
    content = encode(large if shape[0] > 2000 else noise, "PNG")
    assert with_stored_data(content) == content


def test_a_moving_picture_is_not_plain():
    png = KINDS["grey"]
    moving = png[:33] + chunk(b"acTL", struct.pack(">II", 2, 0)) + png[33:]
    assert plain_size(png) == (56, 40)
    assert plain_size(moving) is None
