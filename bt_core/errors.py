"""Every exception this project raises on purpose.

::

    BtError                 exit 1   anything foreseen that a person can act on
    ├── UsageError          exit 2   a wrong argument, path or setting
    │   ├── ConfigError              a recipe, spec or override that does not validate
    │   ├── SourceError              a scan source that cannot be read as a whole
    │   ├── DatasetError             a prepared dataset that is missing or does not fit
    │   ├── SealedError              test scans asked for outside bt evaluate
    │   ├── WeightsError             initial weights that cannot be had
    │   └── BundleError              a bundle that is missing, changed or not understood
    ├── RunError            exit 1   work that started and could not be finished
    │   └── StoreError               a place that a process cannot reach
    ├── UnavailableError    (a log line) a way to run a classifier that this host lacks
    └── ScanError           (a row)  one scan that cannot be used; carries a reason code

A message says what, which value, and what to do next. It never quotes a DICOM header value or
pixels.
"""

from typing import Final

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INCOMPLETE: Final = 3
"""The command finished, but some scans were not scored."""
EXIT_INTERRUPTED: Final = 130
"""As shells say of a command that Ctrl-C ended: 128 and the signal's number."""


class BtError(Exception):
    """Base of all errors that are shown to people as one line."""

    exit_code: int = EXIT_FAILED


class UsageError(BtError):
    """The command cannot start as it was called."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A recipe, spec or override does not validate; the message lists every fault at once."""


class SourceError(UsageError):
    """A scan source is missing, empty, encrypted or over the limits as a whole."""


class DatasetError(UsageError):
    """A prepared dataset is missing, unfinished or does not fit the request."""


class SealedError(UsageError):
    """Rows or pixels of the test split were asked for by anything but bt evaluate."""


class WeightsError(UsageError):
    """Initial weights cannot be had from the stated source; there is no silent fall-back."""


class BundleError(UsageError):
    """A bundle is missing a file, was changed, or has a format this version does not read."""


class RunError(BtError):
    """Work started and could not be finished."""


class StoreError(RunError):
    """A store does not answer, or refuses, or a node does not see a place that others see."""


REASONS: Final[dict[str, str]] = {
    "empty_file": "the file has no bytes",
    "io_error": "the bytes could not be read from the source",
    "unsupported_type": "the content is not a picture, DICOM or NIfTI file that this version reads",
    "corrupt_image": "the picture's data is damaged",
    "truncated_image": "the picture's data ends early",
    "image_too_large": "the picture has more pixels than the limit",
    "image_too_small": "the picture is smaller than the limit",
    "multi_frame": "the picture is animated or has several pages; give one file for each",
    "too_many_frames": "the object holds more frames than the limit",
    "no_pixel_data": "the DICOM object holds no picture",
    "not_an_image_object": "the DICOM object is of a kind that is not a picture",
    "transfer_syntax_unsupported": "the DICOM compression is not supported",
    "no_signal": "the picture is one flat value",
    "member_encrypted": "the archive member is encrypted",
    "member_too_large": "the archive member is over the size limit",
    "member_corrupt": "the archive member does not unpack to its checksum",
    "unsupported_member": "the archive member is a link or a device, not a file",
    "archive_method_unsupported": "the archive member is packed by a method that cannot be read",
    "nested_archive": "the file is an archive inside the source; unpack it first",
    "scorer_crashed": "scoring ended its worker process twice",
    "decoder_crashed": "decoding ended its worker process, or took too long",
    "unknown_class": "the folder name is not a known class",
    "label_conflict": "copies of the picture stand under different classes",
    "dropped": "a person decided in the docket to leave the scan out",
    "one_of_many_frames": "the answer is for one slice of several; a person should see the others",
    "no_dicom_result": "the header lacks, or has wrong, what an object of its study must state",
    "almost_blank": "the picture shows next to nothing",
    "colour_picture": "the picture is in colour; give the grey scan",
    "inverted_contrast": "the ground around the head is bright: the picture is inverted, or framed",
    "not_a_head": "the picture does not show one head on a dark ground",
    "colour_overlay": "something coloured is drawn on the scan",
    "low_resolution": "the head is shown in few pixels",
    "odd_shape": "the head is shown far longer than wide: it may be stretched, or no head",
    "burnt_in_text": "text stands beside the head, or the file says that it holds some",
    "far_from_training": "the picture is unlike those that the models were trained on",
    "low_confidence": "the models are not sure enough of their answer",
    "several_classes": "more than one class is likely enough to be the right one",
    "tumor_not_excluded": "no tumour is the likeliest answer, but a tumour cannot be ruled out",
}
"""Every reason code with its meaning in words; a closed list, so that users can rely on it."""

REJECTED_REASONS: Final = frozenset(
    {
        "unsupported_type",
        "image_too_large",
        "image_too_small",
        "multi_frame",
        "too_many_frames",
        "no_pixel_data",
        "not_an_image_object",
        "transfer_syntax_unsupported",
        "no_signal",
        "member_encrypted",
        "member_too_large",
        "unsupported_member",
        "archive_method_unsupported",
        "nested_archive",
        "almost_blank",
        "colour_picture",
        "inverted_contrast",
        "not_a_head",
    }
)
"""Reasons of status `rejected`: the input is whole, but not one that may be classified.
Every other scan error is status `failed`: the input could not be read."""


class UnavailableError(BtError):
    """A way to run a classifier that this host lacks; the reference takes its place."""


class ScanError(BtError):
    """One scan cannot be used.

    Args:
        reason: a key of `REASONS`.
        detail: technical detail without any patient data, such as sizes or a transfer syntax UID.

    Raises:
        ValueError: on an unknown reason code (a programming error).
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason code {reason!r}")
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {REASONS[reason]}" + (f" ({detail})" if detail else ""))

    def __reduce__(self) -> tuple[type["ScanError"], tuple[str, str]]:
        """Travel between processes with the reason code intact."""
        return ScanError, (self.reason, self.detail)


def first_line(said: BaseException | str) -> str:
    """Return the first line of an error's text, or the name of its kind if it says nothing."""
    return _lines(said)[0]


def last_line(said: BaseException | str) -> str:
    """Return the last line of an error's text, where nested tracebacks say what happened.

    Of an error that says nothing it is the name of its kind.
    """
    return _lines(said)[-1]


def _lines(said: BaseException | str) -> list[str]:
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    return lines or ["no message" if isinstance(said, str) else type(said).__name__]


def status_of(reason: str) -> str:
    """Return the score status, `rejected` or `failed`, that a scan error's reason leads to."""
    return "rejected" if reason in REJECTED_REASONS else "failed"
