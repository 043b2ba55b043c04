"""By which of its network interfaces a node is reached by the others.

gloo offers the address that the node's own name resolves to, which at many sites is 127.0.1.1, or none. NCCL
looks for an interface by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Sequence

GLOO = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # of Linux: the address of a network interface
_ANY_PORT = 9  # nothing is sent


def choose_interface() -> str:
    """Have gloo use the interface that leads to the nodes of SUBMIT_PEERS, unless somebody has said which.

    Returns:
        The one in use; empty if that is left to gloo.
    """
    if not os.environ.get(GLOO):
        found = interface_to(os.environ.get("SUBMIT_PEERS", "").split())
        if found is not None:
            os.environ[GLOO] = found
    return os.environ.get(GLOO, "")


def interface_to(peers: Sequence[str]) -> str | None:
    """The name of this machine's interface that leads to the first of some machines for which there is one.

    Args:
        peers: addresses or names. This machine may be among them: by its own address, that one's interface is
            found; a name of its own that leads nowhere else is passed over.
    """
    for peer in peers:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((peer, _ANY_PORT))
            name = interface_of(way.getsockname()[0])
            if name is not None and name != "lo":
                return name
    return None


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface with that IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
