"""`utune-deploy export-peft`: a delta as a LoRA adapter of Hugging Face PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import PATH, BackboneChoice, backbone_options, force_option, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from ..console import Console


@click.command("export-peft")
@click.argument("delta", type=PATH)
@backbone_options
@click.option("-o", "--output", type=PATH, required=True, help="The adapter's folder.")
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    delta: Path,
    choice: BackboneChoice,
    output: Path,
    as_json: bool,
    force: bool,
) -> None:
    """Write the task in DELTA as an adapter that PEFT loads on timm's model, exactly or not at all.

    LoRA, tuned biases and the head can be written; anything else is refused by name.
    """
    from ...merge.delta import load_delta
    from ...merge.files import refuse_existing
    from ...merge.to_peft import to_peft, write_peft

    refuse_existing(output, force=force, inputs=(delta, *choice.files))
    task = load_delta(delta)
    adapter = to_peft(task, choice.load())
    write_peft(output, adapter)
    ranks = sorted({adapter.config["r"], *adapter.config["rank_pattern"].values()})
    found = {
        "task": task.task,
        "output": str(output),
        "classes": len(task.labels),
        "ranks": ranks,
        "tensors": len(adapter.tensors),
    }
    if as_json:
        console.json(found)
    else:
        ranked = ", ".join(map(str, ranks))
        console.result(f"wrote {output}: task {task.task}, LoRA of rank {ranked}, the head")
    console.say(
        f"note: load it on timm's model with num_classes={len(task.labels)}; class names and "
        "preprocessing have no place in an adapter"
    )
