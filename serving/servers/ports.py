"""Where a server listens: claiming a port, or saying in one sentence why it cannot be had."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass

from ...merge.errors import UsageError

BACKLOG = 2048


@dataclass(frozen=True)
class Addresses:
    """Where a running server answers.

    Attributes:
        http: `host:port` of HTTP.
        grpc: `host:port` of gRPC.
        metrics: `host:port` of Prometheus metrics, where the server has them.
    """

    http: str
    grpc: str
    metrics: str | None = None


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one.

    Raises:
        UsageError: The port is taken or not allowed, or the host is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where the protocol is spelt out: without it a reply in two
    # writes waits 40 ms for the client's acknowledgement.
    claimed = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere the option would let two servers share the port
            claimed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        claimed.bind((host, port))
        claimed.listen(BACKLOG)
    except OSError as cause:
        claimed.close()
        taken = cause.errno == errno.EADDRINUSE
        raise UsageError(
            "the port is in use" if taken else "the server cannot listen there",
            where=host_port(host, port),
            found=None if taken else cause.strerror,
            do="stop what listens there, or choose another port (0 picks a free one)",
        ) from cause
    except OverflowError as cause:
        claimed.close()
        raise UsageError("no such port", wanted="0 to 65535", found=port) from cause
    return claimed


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str, port: int) -> int:
    """The port itself once it is seen to be free, or a free one for port 0.

    Another process may take it before it is used: the caller still handles that failure.

    Raises:
        UsageError: See `listen`.
    """
    with listen(host, port) as claimed:
        return claimed.getsockname()[1]


def host_port(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
