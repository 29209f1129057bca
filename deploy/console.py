"""Where the command line speaks: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console as Rich


WIDE = 200
"""Columns where nobody is watching: a table in a file is whole."""


def paper() -> Rich:
    """Where tables are printed: a terminal as wide as it is, a pipe or a file as wide as any of ours."""
    from rich.console import Console as Rich

    return Rich(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)


class Console:
    """What a verb says.

    Args:
        verbosity: 0, 1 or more.
        quiet: Results and errors only.
    """

    def __init__(self, *, verbosity: int = 0, quiet: bool = False) -> None:
        self.verbosity = verbosity
        self.quiet = quiet

    def result(self, text: str) -> None:
        """The answer of a verb, on stdout."""
        click.echo(text)

    def json(self, value: Any) -> None:
        """The answer of a verb as JSON, on stdout."""
        click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))

    def say(self, text: str) -> None:
        """What a person may want to know, on stderr."""
        if not self.quiet:
            click.echo(text, err=True)

    def detail(self, text: str) -> None:
        """What a person asked for with -v, on stderr."""
        if self.verbosity and not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """What a person should not overlook, on stderr."""
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {text}", err=True)

    def table(self, heading: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Rows under a heading, on stdout, columns as wide as they need."""
        cells = [list(map(str, row)) for row in (heading, *rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(heading))]
        for number, row in enumerate(cells):
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            click.echo(click.style(line.rstrip(), bold=True) if number == 0 else line.rstrip())

    @contextmanager
    def steps(self, *names: str) -> Iterator[Callable[[str], None]]:
        """A progress bar over named steps, on stderr, when a person is watching."""
        if self.quiet or not sys.stderr.isatty():
            yield self.detail
            return
        from rich.console import Console as Rich
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:10}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Rich(stderr=True), transient=True) as bar:
            task = bar.add_task(names[0], total=len(names))

            def step(name: str) -> None:
                done = names.index(name) if name in names else len(names)
                bar.update(task, description=name, completed=done)

            yield step
