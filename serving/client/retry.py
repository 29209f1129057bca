"""How long a call may take, and how it is asked again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from ...merge.errors import UsageError
from ..rejections import DeadlineExceeded
from .failures import FINAL, LOST


@dataclass(frozen=True)
class Retry:
    """How often a call is asked again that failed for want of a server.

    Before attempt k + 1 it waits a random time, evenly spread up to `first_s * 2 ** (k - 1)` and never
    above `longest_s`; longer where the server says so (`Retry-After`). Source: exponential back-off with
    full jitter, https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.

    Attributes:
        attempts: In all; 1 asks once.
        first_s: Longest wait before the second attempt, in seconds.
        longest_s: Longest wait of its own choice, in seconds.
    """

    attempts: int = 5
    first_s: float = 0.1
    longest_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_s < 0 or self.longest_s < 0:
            raise UsageError(
                "these settings of retries make no sense",
                wanted="at least one attempt, and waits of at least 0 seconds",
                found=self,
            )

    def allows(self, attempt: int, kind: str, repeatable: bool) -> bool:
        """Whether a call is asked again after this attempt, the first being 1."""
        return attempt < self.attempts and kind != FINAL and (kind != LOST or repeatable)

    def wait_s(self, attempt: int, after_s: float | None) -> float:
        """Seconds to wait after this attempt."""
        ceiling = min(self.first_s * 2.0 ** (attempt - 1), self.longest_s)
        return random.uniform(0, ceiling) + (after_s or 0.0)


class Deadline:
    """A point in time that a call must not pass.

    Args:
        limit_s: Seconds from now; None for no limit.
    """

    def __init__(self, limit_s: float | None) -> None:
        if limit_s is not None and not limit_s > 0:
            raise UsageError("a deadline is not in the future", wanted="seconds > 0", found=limit_s)
        self.limit_s = limit_s
        self._end = None if limit_s is None else time.monotonic() + limit_s

    def left_s(self) -> float | None:
        """Seconds that are left; not above 0 when it has passed."""
        return None if self._end is None else self._end - time.monotonic()

    def require(self, wait_s: float, where: object, last: object = None) -> float | None:
        """Seconds that are left after a wait.

        Args:
            wait_s: The wait, in seconds.
            where: Who is asked.
            last: How the last attempt failed.

        Raises:
            DeadlineExceeded: None are.
        """
        left = self.left_s()
        if left is not None and left <= wait_s:
            raise self.exceeded(where, last)
        return left

    def exceeded(self, where: object, last: object = None) -> DeadlineExceeded:
        """The error of a call that took too long."""
        return DeadlineExceeded(
            "no answer within the deadline",
            where=where,
            wanted=f"{self.limit_s:g} s" if self.limit_s is not None else None,
            found=last,
        )
