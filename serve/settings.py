"""Settings of the online side: arguments of its applications, also in a Serve config file."""

from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from bt_core.config import StrictModel
from serve.locations import resolved

REQUEST_SECONDS: Final = 60
"""After which Serve gives a request up, in plain text; the service itself gives up before."""


class EnsembleSettings(StrictModel):
    """A bundle, and what it runs on."""

    bundle: str
    device: Literal["cpu", "cuda"] = "cpu"
    num_replicas: int = Field(1, ge=1)
    """Copies of the ensemble; the least where `max_replicas` is given."""
    max_replicas: int | None = Field(None, ge=1)
    """Ray Serve adds copies up to so many while requests wait, and takes them away again."""
    gpus_per_replica: float = Field(1.0, gt=0)
    """Of a copy on GPUs; below 1 where copies share one, as two bundles do during a swap."""
    threads_per_replica: int = Field(1, ge=1)
    """Torch threads of a copy on the CPU; copies times threads should not exceed the cores."""
    cpus_per_replica: float = Field(0.5, gt=0)
    cascade: bool = True
    """Let the first member answer alone where the bundle says that this is safe."""


class ServeSettings(EnsembleSettings):
    """What is hosted, by what, and what a client may ask for."""

    num_gateways: int = Field(1, ge=1)
    """Copies of what receives requests and decodes them."""
    decoders_per_gateway: int = Field(2, ge=1)
    """Processes of each in which scans are decoded."""
    max_body_mib: int = Field(64, ge=1)
    """Of a whole request."""
    max_files: int = Field(32, ge=1)
    """Scans of one request."""
    max_in_flight: int = Field(16, ge=1)
    """Scans that a gateway works on when it begins to turn requests away. More keep more copies of
    an ensemble at work, and let everybody wait longer."""
    keys: str | None = None
    """Keys file of `bt keys`, on every host of a gateway; followed while it changes."""
    allow_anonymous: bool = False
    """Without `keys`: everybody who reaches the server may ask for anything."""
    allowed_hosts: tuple[str, ...] = ()
    """Without `keys`: names and addresses that a Host header may have; none: those of this machine
    only, so that no web page reaches it under a name of its own."""
    audit_dir: str | None = None
    """Folder on the host of each gateway for its audit log."""
    allow_unaudited: bool = False
    """Without `audit_dir`: answer though nobody takes it down."""
    audit_file_mib: float = Field(64, gt=0)
    """Size at which a file of the audit log is put aside."""
    audit_num_files: int = Field(64, ge=1)
    """How many that were put aside are kept; older ones are deleted."""
    max_scans_per_minute: int = Field(0, ge=0)
    """Of a key or, without keys, a client address, at each gateway; 0: any number."""
    max_read_seconds: float = Field(20.0, gt=0)
    """For a request's body to arrive; below Serve's time-out, which answers without words."""
    max_held_mib: int = Field(1024, ge=1)
    """Of the bodies of all requests that a gateway works on."""
    scoring_sources: tuple[str, ...] = ()
    """Local folders or URIs from which scoring jobs may read; without any there are no such jobs.
    Links in local paths are followed on the gateway's node: nodes must see the same folders."""
    scoring_outputs: tuple[str, ...] = ()
    """Local folders or URIs below which scoring jobs may write."""

    @field_validator("scoring_sources", "scoring_outputs")
    @classmethod
    def _are_locations(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            try:
                resolved(prefix)
            except ValueError as error:
                raise ValueError(f"{prefix}: {error}") from error
        return prefixes

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if 0 < self.max_scans_per_minute < self.max_files:
            raise ValueError(
                f"max_scans_per_minute {self.max_scans_per_minute} is below max_files "
                f"{self.max_files}: a request of so many files would never be let in"
            )
        if self.max_held_mib < self.max_body_mib:
            raise ValueError(
                f"max_held_mib {self.max_held_mib} is below max_body_mib {self.max_body_mib}: a "
                "request of that size would never be let in"
            )
        return self

    def of_ensemble(self, **others: Any) -> EnsembleSettings:
        """Return those of the ensemble, with `others` in place of its own."""
        own = self.model_dump(include=set(EnsembleSettings.model_fields))
        return EnsembleSettings(**own | others)


class Hosted(StrictModel):
    """An application that holds an ensemble."""

    app: str
    bundle: str
    """Folder of the bundle that it holds."""


class Targets(StrictModel):
    """What a gateway asks; it changes while the gateway runs."""

    ensemble: Hosted
    shadow: Hosted | None = None
    """Gets a share of the scans, too; its answers are compared and told to nobody."""
    shadow_share: float = Field(0.05, gt=0, le=1)
