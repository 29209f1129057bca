"""A Triton model repository from a bundle, complete in itself, in one of several layouts.

| layout | who runs the engine | for |
|---|---|---|
| `hot` | our service in Triton's Python backend | everything that serving does, each request checked alone |
| `native` | Triton's ONNX Runtime backend | no Python in the way of a request |

`hot` has NAME.tasks too, which changes the tasks while they are served. Both have the model NAME, the bundle's name; where the bundle has an engine of all tasks, the model NAME.all
beside it; and, when asked, an alias NAME.TASK per task. `docs/triton.md` describes them for users.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ...export.engine import CPU
from ...merge.errors import IncompatibleArtefact, UsageError
from ...merge.files import atomic_file, atomic_folder, refuse_existing
from .. import protocol
from ..registry import Registry
from ..triton.alias_folder import (
    ABOUT,
    LAST,
    NAME,
    SLOT_HERE,
    SLOTS,
    TASK_HERE,
    TEMPLATE,
    about_json,
    free_slot,
    is_alias,
    read_last,
    read_slots,
    renew,
)
from ..triton.settings import ALIAS_SLOTS
from . import aliases as alias
from . import config
from . import pictures as pixels
from .hot import Hot
from .native import Native
from .options import ModelOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ...export.bundle import Bundle
    from ...export.engine import Device
    from .native import Graphs

LAYOUTS = {"hot": Hot, "native": Native}


@dataclass(frozen=True)
class Model:
    """A model that is to be written.

    Attributes:
        fields: Its configuration.
        files: What lies beside the configuration, by path.
        fill: Writes the folder of a version.
        number: Its version, where that does not count what was written: an alias of `hot` has its task's.
    """

    fields: Mapping[str, Any]
    files: Mapping[str, bytes]
    fill: Callable[[Path], None]
    number: int | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.fields["name"]


def write_repository(
    bundle: Bundle,
    repository: Path,
    *,
    layout: str = "hot",
    device: Device = CPU,
    options: ModelOptions | None = None,
    aliases: bool = False,
    pictures: bool = False,
    new_version: bool = False,
    force: bool = False,
    graphs: Graphs | None = None,
) -> Path:
    """Write the bundle as models of a Triton repository.

    Args:
        bundle: What is served.
        repository: The repository's folder; other models in it are left alone.
        layout: A key of `LAYOUTS`.
        device: Where the engine runs.
        options: How Triton schedules it; None for the defaults.
        aliases: Write a model NAME.TASK per task too.
        pictures: Write a model NAME.pictures too, which reads pixels; in the layout `native`.
        new_version: Add a version beside those that are there. Each version is whole before it can be
            seen. There are aliases, and NAME.pictures, if there were; models of tasks that are gone are
            taken away.
        force: Replace the models when they are already there, and take away what stands beside an earlier
            bundle of this name and has no successor.
        graphs: The module `export.served`, for the layout `native`.

    Returns:
        The folder of the model of one task per row.

    Raises:
        UsageError: A model is already there, or is not there to have a version added; or its name cannot be
            a folder's, or is that of a model which is none of the bundle's; or the layout does not have what is
            asked of it.
        IncompatibleArtefact: The bundle cannot be served, or its tensors differ from those of versions that
            stay.
        BuildFailed: A graph is too large for one file.
    """
    if new_version and force:
        raise UsageError("a version is added or everything is replaced, not both at once")
    main = repository / bundle.name
    if new_version:
        aliases = aliases or (repository / (bundle.name + alias.NAMES)).exists()
        pictures = pictures or (repository / (bundle.name + pixels.PREPARE)).exists()
    writer = _layout(layout, graphs)
    options = options or ModelOptions()
    models = _models(bundle, writer, device, options)
    if isinstance(writer, Hot):
        fields = writer.tasks_fields(Registry(bundle), models[0].fields, options)
        models.append(Model(fields, {}, writer.fill_tasks))
    if pictures:
        models += _pictures(bundle, writer, models[0])
    if aliases:
        models += _aliases(bundle, writer, models, repository)
    for model in models:
        if not NAME.fullmatch(model.name):
            raise UsageError(
                "the bundle's name cannot be a model's folder"
                if model is models[0]
                else "a task's name cannot be a model's folder",
                where=bundle.path,
                wanted="letters, digits, `_`, `.` and `-`",
                found=model.name,
                do="export it under another name",
            )
        _require_own(repository / model.name, None if model is models[0] else bundle.name)
    if new_version:
        version = _next_version(repository, models)
        for model in models:
            _add_version(repository / model.name, model, version)
    else:
        for model in models:
            refuse_existing(repository / model.name, force=force)
        for model in models:
            _write_model(repository / model.name, model)
    if force or new_version:
        kept = {model.name for model in models}
        # Aliases of tasks that are kept beside the bundle: the model has them, or takes them away when it starts.
        spares = aliases and options.keep is not None and isinstance(writer, Hot)
        for folder in repository.iterdir():
            if folder.name in kept or _companion_of(folder) != bundle.name:
                continue
            if not (spares and is_alias(folder)):
                shutil.rmtree(folder)
    return main


def config_text(
    bundle: Bundle,
    *,
    device: Device = CPU,
    options: ModelOptions | None = None,
    all_tasks: bool = False,
) -> str:
    """The `config.pbtxt` of a bundle's model in the layout `hot`."""
    return config.write(_model(bundle, Hot(), device, options or ModelOptions(), all_tasks).fields)


def _layout(name: str, graphs: Graphs | None) -> Hot | Native:
    if name not in LAYOUTS:
        raise UsageError("unknown layout", wanted=" or ".join(LAYOUTS), found=name)
    if name == "hot":
        return Hot()
    assert graphs is not None, "the layout `native` needs the module export.served"
    return Native(graphs)


def _models(
    bundle: Bundle, layout: Hot | Native, device: Device, options: ModelOptions
) -> list[Model]:
    """The models that have an engine, that of one task per row first."""
    every = [False] if bundle.engine_of_all is None else [False, True]
    return [_model(bundle, layout, device, options, all_tasks) for all_tasks in every]


def _pictures(bundle: Bundle, layout: Hot | Native, main: Model) -> list[Model]:
    """The model of pixels, and its first step."""
    if not isinstance(layout, Native):
        raise UsageError(
            "the layout `hot` has no model of pictures",
            wanted="the layout `native`",
            found="hot",
            do="prepare pictures at the client, or use --layout native",
        )
    registry = Registry(bundle)
    graph = layout.graphs.picture_graph(bundle)  # first, because it may be refused
    fields = pixels.prepare_fields(registry, main.fields)
    layout.run_graph(fields)
    return [
        Model(fields, {}, lambda version: layout.write_graph(version, graph)),
        Model(pixels.pictures_fields(registry, main.fields), {}, _nothing),
    ]


def _aliases(
    bundle: Bundle, layout: Hot | Native, others: list[Model], repository: Path
) -> list[Model]:
    """A model per task, and the first step of all of them.

    In the layout `hot` the first of the others is told what it needs to write more of them.

    Raises:
        UsageError: A task cannot be a model.
    """
    registry, main = Registry(bundle), others[0].fields
    outputs, said_by = registry.names, {task: task for task in registry.names}
    if isinstance(layout, Hot):
        said_by, count, last = _slots(registry, repository)
        outputs = tuple(map(str, range(count)))
        main["parameters"].update(config.as_parameters({ALIAS_SLOTS: str(count)}))
        template, _ = alias.alias_fields(registry, main, TASK_HERE, SLOT_HERE)
        others[0] = replace(others[0], fill=partial(_fill_both, others[0].fill, template, last))
    fields = alias.names_fields(registry, main, outputs)
    layout.finish_names(fields)
    rows = alias.smallest_input(registry)
    models = [Model(fields, {}, lambda version: layout.fill_names(version, registry.names, rows))]
    alias.require_names(registry, {model.name for model in (*others, *models)})
    for task in registry.names:
        labels, said = registry.versions[task].labels, said_by[task]
        fields, files = alias.alias_fields(registry, main, task, said, labels)
        if isinstance(layout, Hot):
            files[ABOUT] = about_json(registry.name, task, int(said)).encode()
            number = registry.versions[task].number
            models.append(Model(fields, files, _nothing, number))
        else:
            models.append(Model(fields, files, _nothing))
    return models


def _slots(registry: Registry, repository: Path) -> tuple[dict[str, str], int, int]:
    """The slot of each task's alias, how many there are, and the last that was given out.

    An alias that is there keeps its own. That of one which went is not the next to be given out: a tritonserver may
    have it loaded still.
    """
    taken = read_slots(repository, registry.name)
    known = {task: slot for slot, task in taken.items()}
    count = SLOTS
    while count < 2 * len(registry.names) or count <= max(taken, default=-1):
        count *= 2
    versions = (repository / registry.name).glob("[0-9]*")
    last = max([*taken, *map(read_last, versions)], default=-1)
    for task in registry.names:
        if task not in known:
            last = known[task] = cast("int", free_slot(taken, count, last))
            taken[last] = task
    return {task: str(known[task]) for task in registry.names}, count, last


def _fill_both(
    fill: Callable[[Path], None], template: Mapping[str, Any], last: int, version: Path
) -> None:
    """The version of a model that writes aliases itself: what it has else, and what they are made of."""
    fill(version)
    (version / TEMPLATE).write_text(config.write(template))
    (version / LAST).write_text(f"{last}\n")


def _nothing(version: Path) -> None:
    """The version of an ensemble: Triton wants its folder, and nothing in it."""


def _model(
    bundle: Bundle,
    layout: Hot | Native,
    device: Device,
    options: ModelOptions,
    all_tasks: bool,
) -> Model:
    registry = Registry(bundle, all_tasks=all_tasks)
    fields, files = config.model_fields(registry, options, device)
    layout.finish(fields, registry, options, device)
    return Model(
        fields,
        files,
        partial(layout.fill, bundle=bundle, all_tasks=all_tasks, in_place=options.in_place),
    )


def _write_model(path: Path, model: Model, version: str = protocol.VERSION) -> None:
    """A model's folder with one version in it, there whole or not at all."""
    version = version if model.number is None else str(model.number)
    with atomic_folder(path) as folder:
        (folder / config.CONFIG).write_text(config.write(model.fields))
        for name, content in model.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / version).mkdir()
        model.fill(folder / version)


def _add_version(path: Path, model: Model, version: int) -> None:
    """A further version: first its folder, whole at once, then what the configuration says now."""
    if not path.exists():
        _write_model(path, model, str(version))
        return
    if model.number is not None:
        texts = {name: content.decode() for name, content in model.files.items()}
        renew(path, {**texts, config.CONFIG: config.write(model.fields)}, model.number)
        return
    with atomic_folder(path / str(version)) as folder:
        model.fill(folder)
    text = config.write(model.fields).encode()
    for name, content in (*model.files.items(), (config.CONFIG, text)):
        target = path / name
        if not target.is_file() or target.read_bytes() != content:
            with atomic_file(target) as file:
                file.write_bytes(content)


def _next_version(repository: Path, models: list[Model]) -> int:
    """The number above all versions of these models.

    Raises:
        UsageError: The first of them is not there, or is of another layout.
        IncompatibleArtefact: Versions that stay have other tensors.
    """
    main = repository / models[0].name
    if config.read(main) is None:
        raise UsageError(
            "there is no model to add a version to",
            where=main,
            do="leave --new-version out, or name the repository that holds it",
        )
    numbers = [0]
    for model in models:
        folder = repository / model.name
        if (before := config.read(folder)) is None:
            continue
        if model.number is None:
            numbers += [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
        after = config.parse(config.write(model.fields))
        if (before.backend, before.platform) != (after.backend, after.platform):
            raise UsageError(
                "the model is of another layout",
                where=folder,
                wanted=after.backend or after.platform,
                found=before.backend or before.platform,
                do="name the layout that it was written in, or replace it with --force",
            )
        staying = after.version_policy.latest.num_versions - 1
        if staying and _tensors(before) != _tensors(after):
            raise IncompatibleArtefact(
                "versions that stay have other inputs or outputs than the new one",
                where=folder,
                wanted=_tensors(before),
                found=_tensors(after),
                do="serve the newest version alone (--keep-versions 1), or write it under another name",
            )
    return max(numbers) + 1


def _require_own(folder: Path, owner: str | None) -> None:
    """Refuse to write over a model that stands beside another one than this owner, or beside none.

    Raises:
        UsageError: It is somebody else's.
    """
    if folder.is_dir() and any(folder.iterdir()) and _companion_of(folder) != owner:
        raise UsageError(
            "another model has the name",
            where=folder,
            do="name another repository, or move that model; an alias can also be left out",
        )


def _tensors(model: Any) -> list[str]:
    """Inputs and outputs of a configuration."""
    return [f"{t.name} {list(t.dims)}" for t in (*model.input, *model.output)]


def _companion_of(folder: Path) -> str | None:
    """The bundle's model that a model was written beside."""
    try:
        found = config.read(folder)
    except IncompatibleArtefact:
        return None  # somebody else's
    if found is None or config.COMPANION not in found.parameters:
        return None
    return found.parameters[config.COMPANION].string_value
