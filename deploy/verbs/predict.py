"""`utune-deploy predict`: pictures, videos or tensors in, labels and scores out, in process.

A task without labels gives the numbers themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..options import PATH, json_option, provider_option, threads_option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from ...export.bundle import Bundle
    from ...export.engine import Tensor
    from ..console import Console

SHOWN_NUMBERS = 4


@click.command("predict")
@click.argument("bundle", type=PATH)
@click.argument("pictures", type=PATH, nargs=-1, metavar="[IMAGE|VIDEO]...")
@click.option(
    "--task", "tasks", multiple=True, help="One task for all rows, or one per row; repeatable."
)
@click.option(
    "--tensor",
    type=PATH,
    help="A preprocessed batch [B, C, H, W], or [B, C, T, H, W] of clips (.npy or .safetensors), "
    "instead of files; for an engine of several inputs, all of them by name (.safetensors). Every row is "
    "answered on its own.",
)
@click.option("-o", "--output", type=PATH, help="Write the raw logits [B, K] (.npy).")
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Labels per row.")
@provider_option
@threads_option
@json_option
@click.option("--force", is_flag=True, help="Replace the file of logits.")
@click.pass_obj
def command(
    console: Console,
    bundle: Path,
    pictures: tuple[Path, ...],
    tasks: tuple[str, ...],
    tensor: Path | None,
    output: Path | None,
    top: int,
    provider: str,
    threads: int | None,
    as_json: bool,
    force: bool,
) -> None:
    """Print the top labels of every IMAGE or VIDEO, each with its own task if you like.

    A VIDEO is an animated file (GIF, WebP, TIFF) or a folder of frames, for tasks that read clips. Its
    logits are the mean over the clips that the task takes from it. Of a task without labels, the size and
    the first numbers of the answer are printed, and all of them with --json.
    """
    import numpy as np

    from ...export.bundle import open_bundle
    from ...export.engine import IMAGES, row_inputs
    from ...merge.errors import UsageError
    from ...merge.files import atomic_file, refuse_existing
    from ...serving.service import Service
    from ..pictures import read_rows

    if bool(pictures) == (tensor is not None):
        raise UsageError("name pictures or --tensor, one of the two")
    if output is not None:
        refuse_existing(output, force=force)
    opened = open_bundle(bundle)
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
    names = _tasks(opened, tasks, count)
    views = [1] * count
    if not batch:
        read = [
            read_rows(path, opened.task(name).preprocessing)
            for path, name in zip(pictures, names, strict=True)
        ]
        batch, views = {IMAGES: np.concatenate(read)}, [len(rows) for rows in read]
    service = Service.open(opened, provider=provider, threads=threads)
    asked = [name for name, times in zip(names, views, strict=True) for _ in range(times)]
    size = opened.engine.max_batch
    logits = np.concatenate(
        [
            service.answer(
                {name: array[at : at + size] for name, array in batch.items()},
                asked[at : at + size],
            ).logits
            for at in range(0, len(asked), size)
        ]
    )
    logits = _mean_of_views(logits, views)
    if output is not None:
        with atomic_file(output) as temporary, temporary.open("wb") as file:
            np.save(file, logits)
    sources = [str(path) for path in pictures] or [f"{tensor}[{row}]" for row in range(count)]
    if opened.task(names[0]).labels:
        _say_labels(console, opened, sources, names, logits, top, as_json)
    else:
        _say_numbers(console, opened, sources, names, logits, as_json)


def _say_labels(
    console: Console,
    bundle: Bundle,
    sources: list[str],
    names: list[str],
    logits: NDArray[np.float32],
    top: int,
    as_json: bool,
) -> None:
    rows = [
        {"input": source, "task": name, "top": _best(bundle, name, row, top)}
        for source, name, row in zip(sources, names, logits, strict=True)
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
    console: Console,
    bundle: Bundle,
    sources: list[str],
    names: list[str],
    logits: NDArray[np.float32],
    as_json: bool,
) -> None:
    answers = [row[..., : bundle.task(name).width] for name, row in zip(names, logits, strict=True)]
    if as_json:
        console.json(
            [
                {"input": source, "task": name, "answer": answer.tolist()}
                for source, name, answer in zip(sources, names, answers, strict=True)
            ]
        )
        return
    console.table(
        ("input", "task", "answer", "first"),
        [
            (
                source,
                name,
                f"{'embedding' if answer.ndim == 1 else 'array'} of "
                f"{' x '.join(map(str, answer.shape))} numbers",
                " ".join(f"{number:.4f}" for number in answer.ravel()[:SHOWN_NUMBERS]),
            )
            for source, name, answer in zip(sources, names, answers, strict=True)
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
    """Raw logits `[rows, K]` averaged over the rows of each input, `[inputs, K]`.

    In float64: absent classes hold numbers so low that no float32 holds their sum.
    """
    import numpy as np

    ends = np.cumsum(views)[:-1]
    parts = np.split(logits.astype(np.float64), ends)
    return np.stack([part.mean(axis=0) for part in parts]).astype(np.float32)


def _best(bundle: Bundle, name: str, row: NDArray[np.float32], top: int) -> list[dict[str, Any]]:
    import numpy as np

    labels = bundle.task(name).labels
    logits = row[: len(labels)].astype(np.float64)
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    return [{"label": labels[i], "score": float(scores[i])} for i in np.argsort(-scores)[:top]]
