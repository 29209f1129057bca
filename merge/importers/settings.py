"""What a checkpoint does not say of itself: from its saved arguments, or from a person, never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

T = TypeVar("T", bool, int, float, str)

YES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Settings:
    """Named values that a person gave, each taken at most once.

    Args:
        given: Texts by name.
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self.given = dict(given or {})
        self.asked: list[str] = []
        self.found: dict[str, Any] = {}

    def allow(self, *names: str) -> None:
        """Names that may be given though this file needs none of them."""
        self.asked += names

    def get(self, name: str, kind: type[T], saved: Mapping[str, Any] | None = None) -> T | None:
        """The value that was given, or that the file saved, or None.

        Raises:
            UsageError: It cannot be read as `kind`.
        """
        self.asked.append(name)
        text = self.given.get(name, (saved or {}).get(name))
        if text is None:
            return None
        try:
            value = YES[str(text).lower()] if kind is bool else kind(text)
        except (KeyError, ValueError, TypeError) as cause:
            raise UsageError(
                f"the setting {name} cannot be read",
                wanted=kind.__name__,
                found=repr(text),
                do=f"say it: --set {name}=VALUE",
            ) from cause
        self.found[name] = value
        return value  # type: ignore[return-value]

    def need(
        self, name: str, kind: type[T], saved: Mapping[str, Any] | None = None, *, hint: str
    ) -> T:
        """The value that was given, or that the file saved.

        Raises:
            UsageError: Neither; the error names it.
        """
        value = self.get(name, kind, saved)
        if value is None:
            raise UsageError(
                f"the file does not say its {name}",
                wanted=hint,
                found="neither in the file nor given",
                do=f"add --set {name}=VALUE",
            )
        return value

    def choose(
        self,
        name: str,
        choices: Collection[str],
        saved: Mapping[str, Any] | None = None,
    ) -> str:
        """One of several words; see `need`."""
        value = self.need(name, str, saved, hint=f"one of {', '.join(choices)}")
        if value not in choices:
            raise UsageError(
                f"the setting {name} is not one that can be carried",
                wanted=f"one of {', '.join(choices)}",
                found=value,
            )
        return value

    def require_used(self) -> None:
        """Refuse what was given and never asked for.

        Raises:
            UsageError: A name is unknown to the reader.
        """
        if surplus := sorted(set(self.given) - set(self.asked)):
            raise UsageError(
                "a setting means nothing for this file",
                wanted=f"among {', '.join(sorted(set(self.asked)))}" if self.asked else "none",
                found=", ".join(surplus),
            )
