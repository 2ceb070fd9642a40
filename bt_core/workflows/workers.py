"""What a caller provides: Ray while it is needed, and actors that there is room for."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from bt_core.models.bundle import Bundle
from bt_core.scans.preprocess import PreprocessSpec

Session = Callable[[], AbstractContextManager[object]]
"""Starts or joins Ray while the block runs."""
Workers = tuple[tuple[PreprocessSpec, ...], str, tuple[int, float, float]]
"""A bundle's distinct preprocessing specs, the device, and number, CPUs and GPUs of actors."""
Place = Callable[[Bundle], AbstractContextManager[Workers]]
"""As a session, for work with a bundle."""
