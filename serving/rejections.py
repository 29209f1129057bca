"""Why a request is not answered, and the one line that the client is told and reads back.

InvalidRequest   the client's mistake: it fails alone, its neighbours in the batch are answered
UnknownModel     the address names a model or version that is not served
Overloaded       the queue is full: try again later
Expired          the request waited longer than it allowed
Stopping         the server drains: try another one
Cancelled        its caller left while it waited
EngineFailed     the engine raised, or answered with something that is not a number
ServerFailed     the server process itself did not start, or died

A client raises these as the server named them, and of its own:

Unreachable      nobody answers there, or the connection broke
DeadlineExceeded the time given to a call is over
BadReply         what answers there does not speak the protocol
"""

from __future__ import annotations

import re

from ..merge.errors import UsageError, UtuneError


class InvalidRequest(UsageError):
    """The request cannot be answered as written."""


class UnknownModel(UsageError):
    """No such model, version or address."""


class Overloaded(UtuneError):
    """The queue is full."""


class Expired(UtuneError):
    """The request waited longer than it allowed."""


class Stopping(UtuneError):
    """The server answers what it holds and takes nothing new."""


class Cancelled(UtuneError):
    """The caller does not want the answer any more."""


class EngineFailed(UtuneError):
    """The engine could not answer a valid request."""


class ServerFailed(UtuneError):
    """A server process did not start, or ended by itself."""


class Unreachable(UtuneError):
    """No connection to the server, or one that broke."""


class DeadlineExceeded(UtuneError):
    """The time given to a call is over."""


class BadReply(UtuneError):
    """A reply that cannot be read."""


def one_line(error: UtuneError) -> str:
    """An error as one line: what, then its details in brackets."""
    details = "; ".join(f"{label}: {text}" for label, text in error.details.items())
    return f"{error.what} ({details})" if details else error.what


def from_line(line: str) -> tuple[str, dict[str, str]]:
    """What `one_line` was made of: the sentence, and its details by label.

    A line of another origin is a sentence without details.
    """
    what, bracket, rest = line.partition(" (")
    if not (bracket and rest.endswith(")") and _LABEL.match(rest)):
        return line, {}
    _, *parts = _LABEL.split(rest[:-1])
    return what, dict(zip(parts[::2], parts[1::2], strict=True))


_LABEL = re.compile(r"(?:^|; )(where|wanted|found|do): ")
