"""Puts the guards around an API, in the order in which a request meets them."""

from fastapi import FastAPI

from serve.access import Authentication
from serve.access_log import Audit, AuditLog
from serve.budget import ScanBudget
from serve.guards import BodyBounds, Envelope, NoStacks
from serve.keys import KeyRing
from serve.settings import ServeSettings


def secure(api: FastAPI, settings: ServeSettings) -> None:
    """Guard an API: keys, audit, budgets, bounds, headers.

    Raises:
        ConfigError: if the keys file cannot be used.
        UsageError: if the audit log cannot be written.
    """
    keys = KeyRing(settings.keys) if settings.keys is not None else None
    num_scans = settings.max_scans_per_minute
    api.state.budget = ScanBudget(num_scans) if num_scans else None
    # Each goes around those before it, so the last is what a request meets first.
    api.add_middleware(
        BodyBounds,
        max_read_seconds=settings.max_read_seconds,
        max_held_bytes=settings.max_held_mib * 1024**2,
    )
    api.add_middleware(Authentication, keys=keys, hosts=settings.allowed_hosts)
    api.add_middleware(NoStacks)
    if settings.audit_dir is not None:
        file_bytes = int(settings.audit_file_mib * 1024**2)
        api.state.audit_log = AuditLog(settings.audit_dir, file_bytes, settings.audit_num_files)
        api.add_middleware(Audit, log=api.state.audit_log)
    api.add_middleware(Envelope)
