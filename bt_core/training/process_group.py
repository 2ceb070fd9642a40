"""How workers of a run on CPUs find each other."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class NodeAddressConfig(TorchConfig):  # type: ignore[misc]
    """A process group in which each worker is reached at its node's address in the Ray cluster.

    Gloo by itself takes the address of the machine's name, which on many is 127.0.0.1 or, as Debian
    sets it, 127.0.1.1: workers on other nodes then wait for it in vain.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Return what sets the group up."""
        return _NodeAddressBackend


class _NodeAddressBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_use_node_address)
        super().on_start(worker_group, backend_config)


def _use_node_address() -> None:
    """Point Gloo to the interface of the node's address, unless the user named one."""
    name = interface_of(ray.util.get_node_ip_address(), psutil.net_if_addrs())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str, interfaces: Mapping[str, Sequence[Any]]) -> str | None:
    """Return the network interface that has an address; None if no one has, as behind NAT.

    Args:
        address: an IPv4 or IPv6 address.
        interfaces: as `psutil.net_if_addrs` returns them.
    """
    for name, addresses in interfaces.items():
        if address in {str(each.address).partition("%")[0] for each in addresses}:
            return name
    return None
