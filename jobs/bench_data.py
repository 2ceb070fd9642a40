"""`bt bench audit` and `bt bench decode`: what finding copies and reading scans costs."""

import functools
import itertools
import json
import multiprocessing
import os
import resource
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any

import typer

from bt_core.errors import EXIT_OK, UsageError
from jobs.bench import JsonOption, apart, medians_line

_COPIES = 10
"""One scan in so many is a perturbed copy of an earlier one."""
_CHUNK = 250


def run_audit(
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="N,N,...", help="Numbers of synthetic scans.")
    ] = "6000,30000,100000",
    as_json: JsonOption = False,
) -> int:
    """Find planted copies among synthetic scans: time and memory for each scan as sets grow.

    One scan in ten is a copy of another: turned, resized, re-encoded and brightened. Starting Ray
    is not counted.
    """
    rows = []
    for size in numbers(sizes):
        with tempfile.TemporaryDirectory() as folder:
            write_phantoms(f"{folder}/scans.zip", size, 96)
            row = {"num_scans": size, **apart(_audit_seconds, f"{folder}/scans.zip")}
        rows.append(row)
        print(
            f"{size:>7} scans: read {1e3 * row['read_seconds'] / size:.2f} ms, search "
            f"{1e3 * row['search_seconds'] / size:.3f} ms, driver memory "
            f"{row['driver_bytes'] / size / 1e3:.1f} kB for each scan; "
            f"{row['num_found']} of {row['num_planted']} planted copies found, "
            f"{row['num_others']} other pairs",
            flush=True,
        )
    if as_json:
        print(json.dumps(rows))
    return EXIT_OK


def run_decode(
    num_scans: Annotated[int, typer.Option("--num-scans", help="PNG members of the zip.")] = 10_000,
    size_px: Annotated[int, typer.Option("--size-px", help="Edge of the PNGs.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the sides take turns.")] = 3,
    as_json: JsonOption = False,
) -> int:
    """Read and decode a zip of PNGs with Ray Data and with one plain process of cv2: scans/s.

    Plain reads and decodes, no more; ours checks and digests too. Ray's start is not counted;
    `ray` has decoded some scans before, `ray_cold` begins with starting its worker processes.
    """
    sides: dict[str, list[float]] = {"plain": [], "ray": [], "ray_cold": []}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/scans.zip"
        write_phantoms(path, num_scans, size_px, turns=8)
        for number in range(rounds):
            sides["plain"].append(num_scans / apart(_plain_decode_seconds, path))
            cold, warm = apart(_ray_decode_seconds, path)
            sides["ray_cold"].append(num_scans / cold)
            sides["ray"].append(num_scans / warm)
            print(f"round {number + 1}: " + medians_line(sides), flush=True)
    ratios = sorted(ray / plain for ray, plain in zip(sides["ray"], sides["plain"], strict=True))
    ratio = ratios[len(ratios) // 2]
    cores = len(os.sched_getaffinity(0))
    print(f"Ray Data on {cores} cores: {ratio:.2f} of one plain process (median of rounds)")
    if as_json:
        print(json.dumps({"ratio": ratio, "scans_per_second": sides}))
    return EXIT_OK


def write_phantoms(path: str, num_scans: int, size_px: int, turns: int = 1) -> None:
    """Write a zip of phantoms as PNG, drawn on all cores.

    With one turn each, `NNNNNN-KKKKKK.jpg` is a perturbed copy of KKKKKK. With more, a phantom is
    written in so many of its flips and rotations, which is quicker than drawing.
    """
    starts = range(0, num_scans, _CHUNK)
    spawn = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    with (
        ProcessPoolExecutor(cores, mp_context=spawn) as pool,
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
    ):
        stops = (min(start + _CHUNK, num_scans) for start in starts)
        draw = _phantoms if turns == 1 else functools.partial(_turned_phantoms, turns)
        chunks = pool.map(draw, starts, stops, itertools.repeat(size_px))
        for name, content in itertools.chain.from_iterable(chunks):
            archive.writestr(name, content)


def _phantoms(start: int, stop: int, size_px: int) -> list[tuple[str, bytes]]:
    import numpy as np

    from bt_core.scans.phantom import encode_picture, perturbed_copy, phantom_slice
    from bt_core.scans.phantom_anatomy import CLASS_NAMES

    members = []
    for i in range(start, stop):
        rng = np.random.default_rng(i)
        original = int(rng.integers(start, i)) if i % _COPIES == _COPIES - 1 else i
        while original != i and original % _COPIES == _COPIES - 1:
            original -= 1
        image = phantom_slice(CLASS_NAMES[original % len(CLASS_NAMES)], original, size_px)
        if original == i:
            members.append((f"{i:06d}.png", encode_picture(image, ".png")))
        else:
            members.append((f"{i:06d}-{original:06d}.jpg", perturbed_copy(image, rng)))
    return members


def _turned_phantoms(turns: int, start: int, stop: int, size_px: int) -> list[tuple[str, bytes]]:
    from bt_core.scans.phantom import encode_picture, phantom_slice
    from bt_core.scans.thumbnails import transformed

    members = []
    for i in range(start, stop):
        if (i - start) % turns == 0:
            image = phantom_slice("glioma", i, size_px)
        turned = transformed(image, (i - start) % turns)
        members.append((f"{i:06d}.png", encode_picture(turned, ".png")))
    return members


def _audit_seconds(path: str) -> dict[str, Any]:
    import pyarrow as pa

    from bt_core.data.catalog import ref_columns
    from bt_core.data.families import FamilyStage
    from bt_core.data.pipeline import describe_scans, find_copies
    from bt_core.scans.archives import list_scans
    from cluster.session import session

    with session():
        before, started = _peak_bytes(), time.perf_counter()
        refs = pa.table(ref_columns(list_scans(path).refs))
        catalog, thumbnails, spectra = describe_scans(refs, FamilyStage())
        read = time.perf_counter()
        pairs = find_copies(catalog, thumbnails, spectra)
        searched = time.perf_counter()
        peak = _peak_bytes()
    names = [name.split(".")[0] for name in catalog["member"].to_pylist()]
    planted = {(name[7:], name[:6]) for name in names if "-" in name}
    found = {
        tuple(sorted((names[left][:6], names[right][:6])))
        for left, right in zip(pairs.left_P, pairs.right_P, strict=True)
    }
    origin = {name[:6]: name[7:] or name[:6] for name in names}
    others = [pair for pair in found if origin[pair[0]] != origin[pair[1]]]
    return {
        "read_seconds": read - started,
        "search_seconds": searched - read,
        "driver_bytes": peak - before,
        "num_planted": len(planted),
        "num_found": len(planted & found),
        "num_others": len(others),
    }


def _plain_decode_seconds(path: str) -> float:
    from jobs.baselines import plain_decode

    started = time.perf_counter()
    plain_decode(path)
    return time.perf_counter() - started


def _ray_decode_seconds(path: str) -> tuple[float, float]:
    import pyarrow as pa

    from bt_core.data.catalog import ref_columns
    from bt_core.data.pipeline import decode_catalog
    from bt_core.scans.archives import list_scans
    from cluster.session import session

    seconds = []
    with session():
        for _ in range(2):
            started = time.perf_counter()
            catalog = decode_catalog(pa.table(ref_columns(list_scans(path).refs)))
            seconds.append(time.perf_counter() - started)
            if any(catalog["reason"].to_pylist()):
                raise RuntimeError("a scan of the bench was not decoded")
    return seconds[0], seconds[1]


def numbers(text: str) -> list[int]:
    """Return the numbers of an option such as `6000,30000`; raises UsageError if they are none."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--sizes {text}: give whole numbers with commas, as 6000,30000") from None


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
