"""A whole load: the steps one after the other, and the report about them."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import datetime
from typing import TYPE_CHECKING

from ...merge.errors import CheckFailed
from ...serving.client.failures import of_code, of_status, unreachable
from ..bench.machine import Load, command_line, load_now, read_machine
from ..bench.measure import without_collector
from .answers import fault
from .cautions import find_cautions
from .changes import Changer, effect
from .drive import drive, run_precisely, sentence
from .numbers import numbers
from .report import Asked, Changing, Input, Report
from .saturation import saturation
from .step import CLOSED
from .wire import BROKEN, OK, TIMEOUT
from .wires import open_wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .numbers import StepResult
    from .step import Settings, Step
    from .target import Target
    from .traffic import Traffic
    from .wire import Reply, Wire


def load(
    target: Target,
    traffic: Traffic,
    steps: Sequence[Step],
    settings: Settings,
    *,
    changing: Changing | None = None,
    packed: bytes = b"",
    command: str | None = None,
    told: Callable[[Step, StepResult], None] | None = None,
) -> Report:
    """Drive every step.

    Args:
        target: The server's model.
        traffic: What is sent.
        steps: What is driven, in order; all of one loop.
        settings: For how long.
        changing: A task that comes and goes meanwhile.
        packed: Its packed file.
        command: The command line, for the report; that of this process unless given.
        told: Told each step's numbers.

    Raises:
        UtuneError: The first request, which is not counted, is refused or not answered.
        CheckFailed: Its answer is none.
    """
    began, load_before = datetime.now().astimezone(), load_now()
    server, results = run_precisely(
        _drive_all(target, traffic, steps, settings, changing, packed, told)
    )
    machine, load_both = read_machine(), Load(load_before, load_now())
    loop = steps[0].loop
    return Report(
        url=str(target.address),
        server=server,
        model=target.model,
        asked=_asked(target, traffic),
        loop=loop,
        steps=results,
        saturation=None if loop == CLOSED else saturation(results),
        settings=settings,
        changing=changing,
        machine=machine,
        load=load_both,
        date=began.isoformat(timespec="seconds"),
        command=command_line() if command is None else command,
        warnings=find_cautions(
            steps, results, machine, load_both, handed_over=target.facts.hands_over
        ),
    )


async def _drive_all(
    target: Target,
    traffic: Traffic,
    steps: Sequence[Step],
    settings: Settings,
    changing: Changing | None,
    packed: bytes,
    told: Callable[[Step, StepResult], None] | None,
) -> tuple[dict[str, str], tuple[StepResult, ...]]:
    wire = open_wire(target.address)
    results = []
    try:
        await _try(wire, target, traffic, settings)
        server = await wire.server()
        for step in steps:
            with without_collector(), _changer(target, changing, packed) as changer:
                run = await drive(
                    wire, traffic, target.model, step, settings, over_grpc=target.address.is_grpc
                )
            changes = None if changer is None else effect(run, step, changer.changes)
            if target.facts.hands_over:
                run.before = run.after = None
            results.append(numbers(run, step, traffic.rows, changes))
            if told is not None:
                told(step, results[-1])
    finally:
        await wire.close()
    return server, tuple(results)


async def _try(wire: Wire, target: Target, traffic: Traffic, settings: Settings) -> None:
    """One request, before a load of thousands is refused a thousand times."""
    reply = await wire.send(traffic.messages[0], settings.timeout_s)
    if reply.status != OK:
        raise _refusal(target, reply)
    wrong = fault(reply, traffic.rows, over_grpc=target.address.is_grpc)
    if wrong is not None:
        raise CheckFailed(
            "the first request has no proper answer",
            where=f"{target.address}, {target.model}",
            wanted=f"finite numbers for {traffic.rows} rows",
            found=wrong,
        )


def _refusal(target: Target, reply: Reply) -> Exception:
    says = sentence(reply)
    if reply.status in (BROKEN, TIMEOUT):
        return unreachable(target.address, says or reply.status, "lost").error
    if reply.status.isdigit():
        return of_status(target.address, int(reply.status), says, None).error
    return of_code(target.address, reply.status, says).error


def _changer(
    target: Target, changing: Changing | None, packed: bytes
) -> Changer | nullcontext[None]:
    if changing is None:
        return nullcontext()
    task = packed, changing.task
    return Changer(str(target.address), target.model, task, changing.every_s)


def _asked(target: Target, traffic: Traffic) -> Asked:
    messages = traffic.messages
    return Asked(
        rows=traffic.rows,
        mix=traffic.mix,
        encoding=traffic.encoding,
        source=traffic.source,
        requests=len(messages),
        request_bytes=round(sum(map(len, messages)) / len(messages)),
        task_rows=traffic.task_rows,
        inputs=tuple(Input(name, *entry) for name, entry in target.facts.inputs.items()),
    )
