"""What a job takes along: the code, and such settings as everyone may see."""

import os
import tomllib
from pathlib import Path

from bt_core import storage, stores
from bt_core.log import RUN_ID, logger
from bt_core.scans import limits


def job_environment(run: str) -> dict[str, object]:
    """Return the runtime environment of a job whose run has this id.

    It uploads the checkout that this runs from; an installed package must be there already.
    """
    environment: dict[str, object] = {"env_vars": _variables() | {RUN_ID: run}}
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return environment
    return {"working_dir": str(root), "excludes": all_but_code(root), **environment}


def all_but_code(root: Path) -> list[str]:
    """Return patterns, as of a .gitignore, that leave of a checkout what is installed of it.

    All else is left out, whatever it is called: no scans, results or history.
    """
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {package.replace(".", "/"): ["*.py"] for package in setup["packages"]}
    for package, files in setup["package-data"].items():
        for file in files:
            folder, _, kind = f"{package}/{file}".rpartition("/")
            folders.setdefault(folder, []).append(kind)
    patterns = ["*", "!/.", "!/pyproject.toml", "!/requirements.lock"]
    for folder, kinds in sorted(folders.items()):  # a folder before those in it
        patterns += [f"!/{folder}", f"/{folder}/**", *(f"!/{folder}/{kind}" for kind in kinds)]
    return patterns


def plain_variables() -> dict[str, str]:
    """Return what is set here of the variables that all processes of a run must agree on.

    They say what is read and where a store is. A cluster's dashboard shows them to everyone.

    Raises:
        UsageError: if one holds a secret.
    """
    taken = (*limits.VARIABLES, *stores.VARIABLES)
    variables = {name: os.environ[name] for name in taken if name in os.environ}
    for name in stores.VARIABLES:
        storage.refuse_secrets(variables.get(name, ""))
    return variables


def _variables() -> dict[str, str]:
    """Return what the job takes along of the user's environment: nothing that is secret."""
    if "BT_HASH_KEY" in os.environ:
        logger.warning(
            "BT_HASH_KEY is not sent, since the dashboard shows a job's settings to everyone; put "
            "the key into a file on the cluster's nodes and name it by BT_HASH_KEY_FILE"
        )
    variables = plain_variables()
    if location := os.environ.get("BT_HASH_KEY_FILE"):
        storage.refuse_secrets(location)
        variables["BT_HASH_KEY_FILE"] = storage.absolute(location)
    return variables
