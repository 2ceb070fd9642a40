"""`bt keys`: who may ask a server that listens beyond this machine."""

import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from bt_core.errors import EXIT_OK, UsageError

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="Keys file of a server; it holds hashes, no keys.")
]


def run_add(
    file: FileArgument,
    name: Annotated[str, typer.Option("--name", help="Whose it is; stands in the audit log.")],
    role: Annotated[
        list[str],
        typer.Option(
            "--role",
            metavar="predict|explain|jobs|admin",
            help="What it is for; may be repeated, none includes another.",
        ),
    ],
    days: Annotated[int | None, typer.Option("--days", min=1, help="Until it expires.")] = None,
) -> int:
    """Make a key and print it, this once; servers that use FILE know it within a request."""
    from serve.keys import ROLES, add_key

    if unknown := set(role).difference(ROLES):
        raise UsageError(f"--role {', '.join(sorted(unknown))}: use one of {', '.join(ROLES)}")
    expires = datetime.now(UTC) + timedelta(days=days) if days else None
    key = add_key(file, name, role, expires)
    print(key)
    print(f"hand it to {name}; it is kept nowhere and not shown again", file=sys.stderr)
    return EXIT_OK


def run_list(file: FileArgument) -> int:
    """Print the keys' names, roles and times."""
    from serve.keys import has_expired, read_keys

    for key in read_keys(file).keys:
        until = f"until {key.expires:%Y-%m-%d %H:%M} UTC" if key.expires else "no expiry"
        expired = " (expired)" if has_expired(key) else ""
        print(f"{key.name}: {', '.join(key.roles)}; since {key.created:%Y-%m-%d}, {until}{expired}")
    return EXIT_OK


def run_revoke(
    file: FileArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As bt keys list shows it.")],
) -> int:
    """Take a key back; servers that use FILE refuse it from their next request on."""
    from serve.keys import revoke_key

    revoke_key(file, name)
    print(f"{name} is revoked")
    return EXIT_OK


if __name__ == "__main__":
    from jobs.cli import main_of

    main_of("keys")
