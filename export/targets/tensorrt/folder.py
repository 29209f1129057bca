"""The folder that goes to the GPU host: graph, recipe, builder, and a page that says what to do there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import builder
from .recipe import trtexec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .recipe import Recipe

ONNX, BANK, TASKS, SCRIPT, TRTEXEC, README = (
    "model.onnx",
    "bank.safetensors",
    "tasks.json",
    "build.py",
    "trtexec.sh",
    "README.md",
)


def write_folder(
    folder: Path,
    recipe: Recipe,
    onnx: bytes,
    tasks: Sequence[Mapping[str, Any]],
    bank: Mapping[str, NDArray[Any]],
) -> None:
    """Fill a folder.

    Args:
        folder: Empty, and there.
        recipe: What to build.
        onnx: The graph that it names.
        tasks: What the rows of `task` and the columns of the answer mean, as in a bundle's manifest.
        bank: Tensors by input name, where the bank is an input.
    """
    (folder / recipe.onnx).write_bytes(onnx)
    (folder / TASKS).write_text(json.dumps(list(tasks), indent=2, sort_keys=True) + "\n")
    if bank:
        from safetensors.numpy import save_file

        save_file(dict(bank), folder / BANK)
    (folder / SCRIPT).write_bytes(Path(builder.__file__).read_bytes())
    if recipe.weights != "refit":  # which trtexec cannot build
        (folder / TRTEXEC).write_text(f'#!/bin/sh\nexec {trtexec(recipe)} "$@"\n')
    (folder / README).write_text(readme(recipe, reads_bank=bool(bank)))
    recipe.write(folder)


def readme(recipe: Recipe, *, reads_bank: bool) -> str:
    """What to do with the folder."""
    ranges = ", ".join(f"{p.min} to {p.max}" for p in recipe.profiles)
    lines = [
        "# A TensorRT engine, to be built here",
        "",
        f"Precision {recipe.precision}, batches {ranges}, weights {recipe.weights}.",
        "",
        f"The graph `{recipe.onnx}` was compared with torch, in ONNX Runtime, before it was written."
        if recipe.check == "passed"
        else f"The graph `{recipe.onnx}` is **unchecked**: no processor at hand when it was written "
        f"computes in {recipe.precision}.",
        "The engine itself is not compared with anything by building it.",
        "",
        "Copy the whole folder to the machine that will run the engine. A plan belongs to the version of",
        "TensorRT and to the kind of GPU that built it.",
        "",
        "## With Python",
        "",
        "    pip install 'tensorrt>=10.14,<12'",
        f"    python {SCRIPT}",
        "",
        f"writes `{builder.PLAN}`, `{builder.ABOUT}` and `{builder.LAYERS}`. Keep the first two together:",
        "`TensorRTSession` of utune-deploy opens no plan without its description.",
        "",
        "## With trtexec",
        "",
    ]
    if recipe.weights == "refit":
        lines += ["Not possible: `trtexec` cannot mark single weights for refitting.", ""]
    else:
        lines += [
            f"    sh {TRTEXEC}",
            "",
            f"on TensorRT 11; on TensorRT 10, `sh {TRTEXEC} --stronglyTyped`. Use it to measure: it does not",
            f"write `{builder.ABOUT}`.",
            "",
        ]
    lines += ["## Files", ""]
    files = [
        (recipe.onnx, "the graph, with the types that it computes in"),
        (builder.RECIPE, "what to build"),
        (SCRIPT, "builds it"),
        (TASKS, "what the rows of `task` and the columns of the answer mean"),
    ]
    files += [(TRTEXEC, "the same engine by trtexec")] if recipe.weights != "refit" else []
    files += [(BANK, "the tasks' tensors, inputs of the engine")] if reads_bank else []
    lines += [f"- `{name}`: {what}" for name, what in files]
    return "\n".join(lines) + "\n"
