"""What every command shares: one-line errors, exit codes, --debug and --submit."""

import functools
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from bt_core import log, storage
from bt_core.errors import EXIT_FAILED, BtError, StoreError, UsageError
from bt_core.stores import refuse_away

if TYPE_CHECKING:
    import pyarrow as pa

    from bt_core.evaluation.requirements import Requirement
    from bt_core.models.bundle import Bundle
    from bt_core.scans.preprocess import PreprocessSpec

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder, archive (zip, tar, tar.gz, tar.zst), list (CSV or Parquet with a column "
        "`path`) or single scan; path or URI.",
    ),
]
BundleArgument = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="Bundle folder that bt ensemble wrote; path or URI.")
]
DataOption = Annotated[
    str, typer.Option("--data", metavar="DIR", help="Dataset folder that bt prepare wrote.")
]
OutOption = Annotated[
    str, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to; path or URI.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier run left in the output folder.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda", help="auto takes GPUs if there are any.")
]

RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="FIGURE>=NUMBER",
        help="Exit with 1 if a figure misses this, as in clean.macro_f1>=0.95. May be repeated.",
    ),
]
PrevalenceOption = Annotated[
    str | None,
    typer.Option(
        "--prevalence",
        metavar="CLASS=SHARE,...",
        help="Shares of the classes where it will be used; adds predictive values there.",
    ),
]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="four_class or binary. [default: what the folders say]")
]

_LOCATIONS: Final = frozenset(
    {
        "source",
        "bundle",
        "out",
        "audit",
        "keys",
        "shadow",
        "scoring_sources",
        "scoring_outputs",
        "data",
        "runs",
        "resolve",
        "keep_splits",
        "sweep",
        "report",
        "reports",
        "models",
        "trained_on",
        "folder",
        "work",
    }
)
"""Parameters that hold paths, made absolute for a submitted job, whose folder is another."""

_GOES_ON: Final = {
    "train": ": it goes on from its last epoch",
    "tune": ": it goes on from its last trial",
    "score": ": it goes on with what is not scored yet",
}
_SUBMIT = Annotated[
    str | None,
    typer.Option(
        "--submit",
        metavar="http://HOST:8265",
        help="Run this command as a job on that Ray cluster; paths must be visible there.",
    ),
]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show tracebacks and all log lines.")]


def command(name: str, run: Callable[..., int]) -> Callable[..., None]:
    """Turn a job's `run` function into a command line function.

    A foreseen error becomes one line on standard error and its exit code; anything else becomes
    exit code 1, with the traceback only if `--debug` is given.

    Args:
        name: the command's name, as in `bt NAME` and `python -m jobs.NAME`.
        run: the job, returning its exit code.
    """

    @functools.wraps(run)
    def wrapped(*, submit: str | None = None, debug: bool = False, **arguments: Any) -> None:
        try:
            log.run_id()
            log.configure(logging.DEBUG if debug else logging.INFO)
            code = run(**arguments) if submit is None else _submit(submit, name, arguments)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _say("interrupted; give the same command again" + _GOES_ON.get(name, ""))
            code = EXIT_FAILED
        except Exception as error:
            if debug:
                traceback.print_exc()
            line, code = _explained(error, name)
            _say(f"error: {line}")
        raise typer.Exit(code)

    signature = inspect.signature(run)
    extra = [
        inspect.Parameter(
            "submit", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_SUBMIT
        ),
        inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG
        ),
    ]
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *extra], return_annotation=None
    )
    wrapped.__annotations__ = {**run.__annotations__, "submit": _SUBMIT, "debug": _DEBUG}
    return wrapped


@contextmanager
def placed(
    bundle: "Bundle", device: str
) -> "Iterator[tuple[tuple[PreprocessSpec, ...], str, tuple[int, float, float]]]":
    """Start or join Ray for work with a bundle, while the block runs.

    Yields:
        The bundle's distinct preprocessing specs, the device, and number, CPUs and GPUs of actors.
    """
    from bt_core.inference.predictor import needed_specs
    from cluster.session import choose_device, session

    specs, _ = needed_specs(bundle.info)
    with session() as resources:
        chosen = choose_device(device, resources)
        yield specs, chosen, resources.scorers(chosen)


def output_folder(out: str, source: str) -> str:
    """Return the output folder as an absolute location.

    Raises:
        UsageError: if it is a file, or is or lies in the source, where results would be taken for
            scans the next time.
    """
    if not source.strip():
        raise UsageError("SOURCE is empty; give a folder, an archive, a list or a scan file")
    out, source = storage.absolute(out), storage.absolute(source)
    if not storage.is_uri(out) and not storage.is_uri(source):
        below = f"{os.path.realpath(out)}/".startswith(f"{os.path.realpath(source).rstrip('/')}/")
    else:
        below = f"{out.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    if below:
        raise UsageError(f"-o {out} is or lies in the source; choose a folder beside it")
    if storage.is_file(out):
        raise UsageError(f"-o {out} is a file; choose a folder")
    return out


def class_shares(text: str, names: tuple[str, ...]) -> dict[str, float]:
    """Return the share of each class from `CLASS=SHARE,...`.

    Raises:
        UsageError: if it has another form, or misses a class, or the shares do not sum to 1.
    """
    try:
        shares = {k.strip(): float(v) for k, v in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UsageError(f"--prevalence {text}: write CLASS=0.02,CLASS=0.98, ...") from error
    unknown, missing = sorted(set(shares) - set(names)), sorted(set(names) - set(shares))
    total = sum(shares.values())
    if unknown or missing or min(shares.values()) < 0 or abs(total - 1) > 0.01:
        faults = [f"no class {name!r}" for name in unknown]
        faults += [f"{name} has no share" for name in missing]
        faults += [] if abs(total - 1) <= 0.01 else [f"the shares sum to {total:g}"]
        raise UsageError(
            f"--prevalence {text}: {'; '.join(faults) or 'a share is negative'}; give each of "
            f"{', '.join(names)} a share of 0 or more, sum 1"
        )
    return shares


def all_met(requirements: "Sequence[Requirement]", figures: dict[str, Any]) -> bool:
    """Print whether each requirement is met, and return whether all are."""
    checked = [requirement.check(figures) for requirement in requirements]
    for _, line in checked:
        print(line)
    return all(met for met, _ in checked)


def refuse_taken(out: str, marker: str, what: str, overwrite: bool) -> None:
    """Refuse an output folder that holds something that is not to be replaced.

    Raises:
        UsageError: if it is there and not to be overwritten, or does not hold the file `marker`,
            and so is not `what` it should be.
    """
    if not storage.exists(out):
        return
    if not overwrite:
        raise UsageError(f"{out} exists; choose another -o, or pass --overwrite")
    if not storage.exists(storage.join(out, marker)):
        raise UsageError(f"{out} is not {what}, so it is not overwritten; choose another -o")


def make_room(out: str, marker: str, what: str) -> None:
    """Remove an output folder that is to be overwritten.

    Raises:
        UsageError: if it does not hold the file `marker`, and so is not `what` it should be.
    """
    refuse_taken(out, marker, what, overwrite=True)
    storage.remove_dir(out)


def say_if_random(key_is_kept: bool, patients: "pa.ChunkedArray") -> None:
    """Say that the patients' hashes, if there are any, hold for this run only."""
    if not key_is_kept and any(patients.to_pylist()):
        _say(
            "patients are told apart by hashes with a random key of this run; set BT_HASH_KEY or "
            "BT_HASH_KEY_FILE to keep the hashes equal between runs"
        )


def _submit(address: str, name: str, arguments: dict[str, Any]) -> int:
    from cluster.submit import submit

    if name.startswith("keys "):  # a cluster keeps what its jobs print
        raise UsageError(f"bt {name} works on files of this machine; run it where the server is")
    if name.startswith(("jobs ", "cluster ")):
        raise UsageError(f"bt {name} is not run as a job; leave --submit out")
    out = arguments.get("out")
    given = any(word.removeprefix("--out=").removeprefix("-o") == out for word in sys.argv)
    if out is not None and not (out and given):  # a default lies in the job's own folder, then lost
        raise UsageError(
            "--submit needs --out with a path or URI that every node of the cluster sees"
        )
    return submit(address, f"jobs.{name.split()[0]}", _job_arguments(name, sys.argv[1:], arguments))


def _job_arguments(name: str, argv: list[str], arguments: dict[str, Any]) -> list[str]:
    """Return the words after the command, without --submit, with local paths made absolute."""
    given = [arguments[key] for key in _LOCATIONS & arguments.keys()]
    paths = {p for v in given for p in (v if isinstance(v, list) else [v]) if isinstance(p, str)}
    words = argv[1:] if argv and argv[0] == name.split()[0] else argv
    result: list[str] = []
    skip = False
    for word in words:
        if skip or word.startswith("--submit="):
            skip = False
            continue
        if word == "--submit":
            skip = True
            continue
        option, equals, value = word.partition("=")
        if word in paths:
            result.append(storage.absolute(word))
        elif equals and option.startswith("--") and value in paths:
            result.append(f"{option}={storage.absolute(value)}")
        else:
            result.append(word)
    return result


def _explained(error: Exception, name: str) -> tuple[str, int]:
    """Return what a command that failed says, and its exit code."""
    try:
        refuse_away(error)
    except StoreError as away:
        return f"{away}{_GOES_ON.get(name, '')}", away.exit_code
    if isinstance(error, BtError):
        return " ".join(str(error).split()), error.exit_code
    return f"{_last_line(error)} (--debug shows where)", EXIT_FAILED


def _last_line(error: Exception) -> str:
    """Return where Ray's nested tracebacks say what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
