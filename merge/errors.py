"""The errors that a user can act on, each with the exit code of its branch.

    UtuneError                 1  unexpected
    ├── UsageError             2  the request cannot be carried out as written
    ├── CheckFailed            3  two runs that had to agree did not
    ├── IncompatibleArtefact   4  a file is damaged, of another version, or of another backbone
    ├── MissingDependency      5  a package, provider or device is not there
    └── BuildFailed            6  an engine could not be built

A message says what went wrong, where, what was wanted, what was found and what to do. Mistakes of
the programmer keep their traceback: they are not `UtuneError`.
"""

from __future__ import annotations


class UtuneError(Exception):
    """An error with its place, its expectation and its remedy.

    Args:
        what: One sentence, without a full stop, that names the failure.
        where: The file, site or tensor.
        wanted: What would have been right.
        found: What was there instead.
        do: What the user can do next.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        wanted: object = None,
        found: object = None,
        do: str | None = None,
    ) -> None:
        self.what = what
        self.details = {
            label: str(value)
            for label, value in (
                ("where", where),
                ("wanted", wanted),
                ("found", found),
                ("do", do),
            )
            if value is not None
        }
        lines = [what, *(f"  {label + ':':8}{text}" for label, text in self.details.items())]
        super().__init__("\n".join(lines))


class UsageError(UtuneError):
    """The request cannot be carried out as written."""

    exit_code = 2


class CheckFailed(UtuneError):
    """Two runs that had to agree did not."""

    exit_code = 3


class IncompatibleArtefact(UtuneError):
    """A file is damaged, of an unknown version, or belongs to something else."""

    exit_code = 4


class MissingDependency(UtuneError):
    """A package, an execution provider or a device is not there."""

    exit_code = 5


class BuildFailed(UtuneError):
    """An engine could not be built."""

    exit_code = 6
