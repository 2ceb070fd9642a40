"""What every command shares: one-line errors, exit codes, --debug and --submit."""

import functools
import inspect
import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from bt_core import log, storage
from bt_core.errors import EXIT_FAILED, EXIT_INTERRUPTED, BtError, StoreError, UsageError, last_line
from bt_core.store_errors import refuse_away

if TYPE_CHECKING:
    import pyarrow as pa

    from bt_core.evaluation.requirements import Requirement

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

GOES_ON: Final = {
    "train": ": it goes on from its last epoch",
    "tune": ": it goes on from its last trial",
    "score": ": it goes on with what is not scored yet",
}
"""What becomes of a command that is given again; the others begin anew."""
_SUBMIT = Annotated[
    str | None,
    typer.Option(
        "--submit",
        metavar="http://HOST:8265",
        help="Run this command as a job on that Ray cluster; paths must be visible there.",
    ),
]
_HIDDEN_SUBMIT = Annotated[str | None, typer.Option("--submit", hidden=True)]
"""Of commands that are refused as jobs, with what to do instead."""
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
    def wrapped(
        context: typer.Context, submit: str | None = None, debug: bool = False, **arguments: Any
    ) -> None:
        try:
            log.run_id()
            log.configure(logging.DEBUG if debug else logging.INFO)
            code = run(**arguments) if submit is None else _submit(submit, name, context)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _say("interrupted; give the same command again" + GOES_ON.get(name, ""))
            code = EXIT_INTERRUPTED
        except Exception as error:
            if debug:
                traceback.print_exc()
            line, code = _explained(error, name)
            _say(f"error: {line}")
        raise typer.Exit(code)

    signature = inspect.signature(run)
    is_no_job = name.startswith(("keys ", "jobs ", "cluster "))
    submit_option = _HIDDEN_SUBMIT if is_no_job else _SUBMIT
    first = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    extra = [
        inspect.Parameter(
            "submit", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=submit_option
        ),
        inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG
        ),
    ]
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[first, *signature.parameters.values(), *extra], return_annotation=None
    )
    given = {"context": typer.Context, "submit": submit_option, "debug": _DEBUG}
    wrapped.__annotations__ = {**run.__annotations__, **given}
    return wrapped


def stop_signal() -> Callable[[], bool]:
    """Catch SIGINT and SIGTERM from now on; return what says whether one has come.

    There is no lock in it, which a signal could come upon while it is held.
    """
    came: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda caught, _: came.append(caught))
    return lambda: bool(came)


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


def say_if_random(key_is_kept: bool, patients: "pa.ChunkedArray") -> None:
    """Say that the patients' hashes, if there are any, hold for this run only."""
    if not key_is_kept and any(patients.to_pylist()):
        _say(
            "patients are told apart by hashes with a random key of this run; set BT_HASH_KEY or "
            "BT_HASH_KEY_FILE to keep the hashes equal between runs"
        )


def _submit(address: str, name: str, context: typer.Context) -> int:
    from cluster.submit import submit
    from jobs.jobs import FOLLOWER

    if name.startswith("keys "):  # a cluster keeps what its jobs print
        raise UsageError(f"bt {name} works on files of this machine; run it where the server is")
    if name.startswith(("jobs ", "cluster ")):
        raise UsageError(f"bt {name} is not run as a job; leave --submit out")
    # A default lies in the job's own folder, which is then lost.
    if "out" in context.params and not (context.params["out"] and _is_given(context, "out")):
        raise UsageError(
            "--submit needs --out with a path or URI that every node of the cluster sees"
        )
    module, *inner = name.split()
    return submit(address, f"jobs.{module}", [*inner, *_job_arguments(context)], FOLLOWER)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _job_arguments(context: typer.Context) -> list[str]:
    """Return the options and arguments that were given, without --submit, local paths absolute."""
    options: list[str] = []
    arguments: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name == "submit" or not _is_given(context, name):
            continue
        value = context.params[name]
        if isinstance(value, bool):
            options.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            word = _absolute(name, str(each))
            if parameter.param_type_name == "argument":
                arguments.append(word)
            else:
                options += [parameter.opts[0], word]
    return [*options, "--", *arguments] if arguments else options


def _absolute(name: str, value: str) -> str:
    """Return the value of a parameter for a process in another folder."""
    is_recipe_file = name == "recipe" and value.endswith((".yaml", ".yml"))
    if value and (name in _LOCATIONS or is_recipe_file):
        return storage.absolute(value)
    return re.sub("(?<=local-dir:)[^/][^/]*", lambda found: storage.absolute(found[0]), value)


def _explained(error: Exception, name: str) -> tuple[str, int]:
    """Return what a command that failed says, and its exit code."""
    try:
        refuse_away(error)
    except StoreError as away:
        return f"{away}{GOES_ON.get(name, '')}", away.exit_code
    if isinstance(error, BtError):
        return " ".join(str(error).split()), error.exit_code
    said = f"{type(error).__name__}: {last_line(str(error))}"  # under Ray's nested tracebacks
    return f"{said} (--debug shows where)", EXIT_FAILED


def _say(text: str) -> None:
    print(text, file=sys.stderr)
