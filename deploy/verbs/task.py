"""`utune-deploy task`: which tasks a running server answers."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..options import PATH, BackboneChoice, backbone_options, force_option, json_option

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...serving.client import Client, TaskInfo
    from ..console import Console
    from ..pack import Layout


def server_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`--server`, `--model` and `--timeout`, handed on as `connect`, which opens a client."""

    @click.option(
        "--server",
        default="http://127.0.0.1:8000",
        show_default=True,
        help="http://, https://, grpc:// or grpcs://, host and port.",
    )
    @click.option("--model", help="The served bundle's name, where there are several.")
    @click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=60.0,
        show_default=True,
        help="Seconds, all attempts together.",
    )
    @functools.wraps(verb)
    def with_server(
        *args: Any, server: str, model: str | None, timeout: float, **kwargs: Any
    ) -> Any:
        def connect() -> Client:
            from ...serving.client import Client

            return Client(server, model=model, deadline_s=timeout)

        return verb(*args, connect=connect, **kwargs)

    return with_server


@click.group("task")
def command() -> None:
    """Add, update, remove and list the tasks of a running server."""


@command.command("list")
@server_options
@json_option
@click.pass_obj
def list_(console: Console, connect: Callable[[], Client], as_json: bool) -> None:
    """List the server's tasks."""
    with connect() as client:
        tasks = client.tasks()
    if as_json:
        console.json({"tasks": [_facts(task) for task in tasks]})
        return
    width = max((len(task.name) for task in tasks), default=0)
    for task in tasks:
        console.result(f"{task.name:{width}}  {_line(task)}")


@command.command("add")
@click.argument("deltas", type=PATH, nargs=-1, required=True, metavar="DELTA...")
@backbone_options
@server_options
@json_option
@click.pass_obj
def add(
    console: Console,
    deltas: tuple[Path, ...],
    choice: BackboneChoice,
    connect: Callable[[], Client],
    as_json: bool,
) -> None:
    """Add the tasks in DELTA... to the server, without interrupting it.

    Each is held to the server's engine before a request can name it: backbone, shapes, finite numbers, and with
    --backbone and --weights that the engine answers as torch does. A task that `task pack` wrote is sent as it is.
    """
    _bring(console, "add", deltas, choice, connect, as_json)


@command.command("update")
@click.argument("deltas", type=PATH, nargs=-1, required=True, metavar="DELTA...")
@backbone_options
@server_options
@json_option
@click.pass_obj
def update(
    console: Console,
    deltas: tuple[Path, ...],
    choice: BackboneChoice,
    connect: Callable[[], Client],
    as_json: bool,
) -> None:
    """Give tasks of the server a new version; the old ones are kept, see `task use`.

    Requests under way are answered with the version that they began with.
    """
    _bring(console, "update", deltas, choice, connect, as_json)


@command.command("remove")
@click.argument("names", nargs=-1, required=True, metavar="TASK...")
@server_options
@json_option
@click.pass_obj
def remove(
    console: Console, names: tuple[str, ...], connect: Callable[[], Client], as_json: bool
) -> None:
    """Remove tasks from the server; requests under way are answered."""
    with connect() as client:
        for name in names:
            client.remove(name)
            if not as_json:
                console.result(f"removed {name}")
    if as_json:
        console.json({"removed": list(names)})


@command.command("use")
@click.argument("name", metavar="TASK")
@click.argument("version", type=click.IntRange(1))
@server_options
@json_option
@click.pass_obj
def use(
    console: Console, name: str, version: int, connect: Callable[[], Client], as_json: bool
) -> None:
    """Answer with another VERSION of TASK: back to an old one, or forth again."""
    with connect() as client:
        _show(console, client.use(name, version), as_json)


@command.command("pin")
@click.argument("name", metavar="TASK")
@click.option("--off", is_flag=True, help="Let it make room for others again.")
@server_options
@json_option
@click.pass_obj
def pin(
    console: Console, name: str, off: bool, connect: Callable[[], Client], as_json: bool
) -> None:
    """Keep TASK in the engine's memory, however long nobody asks for it."""
    with connect() as client:
        _show(console, client.unpin(name) if off else client.pin(name), as_json)


@command.command("pack")
@click.argument("delta", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="The packed task's file.")
@click.option("--for", "bundle", type=PATH, help="A bundle, instead of asking the server.")
@backbone_options
@server_options
@force_option
@click.pass_obj
def pack_(
    console: Console,
    delta: Path,
    output: Path,
    bundle: Path | None,
    choice: BackboneChoice,
    connect: Callable[[], Client],
    force: bool,
) -> None:
    """Lay DELTA out for a server's bank, to send it later or from a machine without torch."""
    from ...export.bundle import open_bundle
    from ...merge.files import atomic_file, refuse_existing, require_file
    from ..pack import Layout

    require_file(delta, "a delta")
    refuse_existing(output, force=force, inputs=(delta, *choice.files))
    if bundle is not None:
        layout = Layout.of(open_bundle(bundle))
    else:
        with connect() as client:
            layout = _layout(client)
    data = _packed(delta, layout, choice)
    with atomic_file(output) as temporary:
        temporary.write_bytes(data)
    console.result(f"wrote {output} ({len(data) / 1e6:.1f} MB)")


def _bring(
    console: Console,
    action: str,
    deltas: tuple[Path, ...],
    choice: BackboneChoice,
    connect: Callable[[], Client],
    as_json: bool,
) -> None:
    from ...merge.files import require_file

    for path in deltas:
        require_file(path, "a delta, or a packed task")
    brought = []
    with connect() as client:
        layout = _layout(client)
        steps = [f"{action} {path.name}" for path in deltas]
        try:
            with console.steps("read the backbone", *steps) as step:
                step("read the backbone")
                backbone = _backbone(choice)
                for path, now in zip(deltas, steps, strict=True):
                    step(now)
                    data = _packed(path, layout, choice, backbone)
                    brought.append(client.add(data) if action == "add" else client.update(data))
        finally:  # those that came before one that was refused
            for task in () if as_json else brought:
                _show(console, task, as_json=False)
    if as_json:
        console.json({"tasks": [_facts(task) for task in brought]})


def _layout(client: Client) -> Layout:
    from ..pack import Layout

    return Layout.from_json(client.describe(), source=client.url)


def _backbone(choice: BackboneChoice) -> Any:
    return choice.load() if choice.architecture or choice.weights else None


def _packed(path: Path, layout: Layout, choice: BackboneChoice, backbone: Any = None) -> bytes:
    """A delta's file laid out, or a packed one as it is."""
    from ...merge.delta import load_delta
    from ...merge.files import digest
    from ...serving.tasks.packed import is_packed, write_packed
    from ..pack import pack
    from ..task import Task

    if is_packed(path):
        return path.read_bytes()
    task = Task(load_delta(path), digest(path))
    return write_packed(pack(task, layout, backbone or _backbone(choice)))


def _show(console: Console, task: TaskInfo, as_json: bool) -> None:
    if as_json:
        console.json({"task": _facts(task)})
    else:
        console.result(f"{task.name}  {_line(task)}")


def _line(task: TaskInfo) -> str:
    size = f"{len(task.labels)} classes" if task.labels else f"{task.width} numbers"
    kept = f" of {', '.join(map(str, task.versions))}" if len(task.versions) > 1 else ""
    place = "pinned" if task.pinned else "in memory" if task.resident else "on disk"
    alias = f", alias {task.alias}" if task.alias else ""
    if task.no_alias:
        alias = f", no alias: {task.no_alias}"
    return f"version {task.version}{kept}, {size}, {place}{alias}"


def _facts(task: TaskInfo) -> dict[str, Any]:
    facts = asdict(task)
    facts["preprocessing"] = task.preprocessing.to_json() if task.preprocessing else None
    return facts
