"""Why a request is not answered, and the one line that the client is told.

InvalidRequest   the client's mistake: it fails alone, its neighbours in the batch are answered
UnknownModel     the address names a model or version that is not served
Overloaded       the queue is full: try again later
Expired          the request waited longer than it allowed
Stopping         the server drains: try another one
EngineFailed     the engine raised, or answered with something that is not a number
ServerFailed     the server process itself did not start, or died
"""

from __future__ import annotations

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


class EngineFailed(UtuneError):
    """The engine could not answer a valid request."""


class ServerFailed(UtuneError):
    """A server process did not start, or ended by itself."""


def one_line(error: UtuneError) -> str:
    """An error as one line: what, then its details in brackets."""
    details = "; ".join(f"{label}: {text}" for label, text in error.details.items())
    return f"{error.what} ({details})" if details else error.what
