"""The shared-memory extension: tensors that a client on the same machine leaves in POSIX shared memory.

A region is a name that a client gave to a range of one object under `/dev/shm`. Contents are read and written
with `pread` and `pwrite`: an object that its owner cuts short gives a short read there, where a mapping would
end the process.

Who may register regions reads and writes every shared-memory object that the server's user may, so that a
server offers them only when told to. What clients look for is said in Triton's words.
Source: Triton's extension_shared_memory.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rejections import InvalidRequest, UnknownModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import TypeGuard

FOLDER = Path("/dev/shm")
EXTENSION = "system_shared_memory"
REGION, SIZE, OFFSET = (
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
)
"""The parameters of a tensor that name its place."""

_KEY = re.compile(r"/?[^/\0]{1,254}")


class UnknownRegion(UnknownModel):
    """No region of shared memory has that name."""


class UnopenedRegion(InvalidRequest):
    """A region's object cannot be opened. Over gRPC Triton's INTERNAL, as its clients expect it."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        region: A region's name.
        offset: Bytes from the region's start.
        size: Bytes that are the tensor's.
    """

    region: str
    offset: int
    size: int

    def parameters(self, size: int) -> dict[str, Any]:
        """What a reply says of an output of so many bytes that was put here."""
        offset = {OFFSET: self.offset} if self.offset else {}
        return {REGION: self.region, **offset, SIZE: size}


@dataclass(frozen=True)
class _Region:
    name: str
    key: str
    offset: int
    size: int
    file: int


class Regions:
    """The regions of one server, by name."""

    def __init__(self, *, offered: bool = True) -> None:
        """None yet.

        Args:
            offered: Whether clients may register any.
        """
        self.offered = offered and sys.platform == "linux"
        self._regions: dict[str, _Region] = {}

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """Name a range of an object.

        Args:
            name: What requests will call it.
            key: The object's name, as `shm_open` takes it.
            offset: Bytes from the object's start.
            size: Bytes of the range.

        Raises:
            InvalidRequest: Not offered; the name is taken or empty; the object is smaller.
            UnopenedRegion: There is no such object.
        """
        self._require()
        if name in self._regions:
            raise InvalidRequest(f"shared memory region '{name}' already in manager")
        file = self._open(key)
        try:
            self._require_range(name, key, offset, size, os.fstat(file).st_size)
        except InvalidRequest:
            os.close(file)
            raise
        self._regions[name] = _Region(name, key, offset, size, file)

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all of them; one that is not there is forgotten already."""
        for known in [name] if name else list(self._regions):
            region = self._regions.pop(known, None)
            if region is not None:
                os.close(region.file)

    def status(self, name: str = "") -> list[dict[str, Any]]:
        """Of a region, or of all.

        Raises:
            UnknownRegion: There is no such region.
        """
        regions: Iterable[_Region] = [self._find(name)] if name else self._regions.values()
        return [
            {"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.size} for r in regions
        ]

    def place(self, parameters: Mapping[str, Any], where: str) -> Place | None:
        """The place that a tensor's parameters name; None when they name none.

        Raises:
            InvalidRequest: They are no place, or it leaves its region.
            UnknownRegion: There is no such region.
        """
        if REGION not in parameters:
            return None
        self._require()
        name = parameters[REGION]
        size, offset = parameters.get(SIZE), parameters.get(OFFSET, 0)
        if not isinstance(name, str) or not _is_size(size) or not _is_size(offset):
            raise InvalidRequest(
                "a tensor's place in shared memory is malformed",
                where=where,
                wanted=f"{REGION}: a string; {SIZE} and {OFFSET}: whole numbers",
            )
        region = self._find(name)
        if offset + size > region.size:
            raise InvalidRequest(
                "a tensor leaves its shared memory region",
                where=where,
                wanted=f"at most {region.size} bytes",
                found=f"{offset} + {size}",
            )
        return Place(name, offset, size)

    def read(self, place: Place) -> bytes:
        """What lies there.

        Raises:
            InvalidRequest: Its object was cut.
            UnknownRegion: It is gone.
        """
        region = self._find(place.region)
        content = os.pread(region.file, place.size, region.offset + place.offset)
        if len(content) != place.size:
            raise self._cut(place, len(content))
        return content

    def write(self, place: Place, content: bytes) -> None:
        """Put a tensor there.

        Raises:
            InvalidRequest: It has more bytes than the place, or the region's object was cut.
            UnknownRegion: The region is gone.
        """
        region = self._find(place.region)
        if len(content) > place.size:
            raise InvalidRequest(
                "an output is larger than its place in shared memory",
                where=place.region,
                wanted=f"at most {place.size} bytes",
                found=len(content),
            )
        end = region.offset + place.offset + len(content)
        held = os.fstat(region.file).st_size
        if end > held:  # a write would make the object longer
            raise self._cut(place, held)
        os.pwrite(region.file, content, region.offset + place.offset)

    def _require(self) -> None:
        if not self.offered:
            raise InvalidRequest("shared memory is not offered here")

    def _find(self, name: str) -> _Region:
        region = self._regions.get(name)
        if region is None:
            raise UnknownRegion(
                f"Unable to find shared memory region: '{name}'",
                wanted=", ".join(self._regions) or "a region that was registered",
            )
        return region

    @staticmethod
    def _open(key: str) -> int:
        """The file of an object."""
        # One path component: what lies elsewhere on the disk is nobody's shared memory.
        own = key.removeprefix("/")
        why, cause = "no such object", None
        if _KEY.fullmatch(key) and own not in (".", ".."):
            try:
                return os.open(
                    FOLDER / own, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
                )
            except OSError as error:
                why, cause = error.strerror, error
        raise UnopenedRegion(
            f"Unable to open shared memory region: '{key}'",
            wanted=f"an object in {FOLDER}",
            found=why,
        ) from cause

    @staticmethod
    def _require_range(name: str, key: str, offset: int, size: int, held: int) -> None:
        """Refuse a region that no request could name, and a range that its object of `held` bytes has not."""
        if not name:
            raise InvalidRequest("a shared memory region needs a name", where=key)
        if size < 1 or offset < 0:
            raise InvalidRequest(
                "a shared memory region is a range of bytes",
                where=name,
                wanted="a byte_size above 0 and an offset from 0",
                found=f"byte_size {size}, offset {offset}",
            )
        if offset + size > held:
            raise InvalidRequest(
                "a shared memory region leaves its object",
                where=key,
                wanted=f"at most {held} bytes",
                found=f"{offset} + {size}",
            )

    @staticmethod
    def _cut(place: Place, found: int) -> InvalidRequest:
        return InvalidRequest(
            "a shared memory object was cut after it was registered",
            where=place.region,
            wanted=f"{place.size} bytes at {place.offset}",
            found=f"{found} bytes",
        )


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
