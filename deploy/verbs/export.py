"""`utune-deploy export`: deltas and a backbone into one checked bundle."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING

import click

from ..numerics_options import NumericsChoice, numerics_options
from ..numerics_words import numbers_in_words
from ..options import (
    PATH,
    BackboneChoice,
    backbone_options,
    device_options,
    dry_run_option,
    force_option,
    json_option,
    setting,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ...export.engine import Device
    from ...merge.bank import Room
    from ..console import Console

STEPS = ("measure", "trace", "rewrite", "serialise", "check", "quantise", "write", "build", "done")


@click.command("export")
@click.argument("deltas", type=PATH, nargs=-1, required=True, metavar="DELTA...")
@backbone_options
@click.option("-o", "--output", type=PATH, required=True, help="The bundle's folder.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "merged", "parallel", "multi", "fan-out"]),
    default="auto",
    show_default=True,
    help="auto: several tasks share one multi engine; one task is merged if it folds, else parallel. "
    "fan-out: only an engine that answers every task for every row.",
)
@click.option(
    "--bank",
    type=click.Choice(["constants", "inputs"]),
    default="constants",
    show_default=True,
    help="multi: the tasks' tensors inside the engine, or inputs of it.",
)
@click.option(
    "--room",
    metavar="KEY=NUMBER",
    multiple=True,
    help="Bank as inputs: sizes of rank, classes or keys that tasks added later may have; repeatable.",
)
@click.option(
    "--fan-out",
    is_flag=True,
    help="Besides, an engine that answers every task for every row, the trunk computed once.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]),
    default="fp32",
    show_default=True,
    help="Numbers that the engine computes in, see docs/precision.md; tf32, fp16 and bf16 are for a CUDA device, "
    "fp8 for TensorRT.",
)
@numerics_options
@click.option("--name", help="Served name; the folder's name if not given.")
@click.option(
    "--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Largest batch."
)
@click.option(
    "--images", type=PATH, help="Folder of real pictures for the check, or one per task in it."
)
@click.option(
    "--target",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="The runtime to build for; tensorrt writes a folder of its own, see docs/tensorrt.md.",
)
@click.option(
    "--prepare",
    is_flag=True,
    help="tensorrt: write what the machine with the GPU needs to build the plan itself.",
)
@click.option(
    "--weights-form",
    type=click.Choice(["plain", "stripped", "refit"]),
    help="tensorrt: weights in the plan (plain), read from the ONNX file (stripped), or replaceable (refit).",
)
@device_options
@dry_run_option
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    deltas: tuple[Path, ...],
    choice: BackboneChoice,
    output: Path,
    mode: str,
    bank: str,
    room: tuple[str, ...],
    fan_out: bool,
    precision: str,
    numbers: NumericsChoice,
    name: str | None,
    max_batch: int,
    images: Path | None,
    target: str,
    prepare: bool,
    weights_form: str | None,
    device: Device,
    dry_run: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Build one engine for the tasks in DELTA..., check it against torch and write a bundle.

    Nothing is written unless every comparison passes.
    """
    from ...merge.errors import UsageError

    if target != "tensorrt" and (prepare or weights_form):
        raise UsageError("--prepare and --weights-form are of --target tensorrt")
    if target == "tensorrt" and room:
        raise UsageError("--room is of the ONNX Runtime target")
    if target == "tensorrt" and fan_out:
        raise UsageError(
            "one folder holds one TensorRT engine",
            found="--fan-out, which asks for a second",
            do="use --mode fan-out for an engine of its own",
        )
    from ...merge.delta import load_delta, require_backbone
    from ...merge.files import digest, refuse_existing
    from ...merge.sites import measure
    from ..begin import fan_out_groups, require_one_preprocessing
    from ..bench.wording import plural
    from ..build import export_bundle
    from ..pictures import read_folder
    from ..plan import make_plan
    from ..reference import Evidence
    from ..task import Task

    numbers.require(precision, target)

    if not dry_run:
        refuse_existing(output, force=force, inputs=(*deltas, *choice.files))
    tasks = [Task(load_delta(path, keep=False), digest(path)) for path in deltas]
    backbone = choice.load()
    if dry_run:
        sites = measure(backbone)
        for task in tasks:
            require_backbone(task.delta, backbone, sites)
        named = [task.delta for task in tasks]
        every = fan_out or mode == "fan-out"
        if every:
            require_one_preprocessing(named)
        groups = fan_out_groups(backbone, named, sites) if every else ()
        plan = make_plan(named, backbone, sites, mode=mode, bank=bank, groups=groups).to_json()
        _print_plan(console, plan, as_json=as_json)
        return
    pictures = {}
    if images is not None:
        pictures = read_folder(images, [(t.delta.task, t.delta.preprocessing) for t in tasks])
    reads_pictures = backbone.pictures
    numerics = numbers.load(backbone, [(t.delta.task, t.delta.preprocessing) for t in tasks])
    if target == "tensorrt":
        from ..tensorrt import NUMBERS, export_tensorrt

        with console.steps(*STEPS) as step:
            recipe = export_tensorrt(
                output,
                backbone,
                tasks,
                prepare=prepare,
                weights=weights_form or "plain",
                name=name,
                mode=mode,
                bank=bank,
                precision=precision,
                numerics=numerics,
                max_batch=max_batch,
                evidence=Evidence(pictures),
                device=device,
                force=force,
                progress=step,
            )
        if as_json:
            console.json({"folder": str(output), "recipe": recipe.to_json()})
            return
        if (output / NUMBERS).exists():
            report = json.loads((output / NUMBERS).read_text())
            for line in numbers_in_words(report, {"comparisons": report.get("agreement", [])}):
                console.result(line)
        if recipe.check == "unchecked":
            console.warn(f"unchecked: no processor at hand computes in {precision}")
        console.result(
            f"wrote {output} ({'to be built with python build.py' if prepare else 'built'})"
        )
        return
    with console.steps(*STEPS) as step:
        bundle = export_bundle(
            output,
            backbone,
            tasks,
            name=name,
            mode=mode,
            bank=bank,
            fan_out=fan_out,
            precision=precision,
            numerics=numerics,
            max_batch=max_batch,
            room=_room(room),
            evidence=Evidence(pictures),
            device=device,
            force=force,
            progress=step,
        )
    if as_json:
        console.json({"bundle": str(output), "plan": bundle.plan, "check": bundle.check})
        return
    _print_plan(console, bundle.plan, as_json=False)
    rewritten = [f"{name} {times}" for name, times in bundle.plan["rewritten"].items() if times]
    console.result(f"graph passes: {', '.join(rewritten) or 'nothing to rewrite'}")
    engine, backbone = (bundle.plan["products"][whose] for whose in ("engine", "backbone"))
    console.result(
        f"graph: {engine['gemms']} products of matrices and {engine['attentions']} attentions; "
        f"the backbone alone {backbone['gemms']} and {backbone['attentions']}"
    )
    for line in numbers_in_words(bundle.plan, bundle.check):
        console.result(line)
    second = bundle.check.get("fan_out", {}).get("comparisons", [])
    count = len(bundle.check["comparisons"]) + len(second)
    console.result(f"check: {count} of {count} comparisons passed")
    if images is None and reads_pictures and not numerics.calibration:
        console.say("note: checked on seeded noise only; --images FOLDER adds real pictures")
    engines = [engine for engine in (bundle.engine, bundle.fan_out) if engine is not None]
    count_of_tasks = plural(len(bundle.tasks), "task")
    sizes = ", ".join(f"{(output / e.file).stat().st_size / 1e6:.1f} MB" for e in engines)
    console.result(
        f"wrote {output} ({bundle.mode}, {count_of_tasks}, engine {sizes})"
        if len(engines) == 1
        else f"wrote {output} ({bundle.mode} and fan-out, {count_of_tasks}, engines {sizes})"
    )


def _room(settings: tuple[str, ...]) -> Room:
    """The sizes that `--room` names."""
    from ...merge.bank import Room
    from ...merge.errors import UsageError

    sizes = dict(map(setting, settings))
    known = [field.name for field in fields(Room)]
    for key, value in sizes.items():
        if key not in known or not value.isdecimal():
            raise UsageError(
                "--room cannot be read",
                wanted=f"one of {', '.join(known)}, and a whole number",
                found=f"{key}={value}",
            )
    return Room(**{key: int(value) for key, value in sizes.items()})


def _print_plan(console: Console, plan, *, as_json: bool) -> None:
    if as_json:
        console.json(plan)
        return
    console.result(f"mode {plan['mode']}: {plan['why']}")
    rows = [(task["task"], task["form"], task["why"]) for task in plan["tasks"]]
    console.table(("task", "form", "why"), rows)
    if plan.get("shared"):
        parts = [(", ".join(part["tasks"]), part["why"]) for part in plan["shared"]]
        console.table(("tasks", "what they share"), parts)
    if counted := plan.get("macs"):
        every, alone = counted["every task"], counted["tasks one by one"]
        console.result(
            f"every task of one example: {every / 1e6:,.1f} M multiply-accumulates, "
            f"{every / alone:.3f} of the tasks one by one ({alone / 1e6:,.1f} M)"
        )
