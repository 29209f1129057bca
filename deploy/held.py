"""What a bundle, a backbone and deltas are held to before anything is compared: do they belong together?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..export.bundle import MANIFEST
from ..export.precision import QUANTISED
from ..merge.bank import Slot
from ..merge.errors import IncompatibleArtefact, MissingDependency, UsageError
from ..merge.lower import in_double, lower
from ..merge.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..export.bundle import Bundle
    from ..export.engine import Device
    from ..merge.backbone import Backbone
    from ..merge.delta import Delta
    from ..merge.sites import Sites


def require_runnable(precision: str, device: Device) -> None:
    """Refuse a precision that the device cannot run, before anything is built.

    Raises:
        UsageError: The CPU has no TF32.
        MissingDependency: ONNX Runtime's CPU provider has no bfloat16 products, its CUDA provider none in eight bits.
    """
    if precision in QUANTISED and device.provider == "cuda":
        raise MissingDependency(
            f"ONNX Runtime's CUDA provider has no products in {precision}, and would compute them in float32",
            wanted="--provider cpu, or --target tensorrt",
            found="--provider cuda",
        )
    if precision == "tf32" and device.provider == "cpu":
        raise UsageError(
            "TF32 is a mode of a CUDA device's products",
            wanted="--provider cuda",
            found="--provider cpu",
            do="export on a machine with a CUDA device, or use --precision fp32",
        )
    if precision == "bf16" and device.provider == "cpu":
        raise MissingDependency(
            "a bf16 engine can be checked on a CUDA device only, and nothing ships unchecked",
            wanted="--provider cuda",
            found="--provider cpu, whose products are not made for bfloat16",
            do="export on a machine with a CUDA device, or use --precision fp16",
        )


def require_same_backbone(bundle: Bundle, backbone: Backbone) -> None:
    """Hold a bundle to a backbone.

    Raises:
        IncompatibleArtefact: The bundle was exported from another one.
    """
    if bundle.backbone["fingerprint"] != backbone.identity.fingerprint:
        raise IncompatibleArtefact(
            "the bundle was exported from another backbone",
            where=bundle.path,
            wanted=f"{bundle.backbone['architecture']} {bundle.backbone['fingerprint'][:16]}",
            found=f"{backbone.identity.architecture} {backbone.identity.fingerprint[:16]}",
            do="load the weights that it was exported from",
        )


def require_tasks(bundle: Bundle, deltas: Mapping[str, Delta]) -> list[Delta]:
    """The deltas of a bundle's tasks, in row order.

    Args:
        bundle: The bundle.
        deltas: By the SHA-256 of their files.

    Raises:
        IncompatibleArtefact: A task's delta is not among them, or one is of no task.
    """
    wanted = {task.delta: task.name for task in bundle.tasks}
    for digest, delta in deltas.items():
        if digest not in wanted:
            raise IncompatibleArtefact(
                "a delta is not one that the bundle was exported from",
                where=f"task {delta.task}",
                wanted=", ".join(f"{name} {key[:16]}" for key, name in wanted.items()),
                found=digest[:16],
            )
    if missing := [name for key, name in wanted.items() if key not in deltas]:
        raise IncompatibleArtefact(
            "the deltas of some tasks are not given",
            where=bundle.path,
            wanted=", ".join(missing),
            do="name the delta of every task of the bundle",
        )
    return [deltas[task.delta] for task in bundle.tasks]


def bank_rows(
    bundle: Bundle, backbone: Backbone, deltas: Sequence[Delta], sites: Sites
) -> Rows | None:
    """What the bank of a bundle must hold, by its slots and its tasks' deltas; None where it has no bank."""
    if bundle.mode != "multi":
        return None
    slots = tuple(Slot.from_json(bundle.path / MANIFEST, entry) for entry in bundle.plan["slots"])
    double = in_double(backbone)
    return Rows(slots, [lower(backbone, delta, sites, double) for delta in deltas])
