"""A subject that answers otherwise is not an alternative, however fast it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ....export.parity import UNIT, relative_error
from ....merge.errors import CheckFailed
from ..case import Case
from ..report import about_bundle

if TYPE_CHECKING:
    from ....export.bundle import Bundle
    from ..subject import Run

ROWS = 8
ROUNDINGS = 1024.0
"""Units in the last place of the largest logit that two runs may differ by: `check` holds an engine to far
less, against float64; this is to find another model, another task or a lost branch."""


def require_same_answers(name: str, run: Run, bundle: Bundle, bundle_runs: Run) -> None:
    """Run a mixed batch through both.

    Raises:
        CheckFailed: They differ by more than rounding.
    """
    about = about_bundle(bundle)
    case = Case(min(ROWS, bundle.engine.max_batch or ROWS))
    rows = case.rows(about.reads, seed=0)
    task = case.task_rows([entry.row for entry in about.tasks], seed=0)
    found, wanted = run(rows, task), bundle_runs(rows, task)
    widths = {entry.row: entry.classes for entry in about.tasks}
    allowed = ROUNDINGS * UNIT[bundle.engine.precision]
    for index, row in enumerate(task.tolist()):
        own = np.s_[index, ..., : widths[row]]
        error = relative_error(found[own], wanted[own])
        if not error <= allowed:
            raise CheckFailed(
                "a subject does not answer as the bundle does, so nothing is timed",
                where=f"{name}, row {index} of a batch of {len(task)}, bank row {row}",
                wanted=f"a difference of at most {allowed:.1e} of the largest logit",
                found=f"{error:.1e}",
            )
