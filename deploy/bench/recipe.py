"""A sweep as a YAML file: which bundles, which cases, how long, where, and what stands beside what.

    format: utune-bench-recipe
    version: 1
    bundles:                    # a name for the report: a folder, relative to this file
      tasks64: runs/tasks64
      fused: runs/fused
      tasks8: {folder: runs/tasks8, weights: runs/backbone, deltas: [runs/task*.safetensors]}
    batches: [1, 8]
    mixes: [one, uniform, zipf, hot]
    settings: {rounds: 50, warmup: 5, seconds: 3, settle: 1, seed: 0}
    device: {provider: cpu, threads: 2, resident: false}
    comparisons:                # each is timed side by side, with the bare backbone of its first bundle
      - {name: size of the bank, bundle: tasks8, against: [tasks64]}
      - {name: one task, bundle: fused, batches: [8], mixes: [one]}
      - {name: other ways, bundle: tasks8, beside: [in-turn, torch, torch-compiled, unfused]}

Without `comparisons` there is one: the first bundle, against the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from ...export.engine import Device
from ...merge.errors import UsageError
from .beside import KINDS, Beside
from .case import MIXES, Case
from .report import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

FORMAT = "utune-bench-recipe"
VERSION = 1
KEYS = ("format", "version", "bundles", "batches", "mixes", "settings", "device", "comparisons")
SETTINGS = {
    "rounds": "min_rounds",
    "warmup": "warmup_rounds",
    "seconds": "min_seconds",
    "settle": "settle_calls",
    "seed": "seed",
}
"""A setting of the recipe, and the field of `Settings` that it is."""
DEVICE = ("provider", "threads", "kernels", "prepared", "arena", "memory_mb", "resident")
BUNDLE = ("folder", "weights", "deltas")
COMPARISON = ("name", "bundle", "against", "beside", "batches", "mixes", "nodes")
PROVIDERS = ("cpu", "cuda")
PARTS = "parts"
"""The folder where single cases are kept."""
NAME_WIDTH = 60
"""Longest name of a comparison: it becomes a folder."""


@dataclass(frozen=True)
class Together:
    """Bundles that are timed side by side.

    Attributes:
        name: Its name in the report, and its folder.
        bundles: Names of the bundles; the backbone of the first is the baseline.
        cases: Batch sizes and mixes.
        beside: What else answers the tasks of the first bundle.
        nodes: Profile each engine once, apart from the timed session.
    """

    name: str
    bundles: tuple[str, ...]
    cases: tuple[Case, ...]
    beside: Beside | None = None
    nodes: bool = False


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for.

    Attributes:
        path: The file.
        bundles: Folders by name.
        settings: How long to measure.
        device: Where every engine runs.
        resident: Time engines whose inputs and answers stay on the device.
        comparisons: What is timed side by side, in order.
    """

    path: Path
    bundles: dict[str, Path]
    settings: Settings
    device: Device
    resident: bool
    comparisons: tuple[Together, ...]


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; nothing is opened yet.

    Raises:
        UsageError: There is no such file, it is no YAML, or a value in it makes no sense; the message names the
            key.
    """
    if not path.is_file():
        raise UsageError("there is no such recipe", where=path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError("the recipe is not YAML", where=path, found=error) from error
    top = _Place(path, "")
    keys = top.mapping(value, KEYS, required=("format", "version", "bundles", "batches"))
    for key, wanted in (("format", FORMAT), ("version", VERSION)):
        if keys[key] != wanted:
            raise top.at(key).wrong("the recipe is of another kind", wanted, keys[key])
    bundles, originals = _bundles(top.at("bundles"), keys["bundles"])
    batches = top.at("batches").list(keys["batches"], _batch)
    mixes = top.at("mixes").list(keys.get("mixes", ["uniform"]), _mix)
    device, resident = _device(top.at("device"), keys.get("device", {}))
    return Recipe(
        path=path,
        bundles=bundles,
        settings=_settings(top.at("settings"), keys.get("settings", {})),
        device=device,
        resident=resident,
        comparisons=_comparisons(
            top.at("comparisons"),
            keys.get("comparisons"),
            list(bundles),
            originals,
            batches,
            mixes,
        ),
    )


@dataclass(frozen=True)
class _Place:
    """A value's place in the file, for messages."""

    path: Path
    key: str

    def at(self, key: str | int) -> _Place:
        """The place of a part of it."""
        if isinstance(key, int):
            return _Place(self.path, f"{self.key}[{key}]")
        return _Place(self.path, f"{self.key}.{key}" if self.key else key)

    def wrong(self, what: str, wanted: object, found: object) -> UsageError:
        """The error of this place."""
        where = f"{self.path}: {self.key}" if self.key else self.path
        return UsageError(what, where=where, wanted=wanted, found=found, do="see docs/bench.md")

    def mapping(
        self, value: Any, known: Iterable[str] | None, required: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The value as keys with values; of `known` keys only, unless every name will do."""
        if not isinstance(value, dict):
            raise self.wrong("a part of the recipe is no mapping", "keys with values", value)
        for key in value:
            if not isinstance(key, str) or (known is not None and key not in known):
                wanted = "a name" if known is None else f"one of {', '.join(known)}"
                raise self.at(str(key)).wrong("a key of the recipe is not known", wanted, key)
        for key in required:
            if key not in value:
                raise self.at(key).wrong("a key of the recipe is missing", key, ", ".join(value))
        return value

    def each(self, value: Any) -> list[tuple[_Place, Any]]:
        """The entries of a list that is not empty, with their places."""
        if not isinstance(value, list) or not value:
            raise self.wrong("a part of the recipe is no list", "a list that is not empty", value)
        return [(self.at(index), item) for index, item in enumerate(value)]

    def list(self, value: Any, read: Any) -> tuple[Any, ...]:
        """The value as a list that is not empty and names nothing twice."""
        found = tuple(read(at, item) for at, item in self.each(value))
        if len(set(found)) < len(found):
            raise self.wrong("a list names something twice", "each once", value)
        return found

    def number(self, value: Any, *, whole: bool, least: float) -> Any:
        """A number; YAML's true and false are none."""
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
            wanted = f"{'a whole number' if whole else 'a number'}, at least {least:g}"
            raise self.wrong("a number of the recipe is out of range", wanted, value)
        return value

    def switch(self, value: Any) -> bool:
        """True or false."""
        if not isinstance(value, bool):
            raise self.wrong("a switch is not known", "true or false", value)
        return value

    def text(self, value: Any, known: Iterable[str] | None = None) -> str:
        """A text that is not empty; one of `known` if that is given."""
        if not isinstance(value, str) or not value or (known is not None and value not in known):
            wanted = "a text" if known is None else f"one of {', '.join(known)}"
            raise self.wrong("a value of the recipe is not known", wanted, value)
        return value


class _Files(NamedTuple):
    """The files that a bundle was exported from, where the recipe names them."""

    weights: Path | None
    deltas: tuple[Path, ...]


def _bundles(place: _Place, value: Any) -> tuple[dict[str, Path], dict[str, _Files]]:
    named = place.mapping(value, None)
    if not named:
        raise place.wrong("the recipe names no bundle", "a name and a folder", value)
    folders, originals = {}, {}
    for name, entry in named.items():
        at = place.at(name)
        if isinstance(entry, dict):
            given = at.mapping(entry, BUNDLE, required=("folder", "deltas"))
            originals[name] = _files(at, given)
            at, entry = at.at("folder"), given["folder"]
        folders[name] = place.path.parent / at.text(entry)
        if not (folders[name] / "manifest.json").is_file():
            raise at.wrong("there is no such bundle", "a bundle's folder", folders[name])
    return folders, originals


def _files(place: _Place, given: Mapping[str, Any]) -> _Files:
    beside = place.path.parent
    weights = given.get("weights")
    if weights is not None:
        weights = beside / place.at("weights").text(weights)
        if not weights.exists():
            raise place.at("weights").wrong(
                "there are no such weights", "a file or folder", weights
            )
    deltas: list[Path] = []
    for at, pattern in place.at("deltas").each(given["deltas"]):
        found = sorted(beside.glob(at.text(pattern)))
        if not found:
            raise at.wrong("no delta has such a name", "a file, or a pattern of files", pattern)
        deltas += [path for path in found if path not in deltas]
    return _Files(weights, tuple(deltas))


def _batch(place: _Place, value: Any) -> int:
    return place.number(value, whole=True, least=1)


def _mix(place: _Place, value: Any) -> str:
    return place.text(value, tuple(MIXES))


def _settings(place: _Place, value: Any) -> Settings:
    least = {"rounds": 2, "warmup": 1}
    given = {
        SETTINGS[key]: place.at(key).number(item, whole=key != "seconds", least=least.get(key, 0))
        for key, item in place.mapping(value, SETTINGS).items()
    }
    return Settings(**given)


def _device(place: _Place, value: Any) -> tuple[Device, bool]:
    given = place.mapping(value, DEVICE)
    provider = place.at("provider").text(given.get("provider", "cpu"), PROVIDERS)
    numbers: dict[str, Any] = {
        name: place.at(name).number(given[name], whole=True, least=1)
        for name in ("threads", "memory_mb")
        if given.get(name) is not None
    }
    paths: dict[str, Any] = {
        name: place.path.parent / place.at(name).text(given[name])
        for name in ("kernels", "prepared")
        if given.get(name) is not None
    }
    arena = place.at("arena").switch(given.get("arena", True))
    resident = place.at("resident").switch(given.get("resident", False))
    return Device(provider, **numbers, **paths, arena=arena), resident


def _comparisons(
    place: _Place,
    value: Any,
    bundles: list[str],
    originals: Mapping[str, _Files],
    batches: tuple[int, ...],
    mixes: tuple[str, ...],
) -> tuple[Together, ...]:
    if value is None:
        return (Together(_folder(place, bundles[0]), tuple(bundles), _cases(batches, mixes)),)
    found = []
    for at, item in place.each(value):
        given = at.mapping(item, COMPARISON, required=("bundle",))
        first = at.at("bundle").text(given["bundle"], bundles)
        against = given.get("against")
        others = () if against is None else at.at("against").list(
            against, lambda p, text: p.text(text, bundles)
        )  # fmt: skip
        if first in others:
            raise at.at("against").wrong("a bundle stands beside itself", "another one", first)
        found.append(
            Together(
                _folder(at.at("name"), given.get("name", " vs ".join((first, *others)))),
                (first, *others),
                _cases(
                    at.at("batches").list(given["batches"], _batch)
                    if "batches" in given
                    else batches,
                    at.at("mixes").list(given["mixes"], _mix) if "mixes" in given else mixes,
                ),
                _beside(at.at("beside"), given["beside"], first, originals)
                if "beside" in given
                else None,
                at.at("nodes").switch(given.get("nodes", False)),
            )
        )
    names = [together.name for together in found]
    if len({name.casefold() for name in names}) < len(names):  # folders may not tell case
        raise place.wrong("two comparisons have the same name", "a name each", ", ".join(names))
    return tuple(found)


def _beside(place: _Place, value: Any, first: str, originals: Mapping[str, _Files]) -> Beside:
    kinds = place.list(value, lambda at, text: at.text(text, KINDS))
    if first not in originals:
        wanted = f"{first}: {{folder: ..., weights: ..., deltas: [...]}}"
        raise place.wrong("what stands beside a bundle is made from its deltas", wanted, value)
    return Beside(kinds, *originals[first])


def _cases(batches: Iterable[int], mixes: tuple[str, ...]) -> tuple[Case, ...]:
    return tuple(Case(batch, mix) for batch in batches for mix in mixes)


def _folder(place: _Place, name: Any) -> str:
    """A name that can be a folder's on any system."""
    text = place.text(name)
    plain = all(letter.isalnum() or letter in " -_.," for letter in text)
    if not plain or len(text) > NAME_WIDTH or text.strip(" .") != text or text.casefold() == PARTS:
        wanted = f"letters, digits, spaces, - _ . and commas, {NAME_WIDTH} at most, and not {PARTS}"
        raise place.wrong("a comparison's name cannot be a folder's", wanted, text)
    return text


class _Strict(yaml.SafeLoader):
    """YAML that refuses a key that is there twice: the first would be lost silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (at, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", at.start_mark
                )
        return super().construct_mapping(node, deep)
