"""What a load is put on: a server's model, its inputs, and the tasks to ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...export.engine import TASK
from ...merge.errors import UsageError
from ...serving.client import Client, Retry
from ...serving.client.address import parse
from ...serving.client.calls import Config, Index, bundles
from ...serving.client.failures import Failure
from ...serving.client.grpc import GrpcTransport
from ...serving.client.http import HttpTransport
from ...serving.rejections import BadReply, UnknownModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...serving.client.address import Address
    from ...serving.client.calls import Call, ModelFacts, Reply

ASK_S = 10.0
"""Seconds for each question before the load begins."""


@dataclass(frozen=True)
class Target:
    """A model of a running server.

    Attributes:
        address: The server.
        model: The model's name.
        facts: Its inputs and largest batch.
        tasks: The tasks to ask for, in order; none where the model has no input for them.
    """

    address: Address
    model: str
    facts: ModelFacts
    tasks: tuple[str, ...]


def find(url: str, model: str | None = None, tasks: Sequence[str] = ()) -> Target:
    """Ask a server what there is.

    Args:
        url: `http://host:port`, `https://`, `grpc://` or `grpcs://`.
        model: The model's name; None for the only bundle.
        tasks: Those to ask for; none for all that the server lists.

    Raises:
        UsageError: The URL is none, there is no such task, or it is not said which model or task is meant.
        UtuneError: The server is not reached, or does not know the model.
    """
    address = parse(url)
    transport = (GrpcTransport if address.is_grpc else HttpTransport)(address)

    def ask(call: Call) -> Reply:
        try:
            return transport.send(call, ASK_S)
        except Failure as failure:
            raise failure.error from failure

    try:
        name = model or _only(ask(Index()), address)
        facts = ask(Config(name))
    finally:
        transport.close()
    assert not isinstance(
        facts, (dict, tuple)
    )  # what a question for a configuration is answered with
    return Target(address, name, facts, _tasks(url, name, facts, tasks))


def _only(ready: Reply, address: Address) -> str:
    assert isinstance(ready, tuple)  # what a question for names is answered with
    names = bundles(ready)
    if len(names) != 1:
        raise UsageError(
            "it is not said which model is asked" if names else "no model is ready",
            where=address,
            found=", ".join(names) or None,
            do="name it with --model" if names else None,
        )
    return names[0]


def _tasks(url: str, model: str, facts: ModelFacts, wanted: Sequence[str]) -> tuple[str, ...]:
    if TASK not in facts.inputs:
        if wanted:
            raise UsageError("the model takes no task", where=f"{url}, {model}", found=wanted[0])
        return ()
    try:
        with Client(url, model=model, deadline_s=ASK_S, retry=Retry(attempts=1)) as client:
            listed = tuple(task.name for task in client.tasks())
    except (UnknownModel, BadReply) as cause:  # not every server lists tasks
        if wanted:
            return tuple(wanted)
        raise UsageError(
            "the server does not say which tasks it has",
            where=f"{url}, {model}",
            do="name those to ask for with --task",
        ) from cause
    unknown = [name for name in wanted if name not in listed]
    if unknown:
        raise UsageError(
            "there is no such task",
            where=f"{url}, {model}",
            wanted=f"some of {', '.join(listed)}",
            found=", ".join(unknown),
        )
    return tuple(dict.fromkeys(wanted)) or listed
