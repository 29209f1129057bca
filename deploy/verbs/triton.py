"""`utune-deploy triton`: a bundle as a Triton model repository."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import click

from ..options import PATH, device_options, force_option, memory_options, rates, setting, weight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...export.engine import Device
    from ...serving.repository.options import ModelOptions
    from ..console import Console


def _resources(_context: object, _option: object, texts: tuple[str, ...]) -> tuple:
    """Name and count of every `NAME=COUNT`."""
    pairs = [setting(text) for text in texts]
    for name, count in pairs:
        if not count.isdecimal():
            raise click.BadParameter(f"{name}={count}: wanted a whole number behind the `=`")
    return tuple((name, int(count)) for name, count in pairs)


def model_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """How Triton schedules a model, handed on as `options`; what is not named has its default."""

    @click.option(
        "--max-delay-ms",
        type=click.FloatRange(0),
        help="Longest that a request waits for company.  [default: 0.1, and never less]",
    )
    @click.option(
        "--preferred-batch",
        "preferred_batches",
        type=click.IntRange(1),
        multiple=True,
        help="Rows of a batch that waits no longer; repeatable.",
    )
    @click.option(
        "--priority-levels",
        type=click.IntRange(0),
        help="Levels that clients may ask for, 1 the most urgent.",
    )
    @click.option(
        "--max-queued",
        type=click.IntRange(0),
        help="Requests that may wait, in `hot` their rows; more are refused.",
    )
    @click.option(
        "--timeout-ms",
        type=click.FloatRange(0),
        help="Longest that a request waits before it is refused.",
    )
    @click.option(
        "--instances",
        type=click.IntRange(1),
        help="Engines per processor, each with a backbone of its own.  [default: 1]",
    )
    @click.option(
        "--gpu",
        "gpus",
        type=click.IntRange(0),
        multiple=True,
        help="A GPU that has engines, with --provider cuda; repeatable.  [default: 0]",
    )
    @click.option(
        "--keep-versions",
        type=click.IntRange(1),
        help="How many of the newest versions are served.  [default: 1]",
    )
    @click.option(
        "--resource",
        "resources",
        metavar="NAME=COUNT",
        multiple=True,
        callback=_resources,
        help="What an execution takes from Triton's rate limiter; repeatable.",
    )
    @click.option(
        "--cache", is_flag=True, help="Answer repeated requests from Triton's response cache."
    )
    @click.option("--warmup", is_flag=True, help="Run a row of zeros before the model is ready.")
    @click.option(
        "--max-task-queued",
        type=click.IntRange(1),
        help="Rows of one task that may wait (hot).",
    )
    @click.option(
        "--weight",
        "weights",
        metavar="TASK=NUMBER",
        multiple=True,
        callback=lambda _context, _option, texts: tuple(map(weight, texts)),
        help="A task's share of a busy engine, 1 unless it is said; repeatable (hot).",
    )
    @click.option(
        "--rate",
        "limits",
        metavar="[TASK=]ROWS",
        multiple=True,
        help="Rows per second that are taken of every task, or of TASK; a second's worth at once. Repeatable (hot).",
    )
    @click.option(
        "--tasks",
        "keep",
        type=PATH,
        metavar="FOLDER",
        help="Keep tasks that are added while running here, on the machine that serves (hot).",
    )
    @click.option(
        "--rows", type=click.IntRange(1), help="Tasks in the engine's memory at once (hot)."
    )
    @click.option(
        "--task-control/--no-task-control",
        default=False,
        show_default=True,
        help="Whether clients may add, change and remove tasks: whoever reaches Triton's ports (hot).",
    )
    @functools.wraps(verb)
    def with_options(*args: Any, **kwargs: Any) -> Any:
        from ...serving.repository.options import ModelOptions

        known = [field.name for field in dataclasses.fields(ModelOptions)]
        limits = rates(kwargs.pop("limits"))
        kwargs |= {"rate": limits["rate"], "rates": tuple(limits["rates"].items())}
        fields = {name: kwargs.pop(name, None) for name in known}
        named = {name: value for name, value in fields.items() if value not in (None, ())}
        return verb(*args, options=ModelOptions(**named), **kwargs)

    return with_options


@click.command("triton")
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="The repository's folder.")
@click.option(
    "--layout",
    type=click.Choice(["hot", "native"]),
    default="hot",
    show_default=True,
    help="Who runs the engine: our service in the Python backend, or Triton's ONNX Runtime backend.",
)
@click.option("--aliases", is_flag=True, help="Also a model NAME.TASK per task, without a `task`.")
@click.option(
    "--pictures", is_flag=True, help="Also a model NAME.pictures of pixels (--layout native)."
)
@click.option("--new-version", is_flag=True, help="Add a version beside those that are there.")
@device_options
@memory_options
@model_options
@force_option
@click.pass_obj
def command(
    console: Console,
    bundle: Path,
    output: Path,
    layout: str,
    aliases: bool,
    pictures: bool,
    new_version: bool,
    device: Device,
    options: ModelOptions,
    force: bool,
) -> None:
    """Write BUNDLE as a self-contained model repository for tritonserver; see docs/triton.md."""
    from ...export.bundle import open_bundle
    from ...serving.repository import write_repository

    graphs = None
    if layout == "native":
        from ...export import served as graphs
    folder = write_repository(
        open_bundle(bundle),
        output,
        layout=layout,
        device=device,
        options=options,
        aliases=aliases,
        pictures=pictures,
        new_version=new_version,
        force=force,
        graphs=graphs,
    )
    console.result(f"wrote {folder}")
    console.say(f"serve it with: tritonserver --model-repository={output}")
