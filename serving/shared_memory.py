"""The shared-memory extension: tensors that a client on the same machine leaves in POSIX shared memory.

A region is a name that a client gave to a range of one object under `/dev/shm`. Contents are read and written
with `pread` and `pwrite`: an object that its owner cuts short gives a short read there, where a mapping would
end the process.

Who may register regions reads and writes every shared-memory object that the server's user may, so that a
server offers them only when told to. Source: Triton's extension_shared_memory.
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
            InvalidRequest: Not offered; the name is taken; there is no such object, or it is smaller.
        """
        self._require()
        if not name or name in self._regions:
            raise InvalidRequest(
                "a shared memory region needs a name that is free", where="name", found=name
            )
        if size < 1 or offset < 0:
            raise InvalidRequest(
                "a shared memory region is a range of bytes",
                where=name,
                wanted="a byte_size above 0 and an offset from 0",
                found=f"byte_size {size}, offset {offset}",
            )
        # One path component: what lies elsewhere on the disk is nobody's shared memory.
        own = key.removeprefix("/")
        if not _KEY.fullmatch(key) or own in (".", ".."):
            raise self._unable(name, key, "no such object")
        try:
            file = os.open(FOLDER / own, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as cause:
            raise self._unable(name, key, cause.strerror) from cause
        held = os.fstat(file).st_size
        if offset + size > held:
            os.close(file)
            raise InvalidRequest(
                "a shared memory region leaves its object",
                where=key,
                wanted=f"at most {held} bytes",
                found=f"{offset} + {size}",
            )
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
                "Unable to find shared memory region",  # Triton's words, which clients look for
                wanted=", ".join(self._regions) or "a region that was registered",
                found=name,
            )
        return region

    @staticmethod
    def _unable(name: str, key: str, why: object) -> InvalidRequest:
        return InvalidRequest(
            f"Unable to open shared memory region: '{name}'",  # Triton's words
            where=key,
            wanted=f"an object in {FOLDER}",
            found=why,
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
