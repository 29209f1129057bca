"""What architectures ask of their arguments, which come from a command line or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def require_sizes(**sizes: Any) -> None:
    """Every size is a whole number from 1.

    Raises:
        UsageError: One is not.
    """
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UsageError(f"{name} is not a whole number from 1", found=repr(size))


def require_flags(**flags: Any) -> None:
    """Every flag is true or false.

    Raises:
        UsageError: One is neither.
    """
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise UsageError(f"{name} is neither true nor false", found=repr(flag))


def require_heads(name: str, heads: Any, channels: int) -> None:
    """Attention heads divide the channels that they share.

    Raises:
        UsageError: They do not.
    """
    require_sizes(**{name: heads})
    if channels % heads:
        raise UsageError(
            "the channels cannot be divided among the attention heads",
            where=name,
            wanted=f"a divisor of {channels}",
            found=heads,
        )


def require_room(name: str, length: int, places: int) -> None:
    """A row is no longer than the table of positions.

    Raises:
        UsageError: It is.
    """
    if length > places:
        raise UsageError(
            "the table of positions is shorter than the rows",
            where=name,
            wanted=f"at most {places}",
            found=length,
            do=f"say how long rows are: --backbone-arg {name}={places}",
        )


def require_lengths(name: str, values: Any) -> tuple[int, int]:
    """The lengths of a map's two axes.

    Raises:
        UsageError: They are not two lengths.
    """
    given = list(values) if isinstance(values, list | tuple) else [values]
    if len(given) != 2:
        raise UsageError(
            "a size of the backbone is not two lengths",
            where=name,
            wanted="the lengths of both axes",
            found=values,
        )
    first, second = given
    require_sizes(**{f"{name}, first": first, f"{name}, second": second})
    return first, second


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """The value is one of a few.

    Raises:
        UsageError: It is not.
    """
    if value not in choices:
        raise UsageError(
            "an argument of the backbone has no such value",
            where=name,
            wanted=", ".join(choices),
            found=repr(value),
        )
