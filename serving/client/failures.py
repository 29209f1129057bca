"""How an attempt fails, and which failures may be asked again.

REFUSED   the server was not reached, or says that it did nothing: any call may be asked again
LOST      the connection broke on the way: only a call that may be carried out twice is asked again
FINAL     an answer, though not a welcome one
"""

from __future__ import annotations

from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from ...merge.errors import CheckFailed, IncompatibleArtefact
from ..rejections import (
    BadReply,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    UnknownModel,
    Unreachable,
    from_line,
)

if TYPE_CHECKING:
    from ...merge.errors import UtuneError
    from .address import Address

REFUSED = "refused"
LOST = "lost"
FINAL = "final"

HTTP = {
    404: UnknownModel,
    408: DeadlineExceeded,
    409: CheckFailed,
    422: IncompatibleArtefact,
    503: Overloaded,
    504: DeadlineExceeded,
}
GRPC = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "ABORTED": CheckFailed,
    "FAILED_PRECONDITION": IncompatibleArtefact,
    "ALREADY_EXISTS": InvalidRequest,
    "RESOURCE_EXHAUSTED": InvalidRequest,
    "PERMISSION_DENIED": InvalidRequest,
    "UNAUTHENTICATED": InvalidRequest,
    "NOT_FOUND": UnknownModel,
    "UNAVAILABLE": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNIMPLEMENTED": BadReply,
}
_NOT_CONNECTED = ("failed to connect", "Connection refused", "DNS resolution failed")
_BROKEN = (  # what gRPC itself says of a connection
    "Socket closed",
    "Cancelling all calls",
    "Connection reset",
    "Broken pipe",
    "GOAWAY",
    "recvmsg",
    "Stream removed",
    "Endpoint read failed",
    "keepalive",
    "Network closed",
    "Transport closed",
)


class Failure(Exception):
    """An attempt that failed.

    Attributes:
        error: What the user is told.
        kind: `REFUSED`, `LOST` or `FINAL`.
        after_s: How long the server wants to be left alone, where it says so.
    """

    def __init__(self, error: UtuneError, kind: str = FINAL, after_s: float | None = None) -> None:
        super().__init__(error.what)
        self.error = error
        self.kind = kind
        self.after_s = after_s


def of_status(address: Address, status: int, text: str, retry_after: str | None) -> Failure:
    """The failure that an HTTP status other than 200 is.

    Args:
        address: Who answered.
        status: The status.
        text: The sentence of the body.
        retry_after: The header of that name.
    """
    default = EngineFailed if status >= 500 else InvalidRequest
    if not 400 <= status < 600:
        default = BadReply
    error = _said(HTTP.get(status, default), text or f"HTTP status {status}", address)
    return Failure(
        error, REFUSED if status == 503 else FINAL, None if status != 503 else seconds(retry_after)
    )


def of_code(address: Address, code: str, text: str) -> Failure:
    """The failure that a gRPC status code is.

    Args:
        address: Who was asked.
        code: Its name, `UNAVAILABLE` and so on.
        text: Its details.
    """
    if code == "UNAVAILABLE" and any(part in text for part in _NOT_CONNECTED):
        return unreachable(address, text, REFUSED)
    if code in ("UNAVAILABLE", "CANCELLED") and any(part in text for part in _BROKEN):
        return unreachable(address, text, LOST)
    error = _said(GRPC.get(code, EngineFailed), text or f"gRPC status {code}", address)
    # gRPC does not tell a server that turned the call away from one that went down over it.
    return Failure(error, LOST if code == "UNAVAILABLE" else FINAL)


def unreachable(address: Address, found: object, kind: str) -> Failure:
    """A connection that could not be made, or broke."""
    what = "the server cannot be reached" if kind == REFUSED else "the connection broke"
    return Failure(Unreachable(what, where=address, found=str(found) or repr(found)), kind)


def unreadable(address: Address, found: object) -> Failure:
    """A reply that is not of the protocol."""
    return Failure(
        BadReply(
            "the reply cannot be read",
            where=address,
            wanted="the Open Inference Protocol v2",
            found=str(found)[:200] or repr(found),
        )
    )


def seconds(retry_after: str | None) -> float | None:
    """The seconds that a `Retry-After` header asks for, given as a number or as a date."""
    if retry_after is None:
        return None
    try:
        return max(float(int(retry_after)), 0.0)
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=timezone.utc)
    return max((until - datetime.now(timezone.utc)).total_seconds(), 0.0)


def _said(kind: type[UtuneError], line: str, address: Address) -> UtuneError:
    what, details = from_line(line)
    return kind(what, **{"where": address, **details})  # type: ignore[arg-type]
