"""Which task folds, which stays parallel, in which form, and why. Decided before anything is built."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..merge.bank import require_mixable, require_same_values
from ..merge.errors import UsageError
from ..merge.fold import refusals
from ..merge.sites import measure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from ..merge.fan_out import Group
    from ..merge.fold import Refusal
    from ..merge.sites import Sites

MODES = ("auto", "merged", "parallel", "multi", "fan-out")
BANKS = ("constants", "inputs")


@dataclass(frozen=True)
class TaskPlan:
    """What happens to one task.

    Attributes:
        task: Its name.
        form: `merged` or `parallel`.
        why: One sentence.
        branches: Number of branches by kind.
    """

    task: str
    form: str
    why: str
    branches: dict[str, int]


@dataclass(frozen=True)
class Shared:
    """Tasks that part from the trunk at one place.

    Attributes:
        tasks: Their names.
        until: Where they part, as MODULE:SIDE; empty for tasks that share nothing.
        why: One sentence.
    """

    tasks: list[str]
    until: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What `export` will build.

    Attributes:
        mode: `merged`, `parallel`, `multi` or `fan-out`.
        bank: `none`, `constants` or `inputs`.
        why: One sentence for the mode and the bank.
        tasks: In row order.
        shared: With an engine that answers every task for every row, what its tasks share.
    """

    mode: str
    bank: str
    why: str
    tasks: tuple[TaskPlan, ...]
    shared: tuple[Shared, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "mode": self.mode,
            "bank": self.bank,
            "why": self.why,
            "tasks": [vars(task) for task in self.tasks],
            **({"shared": [vars(part) for part in self.shared]} if self.shared else {}),
        }


def make_plan(
    deltas: Sequence[Delta],
    backbone: Backbone,
    sites: Sites | None = None,
    *,
    mode: str = "auto",
    bank: str = "constants",
    groups: Sequence[Group] = (),
) -> Plan:
    """Choose the form of a bundle.

    Args:
        deltas: The tasks.
        backbone: Their backbone.
        sites: Of the backbone, when at hand.
        mode: `auto` takes `merged` for one task that folds, `parallel` for one that does not,
            `multi` for several, or when the bank is an input.
        bank: For `multi`: constants of the engine, or inputs of it.
        groups: Of an engine that answers every task for every row; see `merge.fan_out.share`.

    Raises:
        UsageError: The mode does not fit the tasks; a branch cannot fold and its reason.
    """
    if mode not in MODES or bank not in BANKS:
        raise UsageError(
            "unknown mode or bank", wanted=f"{MODES}, {BANKS}", found=f"{mode}, {bank}"
        )
    if not deltas:
        raise UsageError("there is no task to export", do="name at least one delta")
    if mode in ("merged", "parallel") and len(deltas) > 1:
        raise UsageError(
            f"mode {mode} holds one task", found=f"{len(deltas)} deltas", do="use --mode multi"
        )
    if bank == "inputs" and mode in ("merged", "parallel", "fan-out"):
        raise UsageError(
            f"mode {mode} has no bank that could be an input", do="use --mode multi, or no --bank"
        )
    if bank == "inputs":
        mode = "multi"
    if mode == "multi" or (len(deltas) > 1 and mode != "fan-out"):
        for delta in deltas:
            require_mixable(delta)
    if len(deltas) > 1:
        require_same_values(deltas, sites or measure(backbone))
    refused = _refused(deltas, backbone, sites)
    if mode == "auto":
        alone = deltas[0].task
        mode = "multi" if len(deltas) > 1 else "parallel" if refused[alone] else "merged"
    if mode == "merged" and refused[deltas[0].task]:
        raise UsageError(
            f"task {deltas[0].task} cannot be merged exactly",
            found=str(refused[deltas[0].task][0]),
            do="use --mode parallel",
        )
    return Plan(
        mode=mode,
        bank=bank if mode == "multi" else "none",
        why=_why(mode, bank)
        + ("; but the engine for every task holds its own" if groups and bank == "inputs" else ""),
        tasks=tuple(_task(delta, mode, refused[delta.task]) for delta in deltas),
        shared=tuple(_shared(group) for group in groups),
    )


def _refused(
    deltas: Sequence[Delta], backbone: Backbone, sites: Sites | None
) -> dict[str, Sequence[Refusal]]:
    """What does not fold, by task; no refusal reads values, so tasks of one layout are asked once."""
    known: dict[object, Sequence[Refusal]] = {}
    found: dict[str, Sequence[Refusal]] = {}
    for delta in deltas:
        layout = delta.layout
        if layout not in known:
            known[layout] = refusals(delta, backbone, sites)
        found[delta.task] = known[layout]
    return found


def _shared(group: Group) -> Shared:
    tasks = list(group.bank.tasks)
    if len(tasks) == 1 and group.fork is None:
        why = "it shares the trunk with the others as far as their values are the same"
    elif group.fork is None:
        why = "no place was found where they could part, so each runs all of the trunk"
    else:
        why = f"the trunk runs once per example until {group.fork}"
        why += (
            ", and once per task from there on"
            if len(tasks) > 1
            else ", and for this task from there on"
        )
    return Shared(tasks, str(group.fork or ""), why)


def _why(mode: str, bank: str) -> str:
    if mode == "merged":
        return "every branch folds exactly: the engine is the bare backbone with other weights"
    if mode == "parallel":
        return "one task: its branches are constants, fused into the backbone's own GEMMs"
    if mode == "fan-out":
        return "fan-out: every task is answered for every row, and what tasks share runs once"
    form = (
        "gather form: every row takes its branches' weights from the bank, so the cost does not grow "
        "with the number of tasks"
    )
    kept = {
        "constants": "the bank is part of the engine",
        "inputs": "the bank is an input of the engine, so tasks can be added without a rebuild",
    }
    return f"{form}; {kept[bank]}"


def _task(delta: Delta, mode: str, refused: Sequence[Any]) -> TaskPlan:
    kinds = Counter(branch.tuner.kind for branch in delta.branches.values())
    if mode == "merged":
        why = "all branches fold exactly"
    elif refused:
        first = refused[0]
        why = f"{first.branch}: {first.reason}"
        if len(refused) > 1:
            why += f" (and {len(refused) - 1} more branches)"
    elif mode in ("multi", "fan-out"):
        why = "it would fold alone, but folded weights serve one task per engine"
    else:
        why = "asked for; it would fold exactly"
    if (
        any(branch.tuner.join == "tokens" for branch in delta.branches.values())
        and mode != "merged"
    ):
        why += "; deep prompts become constant prefixes"
    return TaskPlan(delta.task, "merged" if mode == "merged" else "parallel", why, dict(kinds))
