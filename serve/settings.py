"""Settings of the online side: arguments of the application, also in a Serve config file."""

from typing import Literal

from pydantic import Field

from bt_core.config import StrictModel


class ServeSettings(StrictModel):
    """What is hosted, by what, and what a client may ask for."""

    bundle: str
    device: Literal["cpu", "cuda"] = "cpu"
    num_replicas: int = Field(1, ge=1)
    """Copies of the ensemble."""
    threads_per_replica: int = Field(1, ge=1)
    """Torch threads of a copy on the CPU; copies times threads should not exceed the cores."""
    cpus_per_replica: float = Field(0.5, gt=0)
    cascade: bool = True
    """Let the first member answer alone where the bundle says that this is safe."""
    num_gateways: int = Field(1, ge=1)
    """Copies of what receives requests and decodes them."""
    decoders_per_gateway: int = Field(2, ge=1)
    """Processes of each in which scans are decoded."""
    max_body_mib: int = Field(64, ge=1)
    """Of a whole request."""
    max_files: int = Field(32, ge=1)
    """Scans of one request."""
    max_in_flight: int = Field(32, ge=1)
    """Scans that a gateway works on at once; whoever comes then is asked to come again."""
