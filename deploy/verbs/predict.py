"""`utune-deploy predict`: pictures, videos or tensors in, labels and scores out, in process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..options import PATH, json_option, provider_option, threads_option

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from ...export.bundle import Bundle
    from ..console import Console


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
    "instead of files; every row is answered on its own.",
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
    logits are the mean over the clips that the task takes from it.
    """
    import numpy as np

    from ...export.bundle import open_bundle
    from ...merge.errors import UsageError
    from ...merge.files import atomic_file, refuse_existing
    from ...serving.service import Service
    from ..pictures import read_rows

    if bool(pictures) == (tensor is not None):
        raise UsageError("name pictures or --tensor, one of the two")
    if output is not None:
        refuse_existing(output, force=force)
    opened = open_bundle(bundle)
    batch = read_tensor(tensor) if tensor is not None else None
    count = len(pictures) if batch is None else len(batch)
    names = _tasks(opened, tasks, count)
    views = [1] * count
    if batch is None:
        read = [
            read_rows(path, opened.task(name).preprocessing)
            for path, name in zip(pictures, names, strict=True)
        ]
        batch, views = np.concatenate(read), [len(rows) for rows in read]
    service = Service.open(opened, provider=provider, threads=threads)
    asked = [name for name, times in zip(names, views, strict=True) for _ in range(times)]
    size = opened.engine.max_batch
    logits = np.concatenate(
        [
            service.answer(batch[at : at + size], asked[at : at + size]).logits
            for at in range(0, len(batch), size)
        ]
    )
    logits = _mean_of_views(logits, views)
    if output is not None:
        with atomic_file(output) as temporary, temporary.open("wb") as file:
            np.save(file, logits)
    sources = [str(path) for path in pictures] or [f"{tensor}[{row}]" for row in range(count)]
    rows = [
        {"input": source, "task": name, "top": _best(opened, name, row, top)}
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


def read_tensor(path: Path) -> NDArray[np.float32]:
    """A batch `[B, C, H, W]` or `[B, C, T, H, W]` float32 from .npy or .safetensors with one tensor.

    Raises:
        UsageError: The file cannot be read as one such batch.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from ...merge.errors import UsageError

    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if len(tensors) != 1:
                raise UsageError(
                    "the file does not hold one tensor",
                    where=path,
                    found=", ".join(sorted(tensors)),
                )
            batch = next(iter(tensors.values()))
        else:
            batch = np.load(path, allow_pickle=False)
    except (OSError, ValueError, SafetensorError) as cause:
        raise UsageError("the tensor cannot be read", where=path, found=str(cause)) from cause
    if batch.ndim not in (4, 5) or batch.dtype != np.float32 or not len(batch):
        raise UsageError(
            "the tensor is no preprocessed batch",
            where=path,
            wanted="[B, C, H, W] or [B, C, T, H, W] float32",
            found=f"{list(batch.shape)} {batch.dtype}",
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
