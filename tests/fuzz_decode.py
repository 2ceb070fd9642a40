"""Throw damaged scan files at `decode_scan`: `python -m tests.fuzz_decode --minutes 30 --seed 1`.

A child process decodes; this one makes the files and watches it. A file offends if the child dies,
takes over 20 seconds or more memory than the bound, raises anything but `ScanError`, or gives a
picture that breaks the promise. Offending files are kept; the exit code is 1 if there are any.
"""

import argparse
import contextlib
import gzip
import hashlib
import os
import random
import resource
import select
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import pydicom

from bt_core.errors import ScanError
from bt_core.scans.decoded import MAX_DECODE_BYTES
from bt_core.scans.formats import decode_scan
from tests.unit.test_scan_table import GOOD

TIMEOUT_SECONDS = 20
MAX_CORPUS_BYTES = 150_000
HINTS = ("", "scan.png", "scan.dcm", "scan.nii.gz")
NUMBERS = (0, 1, 2, 31, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF)
ALL_ONES = 0xFFFFFFFF


def corpus() -> dict[str, bytes]:
    """Return a valid file of every kind, by name: those of the table of good files."""
    return {name: make() for name, (_, make, _, _) in GOOD.items()}


def bundled() -> dict[str, bytes]:
    """Return the small scans that pydicom and nibabel ship for their own tests and that decode."""
    folders = (
        Path(pydicom.__file__).parent / "data" / "test_files",
        Path(nib.__file__).parent / "tests" / "data",
    )
    files = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path.is_file() and path.stat().st_size <= MAX_CORPUS_BYTES:
            content = path.read_bytes()
            with contextlib.suppress(ScanError):
                decode_scan(content)
                files[path.name] = content
    return files


def mutate(rng: random.Random, files: list[bytes]) -> bytes:
    """Return a damaged file: inside the gzip or behind PNG's checksums as often as outside."""
    content = rng.choice(files)
    if content[:2] == b"\x1f\x8b" and rng.random() < 0.6:
        return gzip.compress(_damage(rng, gzip.decompress(content), files), 1)
    content = _damage(rng, content, files)
    if content[:4] == b"\x89PNG" and rng.random() < 0.7:
        return _with_checksums(content)
    return content


def _damage(rng: random.Random, content: bytes, files: list[bytes]) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 12))):
        if not data:
            break
        # Headers are where a byte does most.
        position = rng.randrange(min(len(data), 600) if rng.random() < 0.6 else len(data))
        kind = rng.randrange(8)
        if kind == 0:
            data[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[position] = rng.randrange(256)
        elif kind == 2:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice((*NUMBERS, ALL_ONES)) & (256**width - 1)
            data[position : position + width] = number.to_bytes(width, order)
        elif kind == 3:
            del data[position : position + rng.randrange(1, 40)]
        elif kind == 4:
            data[position:position] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 5:
            data[position:position] = data[position : position + rng.randrange(1, 400)]
        elif kind == 6:
            other = rng.choice(files)
            start = rng.randrange(len(other))
            data[position : position + 64] = other[start : start + rng.randrange(1, 400)]
        else:
            del data[rng.randrange(len(data)) :]
    return bytes(data)


def _with_checksums(content: bytes) -> bytes:
    """Return a PNG with the checksums of its chunks made right, as far as it can be followed."""
    data, position = bytearray(content), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return bytes(data)


class Child:
    """The process that decodes."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.fuzz_decode import serve; serve()"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def outcome(self, content: bytes, hint: str) -> str:
        """Return what became of a file; the child is gone if it starts with `OFFENDS: it`."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(struct.pack("<II", len(hint), len(content)))
            process.stdin.write(hint.encode() + content)
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], TIMEOUT_SECONDS)
            answer = process.stdout.readline().decode().strip() if ready else ""
        except BrokenPipeError:
            ready, answer = [process.stdout], ""
        if answer:
            return answer
        if not ready:
            self.close()
            return f"OFFENDS: it took over {TIMEOUT_SECONDS} s"
        return f"OFFENDS: it died with {process.wait()}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """Decode what comes on standard input, one line of outcome for each, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a native decoder prints
    # Far over the bound, so that a file that breaks it is reported and not the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MAX_DECODE_BYTES, 4 * MAX_DECODE_BYTES))
    while head := sys.stdin.buffer.read(8):
        hint_length, length = struct.unpack("<II", head)
        hint = sys.stdin.buffer.read(hint_length).decode()
        content = sys.stdin.buffer.read(length)
        taken, outcome = peak_memory(content, hint)
        if taken > MAX_DECODE_BYTES:
            outcome = f"OFFENDS: {taken} bytes of memory, then {outcome}"
        print(outcome, file=answers, flush=True)


def peak_memory(content: bytes, hint: str) -> tuple[int, str]:
    """Decode, and return the memory taken at the peak in bytes, and the outcome in words."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    try:
        scan = decode_scan(content, hint)
    except ScanError as error:
        outcome = error.reason
    except BaseException as error:
        outcome = f"OFFENDS: {type(error).__name__}"
    else:
        image_HW = scan.image_HW
        whole = image_HW.ndim == 2 and image_HW.dtype == "uint8" and min(image_HW.shape) >= 32
        whole = whole and image_HW.min() < image_HW.max() and scan.frame_index >= 0
        outcome = f"decoded {scan.format}" if whole else "OFFENDS: not the promised picture"
    return _status("VmHWM") - before, outcome


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def main() -> int:
    """Fuzz for the time given, and print the counts by outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    files = [*corpus().values(), *bundled().values()]
    counts: Counter[str] = Counter()
    child, end = Child(), time.monotonic() + arguments.minutes * 60
    while time.monotonic() < end:
        content, hint = mutate(rng, files), rng.choice(HINTS)
        outcome = child.outcome(content, hint)
        counts[outcome] += 1
        if outcome.startswith("OFFENDS"):
            arguments.keep.mkdir(parents=True, exist_ok=True)
            kept = arguments.keep / f"{hashlib.sha256(content).hexdigest()[:16]}{hint}"
            kept.write_bytes(content)
            print(f"{outcome}: {kept}", flush=True)
            if outcome.startswith("OFFENDS: it"):
                child = Child()
    child.close()
    print(f"{sum(counts.values())} files made of {len(files)}, seed {arguments.seed}")
    for outcome, count in counts.most_common():
        print(f"{count:8d}  {outcome}")
    return int(any(outcome.startswith("OFFENDS") for outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
