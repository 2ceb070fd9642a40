"""Uploads are decoded in processes of their own: one that ends its decoder spares the others."""

import asyncio
import os

import cv2
import numpy as np
import psutil
import pytest

from bt_core.errors import ScanError
from bt_core.scans.preprocess import PreprocessSpec
from serve.decoding import UploadDecoder, decode_upload
from tests.scan_files import GREY, RGB16, deadly_dicom, encode

SPECS = (PreprocessSpec(size_px=48),)
PNG = encode(GREY, "PNG")


@pytest.fixture(scope="module")
def decoder():
    decoder = UploadDecoder(num_processes=2)
    yield decoder
    decoder.close()


def outcomes(decoder, *uploads):
    async def all_of():
        return await asyncio.gather(
            *(decoder.decode(content, "", SPECS) for content in uploads), return_exceptions=True
        )

    return asyncio.run(all_of())


def reasons(results):
    return [getattr(result, "reason", "") for result in results]


def test_an_upload_is_decoded_as_in_this_process(decoder):
    (answer,) = outcomes(decoder, PNG)
    pixels, *others = decode_upload(PNG, "", SPECS)
    assert (answer[0][0] == pixels[0]).all()
    assert list(answer[1:]) == others


def test_a_refusal_keeps_its_reason_and_detail(decoder):
    (refusal,) = outcomes(decoder, b"no scan at all")
    with pytest.raises(ScanError) as error:
        decode_upload(b"no scan at all", "", SPECS)
    assert str(refusal) == str(error.value)
    assert refusal.__cause__ is None, "what pebble hangs on would quote the file"


def test_files_that_end_their_decoder_are_refused_and_no_other(decoder):
    """gdcm 3.2 calls abort() on this file; see `deadly_dicom`."""
    results = outcomes(decoder, *[PNG, deadly_dicom()] * 4, PNG)
    assert reasons(results) == ["", "decoder_crashed"] * 4 + [""]


def test_killed_processes_are_replaced_whenever_they_die(decoder):
    own = os.getpid()
    for _ in range(3):
        children = psutil.Process(own).children(recursive=True)
        for child in children:
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
        assert reasons(outcomes(decoder, PNG, PNG)) in (
            ["", ""],
            ["decoder_crashed", ""],
            ["", "decoder_crashed"],
        )
        assert reasons(outcomes(decoder, PNG)) == [""]


def heavy_png():
    """A picture that takes a decoder some tenths of a second, and 320 MB."""
    return cv2.imencode(".png", np.tile(RGB16, (75, 100, 1)))[1].tobytes()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_seconds": 0.05}, "decoder_crashed"),
        ({"max_bytes": 20 * 1024**2}, "image_too_large"),
    ],
)
def test_an_upload_over_a_limit_is_refused_and_the_next_is_not(limits, reason):
    strict = UploadDecoder(num_processes=1, **limits)
    try:
        assert reasons(outcomes(strict, PNG)) == [""]  # and the process is warm
        assert reasons(outcomes(strict, heavy_png(), PNG))[1] == ""
        assert reasons(outcomes(strict, heavy_png()))[0] in (reason, "corrupt_image")
    finally:
        strict.close()
