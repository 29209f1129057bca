"""Scikit-learn's 1,797 handwritten digits as pictures, and nine questions to ask of them.

`TASKS` holds the seven that share one engine with a task per row, `SIDE_TASKS` the two that are tuned
with networks beside the trunk, so that one pass of it answers both.

The pictures are 8x8 grey levels from 0 to 16 (UCI "Optical Recognition of Handwritten Digits") and
come with scikit-learn, so that nothing is downloaded. The test split is every fourth picture of
each digit in the order of the data set: stratified, and the same under every version of every
library, because no random number is drawn for it.

    python examples/digits/data.py --png DIR
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from utune_deploy.merge.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

Split = Literal["train", "test"]

TEST_EVERY = 4  # of each digit: 445 of the 1,797 pictures are held out
PREPROCESSING = Preprocessing(size=(32, 32), interpolation="bicubic")  # [0, 1] to [-1, 1]


@dataclass(frozen=True)
class Picture:
    """One handwritten digit.

    Attributes:
        number: Its place in the data set.
        image: 8x8, mode L, white ink on black.
        digit: What was written, 0 to 9.
    """

    number: int
    image: Image.Image
    digit: int


@dataclass(frozen=True)
class Task:
    """A question about a picture.

    Attributes:
        name: As in the delta.
        question: In words, for people.
        labels: The answers, in the order of the classes.
        views: From a picture's image and digit to the images that are shown and the class of each;
            most tasks show every picture once and as it is.
    """

    name: str
    question: str
    labels: tuple[str, ...]
    views: Callable[[Image.Image, int], list[tuple[Image.Image, int]]]


@dataclass(frozen=True)
class Example:
    """One image of a task.

    Attributes:
        name: Unique within the task and split; sorts in the order of the data set.
        image: 8x8, mode L.
        label: Its class.
    """

    name: str
    image: Image.Image
    label: int


def quarters(image: Image.Image) -> list[Image.Image]:
    """The image turned to the left by 0, 90, 180 and 270 degrees."""
    return [image, *(image.transpose(turn) for turn in TURNS)]


def _four_views(image: Image.Image, digit: int) -> list[tuple[Image.Image, int]]:
    if digit not in ONE_WAY_UP:
        return []
    return [(turned, turn) for turn, turned in enumerate(quarters(image))]


def _both_sides(image: Image.Image, digit: int) -> list[tuple[Image.Image, int]]:
    if digit not in ONE_SIDED:
        return []
    return [(image, 0), (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 1)]


TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
DIGITS = tuple("0123456789")
LOOPS = (1, 0, 0, 0, 0, 0, 1, 0, 2, 1)  # by digit, as it is usually written
ONE_WAY_UP = (3, 4, 6, 7)  # 0, 1, 2, 5 and 8 look alike upside down, and a 9 is a turned 6
ONE_SIDED = (2, 3, 4, 5, 6, 7, 9)  # 0, 1 and 8 look alike in a mirror
PRIMES = (2, 3, 5, 7)

TASKS = {
    task.name: task
    for task in (
        Task("digit", "Which digit is it?", DIGITS, lambda image, digit: [(image, digit)]),
        Task(
            "parity", "Is it even or odd?", ("even", "odd"),
            lambda image, digit: [(image, digit % 2)],
        ),
        Task(
            "loop", "How many loops has it?", ("none", "one", "two"),
            lambda image, digit: [(image, LOOPS[digit])],
        ),
        Task(
            "rotated", "Which digit is it, lying on its side?", DIGITS,
            lambda image, digit: [(quarters(image)[1], digit)],
        ),
        Task(
            "at-least-five", "Is it five or more?", ("below-five", "at-least-five"),
            lambda image, digit: [(image, int(digit >= 5))],
        ),
        Task(
            "quarter", "By how many degrees was it turned to the left?",
            ("0", "90", "180", "270"), _four_views,
        ),
        Task(
            "mirrored", "Is it a mirror image?", ("as-written", "mirrored"), _both_sides,
        ),
    )
}  # fmt: skip

SIDE_TASKS = {
    task.name: task
    for task in (
        Task(
            "prime", "Is it a prime number?", ("no", "yes"),
            lambda image, digit: [(image, int(digit in PRIMES))],
        ),
        Task(
            "three", "Is it a multiple of three?", ("no", "yes"),
            lambda image, digit: [(image, int(digit % 3 == 0))],
        ),
    )
}  # fmt: skip

EVERY_TASK = {**TASKS, **SIDE_TASKS}


def pictures(split: Split) -> list[Picture]:
    """The pictures of a split, in the order of the data set."""
    levels, digits = load_digits(return_X_y=True)
    seen = [0] * 10
    chosen = []
    for number, (row, digit) in enumerate(zip(levels, digits.tolist(), strict=True)):
        seen[digit] += 1
        if (seen[digit] % TEST_EVERY == 0) == (split == "test"):
            grey = np.rint(row.reshape(8, 8) * (255 / 16)).astype(np.uint8)
            chosen.append(Picture(number, Image.fromarray(grey), digit))
    return chosen


def examples(task: Task, split: Split) -> list[Example]:
    """What a task shows of a split, in the order of the data set."""
    return [
        Example(f"{picture.number:04d}-{view}-{task.labels[label]}", image, label)
        for picture in pictures(split)
        for view, (image, label) in enumerate(task.views(picture.image, picture.digit))
    ]


def tensors(
    shown: Iterable[Example], preprocessing: Preprocessing = PREPROCESSING
) -> tuple[Tensor, Tensor]:
    """Images `[B, 3, 32, 32]` float32, as a delta's own preprocessing makes them, and classes `[B]`."""
    shown = list(shown)
    images = np.stack([preprocessing.apply(example.image) for example in shown])
    return torch.from_numpy(images), torch.tensor([example.label for example in shown])


def write_png(folder: Path, chosen: Iterable[Task] = TASKS.values()) -> int:
    """Write what the tasks show of the test split as `folder/TASK/NUMBER-VIEW-LABEL.png`, 8x8 grey.

    Returns:
        The number of files.
    """
    count = 0
    for task in chosen:
        (folder / task.name).mkdir(parents=True, exist_ok=True)
        for example in examples(task, "test"):
            example.image.save(folder / task.name / f"{example.name}.png")
            count += 1
    return count


def main() -> None:
    """Write the test pictures."""
    parser = argparse.ArgumentParser(description="Write the held-out pictures of the tasks.")
    parser.add_argument("--png", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--task", choices=EVERY_TASK, action="append", help="only this one; repeatable"
    )
    arguments = parser.parse_args()
    chosen = [EVERY_TASK[name] for name in arguments.task or EVERY_TASK]
    count = write_png(arguments.png, chosen)
    print(f"{count} pictures of {len(chosen)} tasks written to {arguments.png}")


if __name__ == "__main__":
    main()
