"""Which tasks stand in the rows of the engine's bank: the least recently asked one makes room for another.

A version of a task is read from where it is kept, a file, when it is asked for and not there. The files are
mapped, so that what was read lately comes out of the system's page cache: rows on the device, pages on
the host, files on the disk are the three tiers. A row that a running call was given stays as it is until the call
ends, and so does one that is pinned.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np

from ...export.engine import BANK_PREFIX
from ...merge.errors import UsageError, UtuneError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ...export.bundle import Bundle
    from ...export.engine import Device, Session
    from .versions import Version

SPARE_ROWS = 16
MOST_ROWS = 1 << 16


@dataclass
class _Stand:
    row: int
    there: bool = False  # its tensors have been written
    failed: bool = False  # they could not be: the row is another's by now
    calls: int = 0  # running calls that were given this row
    pinned: bool = False


class Resident:
    """The rows of one engine's bank. Safe to call from several threads.

    Attributes:
        rows: How many there are.
        row_bytes: Bytes of one.
        loads: Rows written so far.
        evictions: Versions that made room so far.
    """

    def __init__(
        self, session: Session, rows: int, row_bytes: int, *, largest_call: int = 1
    ) -> None:
        """Over a session that has just reserved so many rows.

        Args:
            session: The engine.
            rows: How many it reserved.
            row_bytes: Bytes of one.
            largest_call: Most versions that one call asks for; so many rows are never pinned.
        """
        self.rows = rows
        self.row_bytes = row_bytes
        self._most_pinned = max(0, min(rows // 2, rows - largest_call))
        self.loads = 0
        self.evictions = 0
        self._session = session
        self._changed = threading.Condition()
        self._stands: OrderedDict[Version, _Stand] = OrderedDict()  # least recently asked first
        self._dropped: WeakSet[Version] = (
            WeakSet()
        )  # they leave with the last call that asks for them
        self._free = list(range(rows - 1, -1, -1))

    def __contains__(self, version: Version) -> bool:
        with self._changed:
            stand = self._stands.get(version)
            return stand is not None and stand.there

    @property
    def used(self) -> int:
        """Rows that hold a version."""
        return len(self._stands)

    @contextmanager
    def hold(self, versions: Sequence[Version]) -> Iterator[NDArray[np.int64]]:
        """The row of each version, `[n]`, kept inside the block; what is missing is read first.

        All rows are claimed at once or none is, so that two calls never wait for each other's.

        Raises:
            UsageError: They are more than there are rows.
            IncompatibleArtefact: A version's file is damaged.
            UtuneError: It was another call's to read, which failed.
        """
        wanted = tuple(dict.fromkeys(versions))
        stands, claimed = self._claim(wanted)
        try:
            self._write(claimed)
            with self._changed:
                self._changed.wait_for(lambda: all(s.there or s.failed for s in stands.values()))
            if failed := [version.name for version, stand in stands.items() if stand.failed]:
                raise UtuneError(
                    "a task could not be read while another call waited for it",
                    where=", ".join(failed),
                    do="ask again, and see the server's log for the reason",
                )
            yield np.array([stands[version].row for version in versions], dtype=np.int64)
        finally:
            with self._changed:
                for version, stand in stands.items():
                    stand.calls -= 1
                    if version in self._dropped and stand.there and not stand.calls:
                        self._leave(version)
                self._changed.notify_all()

    def fetch(self, version: Version) -> None:
        """Have a version there soon, without keeping it; see `hold`."""
        if version not in self:
            with self.hold([version]):
                pass

    def pin(self, version: Version, *, pinned: bool = True) -> None:
        """Keep a version in its row until it is unpinned or dropped.

        Raises:
            UsageError: It would leave too few rows for the others.
        """
        if not pinned:
            with self._changed:
                if stand := self._stands.get(version):
                    stand.pinned = False
                self._changed.notify_all()
            return
        with self.hold([version]), self._changed:
            others = sum(s.pinned for v, s in self._stands.items() if v is not version)
            if others + 1 > self._most_pinned:
                raise UsageError(
                    "no more tasks can be pinned",
                    where=version.name,
                    wanted=f"at most {self._most_pinned} of the {self.rows} rows pinned",
                    found=f"{others} pinned",
                    do="unpin another task, or start the server with more --rows",
                )
            self._stands[version].pinned = True

    def pinned(self, version: Version) -> bool:
        """Whether it is pinned."""
        stand = self._stands.get(version)
        return stand is not None and stand.pinned

    def drop(self, version: Version) -> None:
        """Give a version's row back, now or when the calls that run with it end."""
        with self._changed:
            self._dropped.add(version)
            stand = self._stands.get(version)
            if stand is None:
                return
            stand.pinned = False
            if stand.calls == 0 and stand.there:
                self._leave(version)
            self._changed.notify_all()

    def _claim(
        self, wanted: Sequence[Version]
    ) -> tuple[dict[Version, _Stand], dict[Version, _Stand]]:
        """Count a call on every version, and give a row to those that have none: they are to be written."""
        if len(wanted) > self.rows:
            raise UsageError(
                "a call asks for more tasks than the bank has rows",
                wanted=f"at most {self.rows}",
                found=len(wanted),
            )
        with self._changed:
            self._changed.wait_for(lambda: self._room(wanted))
            claimed = {}
            for version in wanted:
                if version not in self._stands:
                    if not self._free:
                        self._evict(wanted)
                    self._stands[version] = claimed[version] = _Stand(self._free.pop())
                self._stands[version].calls += 1
                self._stands.move_to_end(version)
            return {version: self._stands[version] for version in wanted}, claimed

    def _room(self, wanted: Sequence[Version]) -> bool:
        missing = sum(version not in self._stands for version in wanted)
        if missing <= len(self._free):
            return True
        idle = sum(self._is_idle(s) for v, s in self._stands.items() if v not in wanted)
        return missing <= len(self._free) + idle

    def _evict(self, kept: Sequence[Version]) -> None:
        oldest = next(v for v, s in self._stands.items() if self._is_idle(s) and v not in kept)
        self._leave(oldest)
        self.evictions += 1

    @staticmethod
    def _is_idle(stand: _Stand) -> bool:
        return stand.there and not stand.calls and not stand.pinned

    def _leave(self, version: Version) -> None:
        self._free.append(self._stands.pop(version).row)

    def _write(self, claimed: Mapping[Version, _Stand]) -> None:
        """Read versions into their rows; where one cannot be read, none behind it is.

        Raises:
            IncompatibleArtefact: A file is damaged.
        """
        waiting = dict(claimed)
        try:
            for version, stand in claimed.items():
                assert version.read is not None
                self._session.write_row(stand.row, version.read())
                with self._changed:
                    stand.there = True
                    del waiting[version]
                    self.loads += 1
                    self._changed.notify_all()
        finally:
            with self._changed:
                for version, stand in waiting.items():
                    stand.failed = True
                    self._leave(version)
                self._changed.notify_all()


def row_bytes(bundle: Bundle) -> int:
    """Bytes of one task in the engine's bank."""
    bank = [tensor for tensor in bundle.engine.inputs if tensor.name.startswith(BANK_PREFIX)]
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    return sum(
        sizes[tensor.dtype] * math.prod(int(size) for size in tensor.shape[1:]) for tensor in bank
    )


def default_rows(bundle: Bundle, device: Device) -> int:
    """How many tasks stand in the engine's memory at once unless it is said.

    On the CPU as many as half of the machine's memory holds, which is not touched before a task comes; elsewhere
    `SPARE_ROWS` more than the bundle ships.
    """
    count = max(len(bundle.tasks), bundle.engine.max_batch) + SPARE_ROWS
    if device.provider == "cpu" and os.name == "posix":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        fitting = min(memory // 2 // max(1, row_bytes(bundle)), MOST_ROWS)
        return max(fitting, bundle.engine.max_batch)
    return count
