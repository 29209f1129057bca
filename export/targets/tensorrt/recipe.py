"""What TensorRT is to build: a file that is written where the tasks are and read where the GPU is."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ....merge.errors import IncompatibleArtefact, UsageError
from ...engine import Tensor
from . import builder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WORKSPACE = 4 << 30  # bytes that a layer may use for itself while it runs
THROUGHPUT = (8, 32)  # batch sizes that kernels are chosen for, besides 1 and the largest


@dataclass(frozen=True)
class Profile:
    """Sizes that a free axis may have: TensorRT chooses its kernels for `opt`, and takes `min` to `max`."""

    min: int
    opt: int
    max: int

    @property
    def sizes(self) -> list[int]:
        """The three of them."""
        return [self.min, self.opt, self.max]


def default_profiles(max_batch: int) -> tuple[Profile, ...]:
    """One profile for single requests, then one up to each size of `THROUGHPUT` and to the largest batch."""
    sizes = [1, *(size for size in THROUGHPUT if size < max_batch), max_batch]
    steps = sorted(set(sizes))
    return tuple(
        Profile(low + 1, size, size) for low, size in zip([0, *steps], steps, strict=False)
    )


@dataclass(frozen=True)
class Recipe:
    """One engine for TensorRT.

    Attributes:
        onnx: Name of the ONNX file, in the recipe's folder.
        sha256: Of the ONNX file.
        precision: A key of `export.precision.PRECISIONS`; the file has its types already.
        inputs: Of the graph; free axes are named `batch` and `tasks`.
        profiles: Ranges of batch sizes.
        identity: Of the tasks and the backbone, see `bundle.identity_of`.
        check: `passed`, or `unchecked` where no runtime at hand computes in the precision.
        tasks: How many rows a bank that is an input may have; None where it is not.
        weights: `plain`: in the plan. `stripped`: the plan has none, and they are read from the ONNX file when
            it is opened. `refit`: in the plan, and those of `refit` can be replaced while it is open.
        refit: Names of the tasks' tensors in the graph.
        workspace: Bytes that TensorRT may use while it runs a layer.
        optimization_level: 0 to 5, how long TensorRT looks for kernels.
        timing_cache: File of measurements, kept between builds; None for none.
        hardware_compatibility: `none`: devices of one compute capability and, TensorRT advises, one model.
            `same-compute-capability` and `ampere-plus`: those devices, perhaps slower.
        version_compatible: Let later versions of TensorRT open the plan.
    """

    onnx: str
    sha256: str
    precision: str
    inputs: tuple[Tensor, ...]
    profiles: tuple[Profile, ...]
    identity: str
    check: str
    tasks: Profile | None = None
    weights: str = "plain"
    refit: tuple[str, ...] = ()
    workspace: int = WORKSPACE
    optimization_level: int = 3
    timing_cache: str | None = "timing.cache"
    hardware_compatibility: str = "none"
    version_compatible: bool = False

    def __post_init__(self) -> None:
        """Hold it to what can be built.

        Raises:
            UsageError: It cannot.
        """
        if found := builder.problems(self.to_json()):
            raise UsageError("TensorRT cannot build such a recipe", found="; ".join(found))

    def to_json(self) -> dict[str, Any]:
        """What `recipe.json` holds."""
        entry = asdict(self)
        del entry["sha256"]
        return {
            **entry,
            "format": builder.RECIPE_FORMAT,
            "version": builder.RECIPE_VERSION,
            "onnx": {"file": self.onnx, "sha256": self.sha256},
            "inputs": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in self.inputs
            ],
            "profiles": [profile.sizes for profile in self.profiles],
            "tasks": None if self.tasks is None else self.tasks.sizes,
            "refit": list(self.refit),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote."""
        fields = {k: v for k, v in entry.items() if k not in ("format", "version")}
        return cls(
            **{
                **fields,
                "onnx": entry["onnx"]["file"],
                "sha256": entry["onnx"]["sha256"],
                "inputs": tuple(
                    Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in entry["inputs"]
                ),
                "profiles": tuple(Profile(*sizes) for sizes in entry["profiles"]),
                "tasks": None if entry["tasks"] is None else Profile(*entry["tasks"]),
                "refit": tuple(entry["refit"]),
            }
        )

    def write(self, folder: Path) -> None:
        """Write `recipe.json`."""
        text = json.dumps(self.to_json(), indent=2, sort_keys=True) + "\n"
        builder.write(folder / builder.RECIPE, text.encode())


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a folder.

    Raises:
        IncompatibleArtefact: It is malformed, or the ONNX file is not the one that it was written for.
    """
    try:
        return Recipe.from_json(builder.read_recipe(folder))
    except builder.BadRecipe as cause:
        raise IncompatibleArtefact(
            "the recipe cannot be used",
            where=folder / builder.RECIPE,
            found=str(cause),
            do="export it again with --target tensorrt --prepare",
        ) from cause


def trtexec(recipe: Recipe, major: int = 11) -> str:
    """The command of NVIDIA's `trtexec` that builds the same engine.

    Args:
        recipe: What to build.
        major: Of TensorRT; 10 must be told that the graph's types are meant.

    Raises:
        UsageError: The tasks' tensors are to be refitted: `trtexec` can mark all weights or none.
    """
    if recipe.weights == "refit":
        raise UsageError(
            "trtexec cannot mark single weights for refitting", do="build with python build.py"
        )
    words = ["trtexec", f"--onnx={recipe.onnx}", f"--saveEngine={builder.PLAN}"]
    words += ["--stronglyTyped"] if major == 10 else []
    words += [] if recipe.precision == "tf32" else ["--noTF32"]
    words += [
        f"--memPoolSize=workspace:{max(1, recipe.workspace >> 20)}M",
        f"--builderOptimizationLevel={recipe.optimization_level}",
    ]
    words += [f"--timingCacheFile={recipe.timing_cache}"] if recipe.timing_cache else []
    if recipe.hardware_compatibility != "none":
        level = {"ampere-plus": "ampere+", "same-compute-capability": "sameComputeCapability"}
        words += [f"--hardwareCompatibilityLevel={level[recipe.hardware_compatibility]}"]
    words += ["--versionCompatible"] if recipe.version_compatible else []
    words += ["--stripWeights"] if recipe.weights == "stripped" else []
    tasks = recipe.tasks.sizes if recipe.tasks else [1, 1, 1]
    for number, profile in enumerate(recipe.profiles):
        words.append(f"--profile={number}")
        for word, *sizes in zip(("min", "opt", "max"), profile.sizes, tasks, strict=True):
            shapes = [
                f"{t['name']}:{'x'.join(map(str, builder.shape_at(t, *sizes)))}"
                for t in recipe.to_json()["inputs"]
                if set(t["shape"]) & set(builder.FREE)
            ]
            words.append(f"--{word}Shapes={','.join(shapes)}")
    words += [
        "--profilingVerbosity=detailed",
        f"--exportLayerInfo={builder.LAYERS}",
        "--skipInference",
    ]
    return shlex.join(words)
