"""What was built, `plan.json`, and whether it belongs here: asked before TensorRT opens the plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....merge.errors import IncompatibleArtefact, UsageError
from ....merge.files import digest
from ...engine import Tensor
from . import builder
from .recipe import Profile

if TYPE_CHECKING:
    from pathlib import Path

AGAIN = "build it again on this machine: python build.py"


@dataclass(frozen=True)
class Plan:
    """A built engine.

    Attributes:
        path: The plan's file.
        tensorrt: Version that built it.
        gpu: Name of the device that built it, if it was known.
        compute_capability: Of that device, major and minor, if it was known.
        onnx: File of the graph that it was built from.
        onnx_sha256: Of that file.
        precision: Numbers that it computes in.
        inputs: Of the graph.
        profiles: Ranges of batch sizes, in the order of its optimization profiles.
        weights: See `Recipe`.
        refit: Names of the weights that can be replaced.
        hardware_compatibility: See `Recipe`.
        version_compatible: See `Recipe`.
        identity: See `Recipe`.
    """

    path: Path
    tensorrt: str
    gpu: str | None
    compute_capability: tuple[int, int] | None
    onnx: Path
    onnx_sha256: str
    precision: str
    inputs: tuple[Tensor, ...]
    profiles: tuple[Profile, ...]
    weights: str
    refit: tuple[str, ...]
    hardware_compatibility: str
    version_compatible: bool
    identity: str

    def require_tensorrt(self, version: str) -> None:
        """Hold this machine's TensorRT to the plan's.

        Raises:
            IncompatibleArtefact: It cannot open the plan.
        """
        built, here = (_major_minor(text) for text in (self.tensorrt, version))
        later = here >= built and (built[0], here[0]) in ((10, 10), (10, 11), (11, 11))
        if not (built == here or (self.version_compatible and later)):
            raise IncompatibleArtefact(
                "the plan was built by another version of TensorRT",
                where=self.path,
                wanted=f"TensorRT {self.tensorrt}" + (" or later" * self.version_compatible),
                found=f"TensorRT {version}",
                do=AGAIN,
            )

    def require_device(self, capability: tuple[int, int]) -> None:
        """Hold a CUDA device to the one that the plan was built on, if that was known.

        Raises:
            IncompatibleArtefact: The plan does not run on it.
        """
        built = self.compute_capability
        if built is None:
            return
        any_ampere = self.hardware_compatibility == "ampere-plus" and capability >= (8, 0)
        if capability != built and not any_ampere:
            raise IncompatibleArtefact(
                "the plan was built for another kind of GPU",
                where=self.path,
                wanted=f"compute capability {_dotted(built)} ({self.gpu}), or 8.0 and later"
                if self.hardware_compatibility == "ampere-plus"
                else f"compute capability {_dotted(built)} ({self.gpu})",
                found=f"compute capability {_dotted(capability)}",
                do=AGAIN,
            )

    def require_onnx(self) -> Path:
        """The graph that a stripped plan takes its weights from.

        Raises:
            IncompatibleArtefact: It is missing, or another one.
        """
        if not self.onnx.is_file() or digest(self.onnx) != self.onnx_sha256:
            raise IncompatibleArtefact(
                "a stripped plan needs the ONNX file that it was built from, for its weights",
                where=self.onnx,
                wanted=f"sha256 {self.onnx_sha256}",
                found="another file" if self.onnx.is_file() else "no such file",
            )
        return self.onnx


def read_plan(path: Path) -> Plan:
    """What `plan.json` beside a plan says of it, the plan's digest verified.

    Raises:
        UsageError: There is no such plan.
        IncompatibleArtefact: `plan.json` is missing, malformed or another plan's.
    """
    about = path.with_name(builder.ABOUT)
    if not path.is_file():
        raise UsageError("there is no TensorRT plan", where=path, do="build it: python build.py")
    try:
        entry: Any = json.loads(about.read_text())
        if (entry["format"], entry["version"]) != (builder.PLAN_FORMAT, builder.PLAN_VERSION):
            raise ValueError(f"{entry['format']} version {entry['version']} is unknown")
        wanted, gpu = entry["plan"]["sha256"], entry["gpu"] or {}
        capability = gpu.get("compute_capability")
        plan = Plan(
            path=path,
            tensorrt=entry["tensorrt"],
            gpu=gpu.get("name"),
            compute_capability=None if capability is None else (capability[0], capability[1]),
            onnx=path.with_name(entry["onnx"]["file"]),
            onnx_sha256=entry["onnx"]["sha256"],
            precision=entry["precision"],
            inputs=tuple(Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in entry["inputs"]),
            profiles=tuple(Profile(*sizes) for sizes in entry["profiles"]),
            weights=entry["weights"],
            refit=tuple(entry["refit"]),
            hardware_compatibility=entry["hardware_compatibility"],
            version_compatible=entry["version_compatible"],
            identity=entry["identity"],
        )
        _major_minor(plan.tensorrt)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as cause:
        raise IncompatibleArtefact(
            "the plan's description is missing or malformed",
            where=about,
            found=str(cause),
            do=AGAIN,
        ) from cause
    if (found := digest(path)) != wanted:
        raise IncompatibleArtefact(
            "the plan is not the one that was built",
            where=path,
            wanted=f"sha256 {wanted}",
            found=f"sha256 {found}",
            do="copy the folder again, or " + AGAIN,
        )
    return plan


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
