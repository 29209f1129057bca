"""What a server writes down: one line per event, as text or as JSON, and on request one per inference.

Lines go to standard error, where containers' collectors read. A line of an inference names model, tasks and times,
never what a picture held.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMATS = ("text", "json")
REQUESTS = "utune_deploy.requests"  # the logger of inferences
DETAILS = "details"  # attribute of a record: further fields by name

_requests = logging.getLogger(REQUESTS)
_life = logging.getLogger("utune_deploy.server")


def configure(form: str, *, requests: bool) -> None:
    """Send the package's lines, and those of its libraries from warnings up, to standard error.

    Args:
        form: One of `FORMATS`.
        requests: Whether every inference is a line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("utune_deploy").setLevel(logging.INFO)
    _requests.setLevel(logging.INFO if requests else logging.WARNING)


def stopping() -> None:
    """Write down that the server was asked to stop."""
    _life.info("stopping: what was taken is answered, what comes now is refused")


def stopped() -> None:
    """Write down that nothing is left to answer."""
    _life.info("stopped")


def inference(
    model: str, tasks: Sequence[str], *, seconds: float, error: BaseException | None = None
) -> None:
    """Write down one inference, where that is asked for."""
    if not _requests.isEnabledFor(logging.INFO):
        return
    details = {
        "model": model,
        "tasks": sorted(set(tasks)),
        "rows": len(tasks),
        "ms": round(seconds * 1e3, 3),
        "outcome": "answered" if error is None else type(error).__name__,
    }
    _requests.info("inference", extra={DETAILS: details})


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _time(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, DETAILS, {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        details = " ".join(f"{key}={value}" for key, value in getattr(record, DETAILS, {}).items())
        line = f"{_time(record, '%H:%M:%S')} {record.levelname:7} {record.getMessage()} {details}"
        if record.exc_info:
            line = f"{line.rstrip()}\n{self.formatException(record.exc_info)}"
        return line.rstrip()


def _time(record: logging.LogRecord, form: str) -> str:
    return f"{time.strftime(form, time.gmtime(record.created))}.{int(record.msecs):03}Z"
