"""A PNG whose data is stored instead of compressed decodes to the same pixels, or not at all."""

import random
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bt_core.scans.codestream import decode_with_opencv
from bt_core.scans.png import with_stored_data
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
    "one bit": encode(Image.fromarray(GREY).convert("1"), "PNG"),
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
    ],
)
def test_what_is_odd_is_left_as_it_is(spoil):
    content = spoil(KINDS["grey"])
    assert with_stored_data(content) == content
