"""What the subjects of a benchmark are called: bundles by their names, told apart where those are the same."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...export.bundle import Bundle


def subject_names(bundles: Sequence[Bundle]) -> list[str]:
    """A name for each bundle, in order, no two the same.

    A bundle keeps its own name while no other has it. Bundles of one name are told apart by as much of the end of
    their paths as it takes, and a bundle that is timed twice is `NAME, again`: what two equal engines differ by.
    """
    common = {
        name for name, count in Counter(bundle.name for bundle in bundles).items() if count > 1
    }
    names = []
    for bundle in bundles:
        name = bundle.name
        if name in common:
            tail = _tail(bundle, [other for other in bundles if other.name == name])
            name = tail if tail.rpartition("/")[2] in (name, "") else f"{name} ({tail})"
        names.append(name)
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[index] = f"{name}, again" + (f" ({seen[name]})" if seen[name] > 2 else "")
    return names


def _tail(bundle: Bundle, others: Sequence[Bundle]) -> str:
    """The shortest end of its path that no other bundle's path has."""
    own = bundle.path.resolve()
    paths = {other.path.resolve() for other in others} - {own}
    for length in range(1, len(own.parts) + 1):
        tail = own.parts[-length:]
        if all(path.parts[-length:] != tail for path in paths):
            return "/".join(tail)
    return bundle.name
