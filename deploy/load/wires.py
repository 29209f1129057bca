"""Which wire goes to an address."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...serving.client.address import Address
    from .wire import Wire


def open_wire(address: Address) -> Wire:
    """The wire that an address asks for; connections are opened when they are needed."""
    if address.is_grpc:
        from .grpc_wire import GrpcWire

        return GrpcWire(address)
    from .http_wire import HttpWire

    return HttpWire(address)
