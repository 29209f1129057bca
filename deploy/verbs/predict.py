"""`utune-deploy predict`: pictures, videos or tensors in, labels and scores out, in process.

A task without labels gives the numbers themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..options import PATH, device_options, json_option, memory_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from ...export.bundle import Bundle, Task
    from ...export.engine import Device, Tensor
    from ...merge.preprocessing import Preprocessing
    from ...serving.service import Service
    from ..console import Console

SHOWN_NUMBERS = 4


@click.command("predict")
@click.argument("bundle", type=PATH)
@click.argument("pictures", type=PATH, nargs=-1, metavar="[IMAGE|VIDEO]...")
@click.option(
    "--task", "tasks", multiple=True, help="One task for all rows, or one per row; repeatable."
)
@click.option(
    "--every-task",
    is_flag=True,
    help="Every task for every row, by the engine that export --fan-out makes.",
)
@click.option(
    "--tensor",
    type=PATH,
    help="A preprocessed batch [B, C, H, W], or [B, C, T, H, W] of clips (.npy or .safetensors), "
    "instead of files; for an engine of several inputs, all of them by name (.safetensors). Every row is "
    "answered on its own.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="Write the raw logits [B, K], with --every-task [B, T, K] (.npy).",
)
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Labels per row.")
@device_options
@memory_options
@json_option
@click.option("--force", is_flag=True, help="Replace the file of logits.")
@click.pass_obj
def command(
    console: Console,
    bundle: Path,
    pictures: tuple[Path, ...],
    tasks: tuple[str, ...],
    every_task: bool,
    tensor: Path | None,
    output: Path | None,
    top: int,
    device: Device,
    as_json: bool,
    force: bool,
) -> None:
    """Print the top labels of every IMAGE or VIDEO, each with its own task if you like.

    With --every-task every row is answered for all tasks, the trunk computed once; pictures then want tasks
    that all prepare them alike.

    A VIDEO is an animated file (GIF, WebP, TIFF) or a folder of frames, for tasks that read clips. Its
    logits are the mean over the clips that the task takes from it. Of a task without labels, the size and
    the first numbers of the answer are printed, and all of them with --json.
    """
    import numpy as np

    from ...export.bundle import open_bundle
    from ...export.engine import IMAGES, row_inputs
    from ...merge.errors import UsageError
    from ...merge.files import atomic_file, refuse_existing
    from ...serving.pictures import read_rows
    from ...serving.service import Service

    if bool(pictures) == (tensor is not None):
        raise UsageError("name pictures or --tensor, one of the two")
    if every_task and tasks:
        raise UsageError(
            "tasks are named, and every task is asked for",
            found=", ".join(tasks),
            do="leave out --task, or --every-task",
        )
    if output is not None:
        refuse_existing(output, force=force)
    opened = open_bundle(bundle)
    if every_task:
        _require_fan_out(opened)
    inputs = row_inputs(opened.engine.inputs)
    if pictures and [entry.name for entry in inputs] != [IMAGES]:
        raise UsageError(
            "the bundle does not read pictures",
            where=bundle,
            wanted=f"--tensor with {', '.join(entry.name for entry in inputs)}",
            found=f"{len(pictures)} file{'s' if len(pictures) != 1 else ''}",
        )
    batch = read_tensors(tensor, inputs) if tensor is not None else {}
    count = len(next(iter(batch.values()))) if batch else len(pictures)
    asked = (  # of each row, the tasks that answer it
        [list(opened.tasks)] * count
        if every_task
        else [[opened.task(name)] for name in _tasks(opened, tasks, count)]
    )
    views = [1] * count
    if not batch:
        read = [
            read_rows(path, _one_preprocessing(opened, row))
            for path, row in zip(pictures, asked, strict=True)
        ]
        batch, views = {IMAGES: np.concatenate(read)}, [len(rows) for rows in read]
    service = Service.open(opened, device, all_tasks=every_task)
    names = [row[0].name for row, times in zip(asked, views, strict=True) for _ in range(times)]
    logits = _mean_of_views(_answer(service, batch, None if every_task else names), views)
    if output is not None:
        with atomic_file(output) as temporary, temporary.open("wb") as file:
            np.save(file, logits)
    sources = [str(path) for path in pictures] or [f"{tensor}[{row}]" for row in range(count)]
    answers = [
        (source, task, answer)
        for source, row, answered in zip(sources, asked, logits, strict=True)
        for task, answer in zip(row, answered if every_task else [answered], strict=True)
    ]
    if opened.tasks[0].labels:
        _say_labels(console, answers, top, as_json)
    else:
        _say_numbers(console, answers, as_json)


def _answer(
    service: Service, batch: dict[str, NDArray[Any]], names: list[str] | None
) -> NDArray[np.float32]:
    """Logits `[B, ...]` of the rows, each for its own task; without names `[B, T, ...]`, for every task."""
    import numpy as np

    size, parts = service.registry.max_batch, []
    for at in range(0, len(next(iter(batch.values()))), size):
        rows = {name: array[at : at + size] for name, array in batch.items()}
        if names is None:
            parts.extend(answers.logits[None] for answers in service.answer_all(rows))
        else:
            parts.append(service.answer(rows, names[at : at + size]).logits)
    return np.concatenate(parts)


def _require_fan_out(bundle: Bundle) -> None:
    from ...merge.errors import UsageError

    if bundle.engine_of_all is None:
        raise UsageError(
            "the bundle has no engine that answers every task at once",
            where=bundle.path,
            found=f"mode {bundle.mode}",
            do="export it again with --fan-out, or ask for one --task per row",
        )


def _one_preprocessing(bundle: Bundle, tasks: Sequence[Task]) -> Preprocessing | None:
    """How all these tasks want their pictures.

    Raises:
        UsageError: Two of them want other pixels of the same picture.
    """
    from ...merge.errors import UsageError

    first, *others = tasks
    for other in others:
        if other.preprocessing != first.preprocessing:
            raise UsageError(
                "two tasks want other pixels of the same picture, so one input cannot serve both",
                where=bundle.path,
                wanted=f"{first.name}: {_said(first.preprocessing)}",
                found=f"{other.name}: {_said(other.preprocessing)}",
                do="ask for one --task per row",
            )
    return first.preprocessing


def _said(preprocessing: Preprocessing | None) -> str:
    if preprocessing is None:
        return "no pictures"
    return ", ".join(f"{name} {value}" for name, value in preprocessing.to_json().items())


def _say_labels(
    console: Console, answers: list[tuple[str, Task, NDArray[np.float32]]], top: int, as_json: bool
) -> None:
    rows = [
        {"input": source, "task": task.name, "top": _best(task, answer, top)}
        for source, task, answer in answers
    ]
    if as_json:
        console.json(rows)
        return
    console.table(
        ("input", "task", "label", "score", "next"),
        [
            (
                row["input"],
                row["task"],
                row["top"][0]["label"],
                f"{row['top'][0]['score']:.4f}",
                ", ".join(f"{best['label']} {best['score']:.4f}" for best in row["top"][1:]),
            )
            for row in rows
        ],
    )


def _say_numbers(
    console: Console, answers: list[tuple[str, Task, NDArray[np.float32]]], as_json: bool
) -> None:
    own = [(source, task, answer[..., : task.width]) for source, task, answer in answers]
    if as_json:
        console.json(
            [
                {"input": source, "task": task.name, "answer": answer.tolist()}
                for source, task, answer in own
            ]
        )
        return
    console.table(
        ("input", "task", "answer", "first"),
        [
            (
                source,
                task.name,
                f"{'embedding' if answer.ndim == 1 else 'array'} of "
                f"{' x '.join(map(str, answer.shape))} numbers",
                " ".join(f"{number:.4f}" for number in answer.ravel()[:SHOWN_NUMBERS]),
            )
            for source, task, answer in own
        ],
    )


def read_tensors(path: Path, inputs: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
    """The row inputs of an engine, `[B, ...]` each, from .npy or .safetensors.

    Args:
        path: The file. Of an engine of one input it holds one tensor of any name, of others all by name.
        inputs: What the engine reads.

    Raises:
        UsageError: The file cannot be read as one such batch.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from ...export.engine import by_name
    from ...merge.errors import UsageError

    try:
        if path.suffix == ".safetensors":
            read = load_file(path)
            if len(inputs) == 1 and len(read) != 1:
                raise UsageError(
                    "the file does not hold one tensor", where=path, found=", ".join(sorted(read))
                )
            given = next(iter(read.values())) if len(inputs) == 1 else read
        else:
            given = np.load(path, allow_pickle=False)
    except (OSError, ValueError, SafetensorError) as cause:
        raise UsageError("the tensor cannot be read", where=path, found=str(cause)) from cause
    batch = by_name(given, [entry.name for entry in inputs])
    for entry, array in zip(inputs, batch.values(), strict=True):
        sizes = entry.shape[1:]
        if array.shape[1:] != sizes or array.dtype != entry.dtype or not array.size:
            raise UsageError(
                "the tensor is no preprocessed batch",
                where=path if len(inputs) == 1 else f"{path}, {entry.name}",
                wanted=f"[{', '.join(map(str, ('n', *sizes)))}] {entry.dtype}",
                found=f"{list(array.shape)} {array.dtype}",
            )
    counts = {name: len(array) for name, array in batch.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(
            "the inputs have different numbers of rows",
            where=path,
            found=", ".join(f"{name} {count}" for name, count in counts.items()),
        )
    return batch


def _tasks(bundle: Bundle, given: tuple[str, ...], count: int) -> list[str]:
    from ...merge.errors import UsageError

    if not given and len(bundle.tasks) == 1:
        given = (bundle.tasks[0].name,)
    if len(given) not in (1, count):
        raise UsageError(
            "it is not said which task each row asks",
            wanted=f"--task once, or {count} times",
            found=f"{len(given)}",
            do=f"tasks: {', '.join(task.name for task in bundle.tasks)}",
        )
    names = list(given) * (count if len(given) == 1 else 1)
    for name in names:
        bundle.task(name)
    return names


def _mean_of_views(logits: NDArray[np.float32], views: list[int]) -> NDArray[np.float32]:
    """Raw logits `[rows, ...]` averaged over the rows of each input, `[inputs, ...]`.

    In float64: absent classes hold numbers so low that no float32 holds their sum.
    """
    import numpy as np

    ends = np.cumsum(views)[:-1]
    parts = np.split(logits.astype(np.float64), ends)
    return np.stack([part.mean(axis=0) for part in parts]).astype(np.float32)


def _best(task: Task, row: NDArray[np.float32], top: int) -> list[dict[str, Any]]:
    import numpy as np

    labels = task.labels
    logits = row[: len(labels)].astype(np.float64)
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    return [{"label": labels[i], "score": float(scores[i])} for i in np.argsort(-scores)[:top]]
