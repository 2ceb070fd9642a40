"""Whether this process runs with what the lock pins: a command's own, and a node's that joins."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from bt_core.log import logger

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PIN: Final = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def warn_unless_locked() -> None:
    """Log a warning that names what is installed here in other versions than the lock's."""
    if unlike := unlike_the_lock(Path(__file__).resolve().parent.parent):
        logger.warning(
            "figures may differ from those of the lock, here at least: %s; install "
            "requirements.lock on every node",
            ", ".join(unlike),
        )


def unlike_the_lock(root: Path) -> list[str]:
    """Return which of the program's own requirements are installed in other versions, in words.

    What they bring along is left out: a node may need others of it, as what `ray up` installs for a
    cloud. A build for one kind of GPU, as 2.15.0+cu130, is the version that it is of.

    Args:
        root: of a checkout or of what was sent of it; without its lock nothing is compared.
    """
    project, lock = root / "pyproject.toml", root / "requirements.lock"
    if not (project.is_file() and lock.is_file()):
        return []
    pins = {_plain(name): pin for name, pin in _PIN.findall(lock.read_text(encoding="utf-8"))}
    wanted = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = []
    for requirement in wanted:
        name = _plain(_NAME.match(requirement)[0])  # type: ignore[index]
        try:
            own = version(name).partition("+")[0]
        except PackageNotFoundError:
            own = "nothing"
        if name in pins and own != pins[name].partition("+")[0]:
            found.append(f"{name} {own} instead of {pins[name]}")
    return found


def _plain(name: str) -> str:
    """Return a name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()
