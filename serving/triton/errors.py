"""Which of Triton's error codes says what an error is, as its front ends then put it into HTTP and gRPC."""

from __future__ import annotations

from ...merge.errors import CheckFailed, IncompatibleArtefact, UsageError
from ..rejections import Cancelled, Expired, Overloaded, Stopping, UnknownModel

INTERNAL = "INTERNAL"
_CODES = (
    (UnknownModel, "NOT_FOUND"),
    ((UsageError, IncompatibleArtefact, CheckFailed), "INVALID_ARG"),
    ((Overloaded, Expired, Stopping), "UNAVAILABLE"),
    (Cancelled, "CANCELLED"),
)


def code_of(error: BaseException) -> str:
    """The name of a constant of Triton's `TritonError`, the embedded server's statuses where Triton has them.

    It has nothing like 409 and 422, a check that failed and a task that does not fit: its ALREADY_EXISTS is a 400
    over HTTP, as INVALID_ARG is.
    """
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), INTERNAL)
