"""The verbs of both clients, each once: what is sent, what is asked again, and what comes back."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...merge.errors import UsageError
from ..rejections import BadReply, InvalidRequest, UnknownModel
from ..tasks.commands import COMMAND, FILE, REPLY, TASKS
from . import rows
from .answers import mean, read_answers, read_task
from .calls import Config, Index, Infer, bundles
from .failures import Failure
from .retry import Deadline, Retry
from .steps import Send, Wait, Work
from .tensors import elements, texts

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from .address import Address
    from .answers import Answer, TaskInfo
    from .calls import Call, ModelFacts
    from .rows import Item, Source
    from .steps import Steps


class Verbs:
    """What a client does, and what it remembers: the model, its shape, and its tasks.

    What is remembered is replaced whole, never changed, so that threads may share it.

    Args:
        address: The server.
        model: The model's name; None for the only one.
        retry: How calls are asked again.
        deadline_s: Seconds for a call, where it names none.
        facts_age_s: Seconds after which a task's facts are asked for again.
    """

    def __init__(
        self,
        address: Address,
        model: str | None,
        retry: Retry,
        deadline_s: float | None,
        facts_age_s: float,
    ) -> None:
        Deadline(deadline_s)  # refuses what is none
        self._address = address
        self._model = model
        self._retry = retry
        self._deadline_s = deadline_s
        self._facts_age_s = facts_age_s
        self._shape: ModelFacts | None = None
        self._tasks: dict[str, TaskInfo] = {}
        self._tasks_at = -float("inf")

    # ------------------------------------------------------------------ questions

    def ask(
        self, source: Source, task: str | None, deadline_s: float | None, priority: int
    ) -> Steps[Answer]:
        """One answer."""
        deadline = self._deadline(deadline_s)
        return (yield from self._ask([rows.Item(source, task)], deadline, priority))[0]

    def ask_many(
        self,
        sources: Sequence[Source] | NDArray[Any] | Mapping[str, NDArray[Any]],
        tasks: str | Sequence[str] | None,
        deadline_s: float | None,
        priority: int,
    ) -> Steps[tuple[Answer, ...]]:
        """An answer for each, in order."""
        asked = rows.items(sources, tasks)
        if not asked:
            return ()
        deadline = self._deadline(deadline_s)
        shape = yield from self._shape_of(deadline)
        yield from self._facts_of(asked, deadline)  # how many rows each becomes
        answers: list[Answer] = []
        for part in self._parts(asked, shape.max_batch):
            if deadline_s is None:  # the client's own limit holds for each request
                deadline = self._deadline(None)
            answers += yield from self._ask(part, deadline, priority)
        return tuple(answers)

    def _parts(self, asked: Sequence[Item], most: int) -> Iterator[list[Item]]:
        """Items that fill a request; one of more rows than that is alone."""
        part: list[Item] = []
        filled = 0
        for item in asked:
            known = self._tasks.get(item.task or "") if item.is_picture else None
            count = known.views if known else 1
            # A request names a task for every row or for none.
            if part and (filled + count > most or (item.task is None) != (part[0].task is None)):
                yield part
                part, filled = [], 0
            part.append(item)
            filled += count
        if part:
            yield part

    def _ask(self, asked: Sequence[Item], deadline: Deadline, priority: int) -> Steps[list[Answer]]:
        """The answers to some items; once more where the tasks turn out to have changed meanwhile."""
        shape = yield from self._shape_of(deadline)
        facts = yield from self._facts_of(asked, deadline)
        try:
            answers = yield from self._answers(asked, facts, shape, deadline, priority)
            if all(_fits(answer, fact) for answer, fact in zip(answers, facts, strict=True)):
                return answers
            misfit = None
        except (InvalidRequest, UnknownModel) as refusal:
            if not any(facts):
                raise
            misfit = refusal
        self._forget()
        fresh = yield from self._facts_of(asked, deadline)
        if misfit is not None and fresh == facts:
            raise misfit
        return (yield from self._answers(asked, fresh, shape, deadline, priority))

    def _answers(
        self,
        asked: Sequence[Item],
        facts: Sequence[TaskInfo | None],
        shape: ModelFacts,
        deadline: Deadline,
        priority: int,
    ) -> Steps[list[Answer]]:
        prepared = yield Work(lambda: rows.prepare(asked, facts, shape))
        inputs = rows.join(prepared)
        counts = [len(next(iter(part.values()))) for part in prepared]
        names = [
            fact.name if fact else item.task
            for item, fact, count in zip(asked, facts, counts, strict=True)
            for _ in range(count)
        ]
        model = yield from self._name(deadline)
        answers: list[Answer] = []
        for at in range(0, len(names), shape.max_batch):
            end = at + shape.max_batch
            part = {name: array[at:end] for name, array in inputs.items()}
            outputs = yield from self._call(Infer(model, part, priority), deadline)
            answers += read_answers(outputs, names[at:end], where=self._address)
        ends = np.cumsum(counts).tolist()
        return [
            mean(answers[end - count : end], fact.labels if fact else ())
            for end, count, fact in zip(ends, counts, facts, strict=True)
        ]

    # ------------------------------------------------------------------ tasks

    def tasks(self, deadline_s: float | None) -> Steps[tuple[TaskInfo, ...]]:
        """What tasks there are, as the server says now."""
        self._forget()
        known = yield from self._facts(self._deadline(deadline_s))
        return tuple(known.values())

    def change(
        self, action: str, deadline_s: float | None, *, repeatable: bool = True, **details: Any
    ) -> Steps[TaskInfo]:
        """A task after a command that leaves it there."""
        reply = yield from self._command(action, self._deadline(deadline_s), repeatable, **details)
        entry = reply.get("task")
        if not isinstance(entry, dict):
            raise BadReply("the reply names no task", where=self._address, found=sorted(reply))
        task = read_task(entry, where=self._address)
        self._tasks = {**self._tasks, task.name: task}
        return task

    def bring(
        self, action: str, file: bytes | str | os.PathLike[str], deadline_s: float | None
    ) -> Steps[TaskInfo]:
        """A task after the server was given its packed file; not repeatable: each time counts."""
        if isinstance(file, bytes):
            content = file
        else:
            content = yield Work(lambda: _read(Path(file)))
        return (yield from self.change(action, deadline_s, repeatable=False, content=content))

    def describe(self, deadline_s: float | None) -> Steps[dict[str, Any]]:
        """What a task must be laid out for; see `serving.tasks.packed.layout_json`."""
        return (yield from self._command("describe", self._deadline(deadline_s), True))

    def remove(self, name: str, deadline_s: float | None) -> Steps[None]:
        """Nothing, once the task is gone."""
        yield from self._command("remove", self._deadline(deadline_s), False, task=name)
        self._tasks = {key: task for key, task in self._tasks.items() if key != name}

    def _command(
        self,
        action: str,
        deadline: Deadline,
        repeatable: bool,
        *,
        content: bytes | None = None,
        **details: Any,
    ) -> Steps[dict[str, Any]]:
        """What the model of tasks replies."""
        name = (yield from self._name(deadline)) + TASKS
        inputs = {COMMAND: elements([json.dumps({"action": action, **details})])}
        if content is not None:
            inputs[FILE] = elements([content])
        outputs = yield from self._call(Infer(name, inputs, repeatable=repeatable), deadline)
        try:
            (text,) = texts(outputs[REPLY])
            reply = json.loads(text)
        except (KeyError, ValueError) as cause:
            raise BadReply("the reply cannot be read", where=f"{self._address}, {name}") from cause
        if not isinstance(reply, dict):
            raise BadReply("the reply cannot be read", where=f"{self._address}, {name}", found=text)
        return reply

    # ------------------------------------------------------------------ what is remembered

    def _forget(self) -> None:
        self._tasks_at = -float("inf")

    def _facts(self, deadline: Deadline) -> Steps[dict[str, TaskInfo]]:
        """The tasks by name, from memory while it is fresh."""
        if time.monotonic() - self._tasks_at <= self._facts_age_s:
            return self._tasks
        asked_at = time.monotonic()
        reply = yield from self._command("list", deadline, True)
        entries = reply.get("tasks")
        if not isinstance(entries, list):
            raise BadReply("the reply names no tasks", where=self._address, found=sorted(reply))
        found = [read_task(entry, where=self._address) for entry in entries]
        self._tasks, self._tasks_at = {task.name: task for task in found}, asked_at
        return self._tasks

    def _facts_of(self, asked: Sequence[Item], deadline: Deadline) -> Steps[list[TaskInfo | None]]:
        """The task of each item that is a picture."""
        if not any(item.is_picture for item in asked):
            return [None] * len(asked)
        try:
            known = yield from self._facts(deadline)
            if any(item.is_picture and item.task and item.task not in known for item in asked):
                self._forget()
                known = yield from self._facts(deadline)
        except UnknownModel as cause:
            raise UnknownModel(
                "the server does not say how its tasks want their pictures",
                where=self._address,
                wanted=f"the model {self._model}{TASKS}",
                do="give arrays that are prepared already, or serve with a newer version",
            ) from cause
        return [self._fact(item, known) if item.is_picture else None for item in asked]

    def _fact(self, item: Item, known: Mapping[str, TaskInfo]) -> TaskInfo:
        name = item.task
        if name is None and len(known) == 1:
            return next(iter(known.values()))
        if name is None or name not in known:
            raise InvalidRequest(
                "the request names no task" if name is None else "unknown task",
                where=self._address,
                wanted=f"one of {', '.join(known)}",
                found=name,
            )
        return known[name]

    def _name(self, deadline: Deadline) -> Steps[str]:
        """The model's name."""
        if self._model is None:
            ready = yield from self._call(Index(), deadline)
            names = bundles(ready)
            if len(names) != 1:
                raise UsageError(
                    "it is not said which model is asked" if names else "no model is ready",
                    where=self._address,
                    found=", ".join(names) or None,
                    do="name it: model=..." if names else None,
                )
            (self._model,) = names
        return self._model

    def _shape_of(self, deadline: Deadline) -> Steps[ModelFacts]:
        """The model's inputs and largest batch."""
        if self._shape is None:
            model = yield from self._name(deadline)
            self._shape = yield from self._call(Config(model), deadline)
        assert self._shape is not None
        return self._shape

    # ------------------------------------------------------------------ attempts

    def _deadline(self, limit_s: float | None) -> Deadline:
        return Deadline(self._deadline_s if limit_s is None else limit_s)

    def _call(self, call: Call, deadline: Deadline) -> Steps[Any]:
        """The reply to a call, asked again while that is allowed.

        Raises:
            UtuneError: The last attempt's error.
            DeadlineExceeded: No attempt was answered in time, or the next one could not be.
        """
        attempt, last = 1, None
        while True:
            left_s = deadline.require(0.0, self._address, last)
            try:
                return (yield Send(call, left_s))
            except Failure as failure:
                last = failure.error
                after_s, kind = failure.after_s, failure.kind
                cause = failure.__cause__
            left_s = deadline.left_s()
            if left_s is not None and left_s <= 0:
                raise deadline.exceeded(self._address, last.what) from cause
            if not self._retry.allows(attempt, kind, call.repeatable):
                raise last from cause
            pause_s = self._retry.wait_s(attempt, after_s)
            if left_s is not None and left_s <= pause_s:
                raise deadline.exceeded(self._address, last.what) from last
            yield Wait(pause_s)
            attempt += 1


def _fits(answer: Answer, task: TaskInfo | None) -> bool:
    """Whether an answer can be of the task as it is known."""
    if task is None:
        return True
    if not task.labels:
        return answer.label is None
    return answer.label in task.labels and answer.logits.shape == (len(task.labels),)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise UsageError(
            "the file cannot be read", where=path, found=cause.strerror or str(cause)
        ) from cause
