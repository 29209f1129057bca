"""NAME.tasks: the model that changes which tasks a server answers, over the inference protocol itself.

    command  BYTES [1]   JSON: {"action": ..., "task": name, "version": number}
    file     BYTES [1]   a packed task, for add and update
    reply    BYTES [1]   JSON

    list      every task, or the one named          add, update   the packed task in `file`
    describe  what a sender lays a task out for     use           another version of a task
    remove    a task                                pin, unpin    keep a task in the engine's memory, or not

Being a model, it is reached through every client, over HTTP and gRPC, and on every server alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any, Protocol

from ...merge.errors import UsageError
from .. import protocol
from ..rejections import InvalidRequest
from ..tensors import BYTES, OutputTensor, text_output, texts
from ..watching.logs import DETAILS
from .packed import read_packed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ..models import Asked
    from ..queueing.batcher import Batcher
    from .life import Staged, Tasks

log = logging.getLogger(__name__)


class Aliases(Protocol):
    """Whoever keeps a model per task, where those do not follow by themselves."""

    def follow(self, task: str) -> None:
        """Bring the alias to what the task is now; raises nothing."""
        ...

    def entry(self, task: str) -> dict[str, Any]:
        """What there is to say of a task's alias, as JSON values."""
        ...


TASKS = ".tasks"
"""Behind a bundle's name: the model that changes its tasks."""

COMMAND, FILE, REPLY = "command", "file", "reply"


class TaskCommands:
    """See the module. One change runs at a time; requests are answered meanwhile."""

    def __init__(
        self, batcher: Batcher, *, control: bool = True, aliases: Aliases | None = None
    ) -> None:
        """Over the batcher of the tasks.

        Args:
            batcher: Its engine is what a new task is held to, beside the requests that it answers.
            control: Whether clients may change the tasks, or only look.
            aliases: Models that are to follow the tasks.
        """
        self._batcher = batcher
        self._service = batcher.service
        self._control = control
        self._aliases = aliases
        self._change = asyncio.Lock()
        self.name = self._service.registry.name + TASKS
        self.versions = (protocol.VERSION,)
        self._actions: dict[str, Callable[[dict[str, Any], bytes | None], Awaitable[Any]]] = {
            "list": self._list,
            "describe": self._describe,
            "add": self._add,
            "update": self._update,
            "remove": self._remove,
            "use": self._use,
            "pin": self._pin,
            "unpin": self._unpin,
        }

    @property
    def ready(self) -> bool:
        """See `Model.ready`."""
        return self._batcher.ready

    def metadata(self, version: str) -> dict[str, Any]:
        """See `Model.metadata`."""
        return {
            "name": self.name,
            "versions": list(self.versions),
            "platform": protocol.SERVER,
            "inputs": [
                {"name": COMMAND, "datatype": BYTES, "shape": [1]},
                {"name": FILE, "datatype": BYTES, "shape": [1], "optional": True},
            ],
            "outputs": [{"name": REPLY, "datatype": BYTES, "shape": [1]}],
        }

    def config(self, version: str) -> dict[str, Any]:
        """See `Model.config`."""
        return commands_config(self._service.registry.name)

    def statistics(self) -> list[dict[str, Any]]:
        """See `Model.statistics`: changes are counted by themselves, in the metrics."""
        return []

    async def infer(self, asked: Asked) -> list[OutputTensor]:
        """Carry out one command.

        Raises:
            InvalidRequest: It cannot be read.
            UsageError: It cannot be carried out.
            IncompatibleArtefact: The packed task does not fit.
            CheckFailed: The engine does not answer as the task does in torch.
        """
        command, file = read_command({tensor.name: tensor for tensor in asked.inputs})
        return [text_output(REPLY, json.dumps(await self.run(command, file)))]

    async def run(self, command: dict[str, Any], file: bytes | None = None) -> dict[str, Any]:
        """Carry out one command; see the module for both."""
        action = command.get("action")
        if not isinstance(action, str) or action not in self._actions:
            raise InvalidRequest(
                "unknown action", wanted=f"one of {', '.join(self._actions)}", found=action
            )
        return {
            "model": self._service.registry.name,
            **await self._actions[action](command, file),
        }

    async def add(self, data: bytes, *, update: bool, name: str | None = None) -> dict[str, Any]:
        """Add or update a task: stage it, hold the engine to it, publish it.

        Args:
            data: The packed task.
            update: Whether it is to replace one that is there.
            name: What it must be called; None takes its own name.

        Raises:
            UtuneError: See `infer`.
        """
        tasks = self._require_control()
        require_called(data, name)
        async with self._change:
            staged = await asyncio.to_thread(tasks.stage, data, update=update)
            with self._unless_published(tasks, staged):
                answers = await self._batcher.ask(tasks.probe(staged))
                tasks.require_right(staged, answers)
                await asyncio.to_thread(tasks.publish, staged, update=update)
            self._service.counters.know(staged.version.name)
            await self._follow(staged.version.name)
        self._log("updated" if update else "added", staged.version.name)
        return self._shown(staged.version.name)

    async def remove(self, name: str) -> dict[str, Any]:
        """Remove a task.

        Raises:
            UsageError: There is no such task, or it is the last.
        """
        tasks = self._require_control()
        async with self._change:
            await asyncio.to_thread(tasks.remove, name)
            await self._follow(name)
        self._service.counters.forget(name)
        self._log("removed", name)
        return {"removed": name}

    async def use(self, name: str, number: int) -> dict[str, Any]:
        """Answer with another version of a task.

        Raises:
            UsageError: There is no such task or version.
        """
        tasks = self._require_control()
        async with self._change:
            await asyncio.to_thread(tasks.use, name, number)
            await self._follow(name)
        self._log("set to another version", name, version=number)
        return self._shown(name)

    async def pin(self, name: str, *, pinned: bool) -> dict[str, Any]:
        """Keep a task in the engine's memory, or let it make room again.

        Raises:
            UsageError: There is no such task, or too many are pinned.
        """
        tasks = self._require_control()
        async with self._change:
            await asyncio.to_thread(tasks.pin, name, pinned=pinned)
        return self._shown(name)

    async def entries(self, name: str | None = None) -> list[dict[str, Any]]:
        """See `Service.entries`."""
        return [self._with_alias(entry) for entry in self._service.entries(name)]

    async def _follow(self, name: str) -> None:
        if self._aliases is not None:
            await asyncio.to_thread(self._aliases.follow, name)

    def _with_alias(self, entry: dict[str, Any]) -> dict[str, Any]:
        return entry if self._aliases is None else entry | self._aliases.entry(entry["name"])

    @staticmethod
    def _log(change: str, name: str, **details: Any) -> None:
        log.info(f"task {change}", extra={DETAILS: {"task": name, **details}})

    async def _list(self, command: dict[str, Any], _: bytes | None) -> dict[str, Any]:
        return {"tasks": await self.entries(_named(command) if "task" in command else None)}

    async def _describe(self, _: dict[str, Any], __: bytes | None) -> dict[str, Any]:
        return self._service.description() | {"control": self._control}

    async def _add(self, _: dict[str, Any], file: bytes | None) -> dict[str, Any]:
        return await self.add(_required(file), update=False)

    async def _update(self, _: dict[str, Any], file: bytes | None) -> dict[str, Any]:
        return await self.add(_required(file), update=True)

    async def _remove(self, command: dict[str, Any], _: bytes | None) -> dict[str, Any]:
        return await self.remove(_named(command))

    async def _use(self, command: dict[str, Any], _: bytes | None) -> dict[str, Any]:
        number = command.get("version")
        if not isinstance(number, int) or isinstance(number, bool):
            raise InvalidRequest("the command names no version", wanted="a number", found=number)
        return await self.use(_named(command), number)

    async def _pin(self, command: dict[str, Any], _: bytes | None) -> dict[str, Any]:
        return await self.pin(_named(command), pinned=True)

    async def _unpin(self, command: dict[str, Any], _: bytes | None) -> dict[str, Any]:
        return await self.pin(_named(command), pinned=False)

    @contextlib.contextmanager
    def _unless_published(self, tasks: Tasks, staged: Staged) -> Iterator[None]:
        """Give back what a version took when the block ends with an error."""
        try:
            yield
        except BaseException:
            tasks.discard(staged)
            raise

    def _shown(self, name: str) -> dict[str, Any]:
        (entry,) = self._service.entries(name)
        return {"task": self._with_alias(entry)}

    def _require_control(self) -> Tasks:
        self._refuse_unless_control()
        return self._service.require_tasks()

    def _refuse_unless_control(self) -> None:
        if not self._control:
            raise UsageError(
                "this server does not let clients change its tasks",
                do="start it with --task-control",
            )


def commands_config(bundle: str) -> dict[str, Any]:
    """The configuration of NAME.tasks in Triton's fields, NAME being the bundle's."""
    tensor = {"data_type": "TYPE_STRING", "dims": [1]}
    return {
        "name": bundle + TASKS,
        "platform": protocol.SERVER,
        "max_batch_size": 0,
        "input": [
            {"name": COMMAND, **tensor},
            {"name": FILE, **tensor, "optional": True},
        ],
        "output": [{"name": REPLY, **tensor}],
    }


def require_called(data: bytes, name: str | None) -> None:
    """Hold a packed task to the name that it is sent under; None takes its own.

    Raises:
        InvalidRequest: It has another name.
        IncompatibleArtefact: It is no packed task.
    """
    if name is not None and (own := read_packed(data).task.name) != name:
        raise InvalidRequest(
            "the packed task has another name than the model", wanted=name, found=own
        )


def read_command(inputs: Any) -> tuple[dict[str, Any], bytes | None]:
    """The command and the file of a request's inputs by name.

    Raises:
        InvalidRequest: They cannot be read.
    """
    if COMMAND not in inputs or not set(inputs) <= {COMMAND, FILE}:
        raise InvalidRequest(
            "the inputs are not those of a command",
            wanted=f"{COMMAND}, and {FILE} where a task comes with it",
            found=", ".join(inputs) or "none",
        )
    given = {name: _one(tensor) for name, tensor in inputs.items()}
    try:
        command = json.loads(given[COMMAND])
    except (ValueError, RecursionError) as cause:
        raise InvalidRequest("the command is not JSON", found=str(cause)[:200]) from cause
    if not isinstance(command, dict):
        raise InvalidRequest("the command is not a JSON object", found=type(command).__name__)
    return command, given.get(FILE)


def _one(tensor: Any) -> bytes:
    """The one element of a BYTES tensor."""
    if tensor.datatype != BYTES:
        raise InvalidRequest(
            "an input has the wrong datatype",
            where=tensor.name,
            wanted=BYTES,
            found=tensor.datatype,
        )
    elements = texts(tensor)
    if len(elements) != 1:
        raise InvalidRequest(
            "an input has the wrong shape",
            where=tensor.name,
            wanted="[1]",
            found=list(tensor.shape),
        )
    (element,) = elements
    try:
        return element.encode() if isinstance(element, str) else element
    except UnicodeEncodeError as cause:
        raise InvalidRequest("an input is not text in UTF-8", where=tensor.name) from cause


def _named(command: dict[str, Any]) -> str:
    name = command.get("task")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("the command names no task", wanted="a name", found=name)
    return name


def _required(file: bytes | None) -> bytes:
    if not file:
        raise InvalidRequest(f"the command comes without its packed task, the input {FILE}")
    return file
