"""Run a recipe, case by case, and go on where an earlier run stopped.

    FOLDER/report.json, report.html        every comparison
    FOLDER/NAME/report.json, report.html   one comparison, as `bench` writes it
    FOLDER/parts/NAME/8-uniform.json       one case: its report, and the key that says what it depends on

A case is not run again while its key is the same: its part of the recipe, the manifests of its bundles, the machine
with its libraries. Comments and other cases of the recipe may change. What a machine is named by does not hold how
busy it was; the report says in how many sittings its cases were measured.
"""

from __future__ import annotations

import gc
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ...export.bundle import open_bundle
from ...merge.errors import UsageError
from ...merge.files import canonical_json, digest
from ..records import write_record
from .ceilings import measure_ceilings
from .combine import combine
from .furnish import furnish
from .machine import read_machine
from .measure import measure
from .pace import weight
from .reading import report_from
from .recipe import PARTS
from .report import SWEEP_FORMAT, TIMED, TIMED_ON_DEVICE, VERSION, about_bundle, write_json
from .run import open_subjects
from .views.page import write_html, write_sweep_html

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ...export.bundle import Bundle
    from .case import Case
    from .measure import Progress
    from .recipe import Recipe, Together
    from .report import Report

FORMAT_OF_PARTS = "utune-bench-part"


@dataclass(frozen=True)
class Part:
    """One case of one comparison.

    Attributes:
        together: The comparison.
        case: The case.
        file: Where it is kept.
        key: What its numbers depend on.
    """

    together: Together
    case: Case
    file: Path
    key: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A part's report and the sitting that it was measured in, ISO 8601."""

    report: Report
    sitting: str


def sweep(
    recipe: Recipe,
    folder: Path,
    *,
    fresh: bool = False,
    started: Callable[[list[Part], int], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Report]:
    """Run what is not there yet, and write the reports.

    Args:
        recipe: What to run.
        folder: Where parts and reports are.
        fresh: Run all of it again.
        started: Told once what is run, and how many parts are there already.
        progress: Told between rounds; cases are numbered over all that is run.

    Returns:
        A report per comparison, by name.

    Raises:
        UsageError: A batch is larger than an engine takes, or the folder's report is not a sweep's.
        IncompatibleArtefact: Bundles that do not belong beside each other.
    """
    bundles = {name: open_bundle(path) for name, path in recipe.bundles.items()}
    _refuse(recipe, bundles, folder)
    parts = plan(recipe, bundles, folder)
    had = {} if fresh else {part.file: found for part in parts if (found := _read(part))}
    todo = [part for part in parts if part.file not in had]
    if started is not None:
        started(todo, len(had))
    sitting = datetime.now().astimezone().isoformat(timespec="seconds")
    for together in recipe.comparisons:
        mine = [part for part in todo if part.together is together]
        if mine:
            had |= _run(recipe, mine, bundles, todo, sitting, progress)
    reports = {
        together.name: _combined([had[part.file] for part in parts if part.together is together])
        for together in recipe.comparisons
    }
    write_sweep(reports, recipe.path.stem, folder)
    return reports


def plan(recipe: Recipe, bundles: Mapping[str, Bundle], folder: Path) -> list[Part]:
    """Every part of the recipe, in order, with the key of this machine and these bundles."""
    manifests = {name: digest(bundle.path / "manifest.json") for name, bundle in bundles.items()}
    machine = asdict(read_machine())
    del machine["memory_bytes"]  # a virtual machine is given some pages more or less at each start
    device = asdict(recipe.device)
    device["kernels"] = digest(recipe.device.kernels) if recipe.device.kernels else None
    found = []
    for together in recipe.comparisons:
        for case in together.cases:
            depends = {
                "case": asdict(case),
                "settings": asdict(recipe.settings),
                "device": device,
                "resident": recipe.resident,
                **({"beside": together.beside.kinds} if together.beside else {}),
                **({"nodes": True} if together.nodes else {}),
            }
            key = {
                "recipe": hashlib.sha256(canonical_json(depends).encode()).hexdigest(),
                "bundles": [[name, manifests[name]] for name in together.bundles],
                "machine": hashlib.sha256(canonical_json(machine).encode()).hexdigest(),
            }
            file = folder / PARTS / together.name / f"{case.batch}-{case.mix}.json"
            found.append(Part(together, case, file, key))
    return found


def weights(parts: Sequence[Part]) -> list[float]:
    """How long each part takes beside the others, for the time left."""
    return [weight(part.case, _subjects(part.together)) for part in parts]


def _subjects(together: Together) -> int:
    """How many are timed, the bare backbone among them."""
    beside = together.beside.kinds if together.beside else ()
    return 1 + len(together.bundles) + len(beside)


def write_sweep(reports: Mapping[str, Report], title: str, folder: Path) -> None:
    """The reports of each comparison and of all."""
    for name, report in reports.items():
        write_json(report, folder / name / "report.json")
        write_html(report, folder / name / "report.html")
    value = {
        "format": SWEEP_FORMAT,
        "version": VERSION,
        "reports": {name: report.to_json() for name, report in reports.items()},
    }
    write_record(value, folder / "report.json")
    write_sweep_html(reports, title, folder / "report.html")


def _refuse(recipe: Recipe, bundles: Mapping[str, Bundle], folder: Path) -> None:
    """Find before anything is timed what would stop a later part."""
    for index, together in enumerate(recipe.comparisons):
        largest = max(case.batch for case in together.cases)
        for name in together.bundles:
            most = bundles[name].engine.max_batch
            if most is not None and largest > most:
                raise UsageError(
                    "a batch is larger than the engine takes",
                    where=f"{recipe.path}: comparisons[{index}], {together.name}",
                    wanted=f"at most {most}, for {name}",
                    found=largest,
                    do="ask for a smaller batch, or export with a larger one",
                )
    report = folder / "report.json"
    if report.is_file() and not (folder / PARTS).is_dir():
        raise UsageError(
            "the folder holds a report that no recipe made",
            where=report,
            do="name another folder",
        )


def _run(
    recipe: Recipe,
    parts: Sequence[Part],
    bundles: Mapping[str, Bundle],
    todo: Sequence[Part],
    sitting: str,
    progress: Callable[[Progress], None] | None,
) -> dict[Path, Measured]:
    """The parts of one comparison, with its engines opened once."""
    together = parts[0].together
    first, *others = (bundles[name] for name in together.bundles)
    subjects = open_subjects(
        first,
        others,
        together.bundles,
        recipe.device,
        resident=recipe.resident,
        beside=together.beside,
    )
    about = about_bundle(first)
    cases = [part.case for part in parts]
    subjects = furnish(
        subjects, cases, about, recipe.settings.seed, footprint=True, nodes=together.nodes
    )
    ceilings = measure_ceilings(recipe.device, first.engine.precision)
    found = {}
    for part in parts:
        number = todo.index(part) + 1

        def tell(now: Progress, number: int = number) -> None:
            if progress is not None:
                progress(replace(now, number=number, cases=len(todo)))

        report = measure(
            subjects,
            [part.case],
            about=about,
            settings=recipe.settings,
            threads=recipe.device.threads,
            timed=TIMED_ON_DEVICE if recipe.resident else TIMED,
            ceilings=ceilings,
            progress=tell,
        )
        found[part.file] = Measured(report, sitting)
        value = {"key": part.key, "sitting": sitting, "report": report.to_json()}
        write_record({"format": FORMAT_OF_PARTS, "version": VERSION, **value}, part.file)
    subjects.clear()
    gc.collect()  # the engines of one comparison are gone before those of the next are opened
    return found


def _read(part: Part) -> Measured | None:
    """A part that is there with the same key; one that is not, or is damaged, is run."""
    try:
        value = json.loads(part.file.read_text(encoding="utf-8"))
        if (value["format"], value["version"]) != (FORMAT_OF_PARTS, VERSION) or value[
            "key"
        ] != part.key:
            return None
        return Measured(report_from(value["report"]), value["sitting"])
    except (OSError, AttributeError, KeyError, TypeError, ValueError, UsageError):
        return None


def _combined(measured: Sequence[Measured]) -> Report:
    return combine([part.report for part in measured], [part.sitting for part in measured])
