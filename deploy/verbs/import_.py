"""`utune-deploy import`: a checkpoint of another project as a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import (
    PATH,
    BackboneChoice,
    backbone_options,
    force_option,
    json_option,
    setting,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ..console import Console


@click.command("import")
@click.argument("file", type=PATH)
@click.option(
    "--from",
    "source",
    type=click.Choice(["modelscope", "vpetl", "peft", "swift", "timm", "unipt"]),
    required=True,
    help="modelscope: vision_efficient_tuning (U-Tuning). vpetl: PATT, AdaptFormer, BAPAT. peft: an adapter "
    "folder. swift: an ms-swift folder. timm: a whole fine-tuned checkpoint.",
)
@click.option("--task", required=True, help="The task's name.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="What the file does not say of itself, asked for by name when missing; repeatable.",
)
@click.option(
    "--labels", type=PATH, help="Class names, one per line, or Hugging Face's config.json."
)
@backbone_options
@click.option("-o", "--output", type=PATH, required=True, help="The delta (.safetensors).")
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    file: Path,
    source: str,
    task: str,
    settings: tuple[str, ...],
    labels: Path | None,
    choice: BackboneChoice,
    output: Path,
    as_json: bool,
    force: bool,
) -> None:
    """Read the tuners and the head in FILE and write them as a delta of the backbone.

    Tuners are found by their keys. What cannot be carried is refused by name; nothing in FILE is run.

    Settings that some files lack: vpetl att_prefix_mode, att_prefix_scale, ffn_option,
    ffn_adapter_scalar, ffn_adapter_layernorm_option; swift order, lora_alpha, enable_lora, head; timm rank
    or energy (the best low-rank LoRA instead of the full difference) and weights (of several in one file);
    modelscope and vpetl weights too; unipt no_norm (the vector keeps its length) and frames_alone (of CLIP4Clip
    with layers over frames, the vectors in front of them). A unipt file of two sides is read for the side that
    the backbone is of.
    """
    from ...merge.class_names import class_names_beside, read_class_names
    from ...merge.delta import require_backbone, save_delta, validate
    from ...merge.files import refuse_existing
    from ...merge.importers import read
    from ...merge.sites import measure

    refuse_existing(output, force=force, inputs=(file, *choice.files))
    names = None if labels is None else read_class_names(labels)
    backbone = choice.load()
    foreign = read(source, file, backbone, dict(map(setting, settings)))
    numbered = names is None and foreign.labels is None
    if numbered and (config := class_names_beside(file, foreign.width)):
        names, numbered = read_class_names(config), False
        foreign.notes["labels"] = f"those of {config.name} beside the file"
    delta = foreign.delta(task, backbone, labels=names)
    require_backbone(delta, backbone, measure(backbone), where=file)
    validate(delta, where=f"{file} with the classes of {labels}" if labels else file)
    save_delta(output, delta, force=force)
    kinds = sorted({name.rpartition("/")[2] for name in delta.branches})
    found = {
        "delta": str(output),
        "task": task,
        "branches": len(delta.branches),
        "kinds": kinds,
        "notes": foreign.notes,
    }
    if as_json:
        console.json(found)
    else:
        console.result(
            f"wrote {output}: task {task}, "
            f"{f'{len(delta.labels)} classes' if delta.labels else 'no labels'}, {', '.join(kinds)}"
        )
        for name, note in foreign.notes.items():
            console.result(f"  {name}: {note}")
    if numbered:
        console.say("note: the classes are numbered; --labels FILE names them")
        if choice.weights and (config := class_names_beside(choice.weights, foreign.width)):
            console.say(f"      {config} names as many: --labels {config}, if it is of this task")
