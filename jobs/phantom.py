"""`bt phantom`: write an archive of synthetic scans, for trying things out."""

import os
from typing import Annotated

import typer

from bt_core.errors import EXIT_OK, UsageError
from jobs.options import OverwriteOption


def run(
    out: Annotated[str, typer.Argument(metavar="FILE.zip", help="Local path of the archive.")],
    num_per_class: Annotated[int, typer.Option(min=1, help="Scans of each of the classes.")] = 60,
    seed: Annotated[int, typer.Option(help="Chooses heads, masses and formats.")] = 0,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Flat names that do not give the class away.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> int:
    """Write a zip of synthetic scans: four classes, PNG, JPEG and DICOM."""
    from bt_core.scans.phantom import write_archive

    if os.path.exists(out) and not overwrite:
        raise UsageError(f"{out} exists; choose another name, or pass --overwrite")
    try:
        num = write_archive(out, num_per_class=num_per_class, seed=seed, labelled=not unlabelled)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another") from error
    print(f"{num} synthetic scans in {out}")
    return EXIT_OK


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("phantom")
