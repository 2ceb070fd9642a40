"""Options and arguments that several commands take."""

from typing import Annotated

import typer

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
