"""What was done to an engine's numbers, in lines for a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

SHOWN = 3
LOST = {
    "clipped": "beyond its range, clipped",
    "flushed": "became zero",
    "subnormal": "below its smallest normal number, kept with fewer digits",
}


def numbers_in_words(report: Mapping[str, Any], check: Mapping[str, Any]) -> list[str]:
    """Lines on a plan's `typing` and `quantised`; none for float32.

    Args:
        report: With `typing`, and `quantised` where there is one.
        check: With `comparisons`.
    """
    lines = _typed(report["typing"])
    if quantised := report.get("quantised"):
        lines += _quantised(quantised)
        agreed = [c for c in check["comparisons"] if c["name"].startswith("agreement of ")]
        lines += [
            f"{c['name']}: {c['rows'] - c['flips']} of {c['rows']}, {c['note']}" for c in agreed
        ]
    return lines


def _typed(typing: Mapping[str, Any]) -> list[str]:
    if not typing["cast"]:
        return []
    precision, islands = typing["precision"], sum(typing["islands"].values())
    lines = [f"{precision}: {typing['cast']} tensors cast, {islands} nodes stay float32"]
    lines += [
        f"{precision}: {what}: {_some(typing[name])}" for name, what in LOST.items() if typing[name]
    ]
    for pattern, nodes in typing["kept"].items():
        names = ", ".join(nodes[:SHOWN]) + (
            f" and {len(nodes) - SHOWN} more" if nodes[SHOWN:] else ""
        )
        lines.append(f"{precision}: --keep-fp32 {pattern}: {names or 'nothing to keep'}")
    if audit := typing["audit"]:
        lines.append(
            f"{precision}: on {audit['inputs']} ({audit['rows']} examples) values reach {audit['largest']:.4g} "
            f"of {audit['limit']:.5g}"
        )
        if audit["near"]:
            near = {name: f"{value:.4g}" for name, value in audit["near"].items()}
            lines.append(f"{precision}: past a quarter of its range: {_some(near)}")
    return lines


def _quantised(quantised: Mapping[str, Any]) -> list[str]:
    calibration = quantised["calibration"]
    why = Counter(quantised["kept"].values())
    return [
        f"{quantised['format']}: {len(quantised['products'])} products, {quantised['scales']} scales, "
        f"{quantised['method']} of {calibration['rows']} {calibration['inputs']}",
        *(f"float32: {count} products: {reason}" for reason, count in why.items()),
    ]


def _some(found: Mapping[str, Any]) -> str:
    some = ", ".join(f"{name} {count}" for name, count in list(found.items())[:SHOWN])
    return some + (f" and {len(found) - SHOWN} more tensors" if len(found) > SHOWN else "")
