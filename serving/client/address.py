"""Where a server is, and in which of the two tongues it is spoken to."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ...merge.errors import UsageError

SCHEMES = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}


@dataclass(frozen=True)
class Address:
    """A server's address.

    Attributes:
        scheme: A key of `SCHEMES`.
        host: Without brackets.
        port: Its port.
        path: What stands before `/v2` in the paths of HTTP; starts with `/`, or is empty.
    """

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def is_grpc(self) -> bool:
        """Whether gRPC is spoken there."""
        return self.scheme.startswith("grpc")

    @property
    def is_secure(self) -> bool:
        """Whether TLS is spoken there."""
        return self.scheme.endswith("s")

    @property
    def authority(self) -> str:
        """`host:port`, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


def parse(url: str) -> Address:
    """The address that a URL spells; without a port, the scheme's own.

    Raises:
        UsageError: It is no such URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    path = parts.path.rstrip("/")
    wrong = (
        parts.scheme not in SCHEMES
        or not parts.hostname
        or parts.username is not None
        or parts.query
        or parts.fragment
        or (path and parts.scheme.startswith("grpc"))
    )
    if wrong:
        raise UsageError(
            "this is no address of a server",
            wanted=" or ".join(f"{scheme}://host:port" for scheme in SCHEMES),
            found=url,
        )
    assert parts.hostname is not None
    return Address(parts.scheme, parts.hostname, port or SCHEMES[parts.scheme], path)
