"""The record of one load, and its JSON. `schema.json` specifies the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..records import plain, write_record

if TYPE_CHECKING:
    from pathlib import Path

    from ..bench.machine import Load, Machine
    from .numbers import StepResult
    from .saturation import Saturation
    from .step import Settings

FORMAT = "utune-load"
VERSION = 1


@dataclass(frozen=True)
class Input:
    """An input of the model.

    Attributes:
        name: Its name.
        datatype: The protocol's.
        shape: Of a row.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """What was sent.

    Attributes:
        rows: Rows of each request.
        mix: How rows spread over tasks.
        encoding: Of tensors: `binary` or `json`.
        source: Where the rows come from, in words.
        requests: Distinct requests, which were sent over and over in order.
        request_bytes: Mean size of one.
        task_rows: Rows of each task in all of these together.
        inputs: What the model takes.
    """

    rows: int
    mix: str
    encoding: str
    source: str
    requests: int
    request_bytes: int
    task_rows: dict[str, int]
    inputs: tuple[Input, ...]


@dataclass(frozen=True)
class Changing:
    """A task that came and went meanwhile.

    Attributes:
        task: Its name.
        every_s: Seconds between two changes.
    """

    task: str
    every_s: float


@dataclass(frozen=True)
class Report:
    """Everything that was measured, and how.

    Attributes:
        url: The server.
        server: What it calls itself: `name` and `version`, where it says so.
        model: The model's name.
        asked: What was sent.
        loop: A key of `LOOPS`.
        steps: The numbers, in the order of the steps.
        saturation: Up to which rate the server holds; None of a closed loop.
        settings: For how long was measured.
        changing: The task that came and went; None where none did.
        machine: The client's.
        load: The client's load average before and after.
        date: When it began, ISO 8601 with its offset.
        command: The command line.
        warnings: What a reader should doubt, one sentence each.
    """

    url: str
    server: dict[str, str]
    model: str
    asked: Asked
    loop: str
    steps: tuple[StepResult, ...]
    saturation: Saturation | None
    settings: Settings
    changing: Changing | None
    machine: Machine
    load: Load
    date: str
    command: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON value that `schema.json` specifies."""
        return {"format": FORMAT, "version": VERSION, **plain(asdict(self))}


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON, whole or not at all."""
    write_record(report.to_json(), path)
