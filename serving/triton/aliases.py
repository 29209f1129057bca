"""The alias of each task, NAME.TASK, which comes and goes with the task while Triton serves it (layout `hot`).

The alias puts the number of its slot where a task's name is expected, and NAME's process knows whose slot that is. So a
task that comes needs one new folder, see `alias_folder`, and no model is loaded anew.

A folder comes and goes whole, by a rename. What a killed process left behind is put right by the next one's start. A slot
is given out again only when all others were: what Triton has not yet forgotten leads nowhere, never to another task.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .alias_folder import (
    ABOUT,
    CONFIG,
    FIRST_STEP,
    LABELS,
    MARK,
    NAME,
    SLOT_HERE,
    TASK_HERE,
    TEMPLATE,
    about_json,
    free_slot,
    labels_text,
    read_about,
    read_last,
    read_slots,
    renew,
)
from .tritonserver import control_mode, is_listening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..registry import Registry
    from ..tasks.versions import Version

log = logging.getLogger(__name__)

SETTLING_SECONDS = 120.0
"""Longest that changes to what was there before wait for Triton, which may still be reading it."""

RESCAN_SECONDS = 1.0
"""How often the repository is read again for a slot that nobody knows, where nothing seems to have changed in it."""
_WAIT_SECONDS = 0.1

NOT_READ = "Triton reads its repository at its start alone (--model-control-mode=none)"


class Aliases:
    """The aliases of one version of NAME, in the one process of its that owns the tasks. Safe to call from several threads."""

    def __init__(
        self,
        triton: Any,
        registry: Registry,
        model: Path,
        version: str,
        slots: int,
        *,
        kept: bool,
        mode: str | None = None,
    ) -> None:
        """Read what aliases there are; `start` writes.

        Args:
            triton: The module `triton_python_backend_utils`.
            registry: The tasks.
            model: The folder of NAME in the repository.
            version: The version of NAME that this process runs.
            slots: How many NAME.task_names has.
            kept: Whether tasks that came while running outlive this process.
            mode: How Triton comes by its models; None reads it off its command line.
        """
        self._triton = triton
        self._registry = registry
        self._name = registry.name
        self._model = model
        self._repository = model.parent
        self._version = version
        self._count = slots
        self._kept = kept
        self._mode = mode or control_mode(os.getppid())
        self._reads = self._mode in ("poll", "explicit")  # what is written while it runs
        self._shipped = {task.name for task in registry.bundle.tasks}
        self._missing: dict[str, str] = {}  # why a task has no alias
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._read = self._written()
        self._slots = read_slots(self._repository, self._name)
        self._said = {f"{MARK}{slot}": task for slot, task in self._slots.items()}
        self._last = max([*self._slots, read_last(model / version)])
        self._began_as = self._program()
        self._is_late = False  # whether Triton was up before this process
        self._looked = time.monotonic()

    def start(self) -> None:
        """Write the aliases that lack; put the others right when Triton has read them. The end of `initialize`.

        Triton may be about to load what was there before, and what vanishes then is a model that fails.
        """
        self._is_late = is_listening(os.getppid())
        with self._lock:
            for task in self._registry.versions:
                if not self._folder(task).exists():
                    self._settle(task, load=False)
        self._thread = threading.Thread(target=self._put_right, name="utune-aliases", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Start nothing more."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_WAIT_SECONDS * 10)

    def follow(self, task: str) -> None:
        """Bring a task's alias to what the task is now. What hinders it is said by `entry`, and raised by nothing."""
        with self._lock:
            self._settle(task, load=True)

    def entry(self, task: str) -> dict[str, str | None]:
        """A task's alias, or why it has none."""
        why = self._missing.get(task)
        return {"alias": None if why else self._alias(task), "no_alias": why}

    def tasks_of(self, names: Sequence[str]) -> list[str]:
        """The tasks of a request, in which an alias has put its slot."""
        if any(name not in self._said for name in names if name.startswith(MARK)):
            self._look_again()
        return [self._said.get(name, name) for name in names]

    def _look_again(self) -> None:
        """Take up slots that somebody else gave out, another instance or who wrote the repository anew."""
        with self._lock:
            written, now = self._written(), time.monotonic()
            if written == self._read and now - self._looked < RESCAN_SECONDS:
                return
            self._read, self._looked = written, now
            for slot, task in read_slots(self._repository, self._name).items():
                self._give(slot, task)

    def _written(self) -> int:
        """When a folder last came to the repository or went, in ticks of its file system."""
        return self._repository.stat().st_mtime_ns

    def _give(self, slot: int, task: str) -> None:
        self._slots[slot] = task
        self._said[f"{MARK}{slot}"] = task

    def _settle(self, task: str, *, load: bool) -> None:
        before = self._missing.pop(task, None)
        version = self._registry.versions.get(task)
        try:
            why = self._remove(task) if version is None else self._write(task, version, load=load)
        except OSError as error:
            why = f"its folder cannot be written: {error.strerror or error}"
        except Exception as error:  # the task is served all the same
            log.exception("an alias could not be written")
            why = f"its folder could not be written: {error!r}"
        if why is None and before == NOT_READ:
            why = NOT_READ  # until Triton starts again, and we with it
        if why is None:
            return
        if version is not None:
            self._missing[task] = why
        log.warning(f"the alias {self._alias(task)} is not as its task is: {why}")

    def _write(self, task: str, version: Version, *, load: bool) -> str | None:
        """Have the alias there; why it is not."""
        if not NAME.fullmatch(task):
            return "a task of this name cannot be a model's folder"
        if (other := self._other()) is not None:
            return f"{other} has the aliases"
        folder = self._folder(task)
        is_there = folder.exists()
        if is_there and not self._is_own(folder, task):
            return f"another model is called {self._alias(task)}"
        if not self._reads and not is_there and not self._kept:
            return NOT_READ
        slot = self._slot_of(task)
        if slot is None:
            return f"all {self._count} slots are taken; write the repository again"
        files = self._files(task, slot, version)
        if is_there:
            changed = renew(folder, files, version.number)
        else:
            changed = True
            with self._aside() as aside:
                made = aside / folder.name
                (made / str(version.number)).mkdir(parents=True)
                for name, text in files.items():
                    (made / name).write_text(text)
                made.rename(folder)
        if changed and (load or not self._reads):
            return self._load(task)
        return None

    def _load(self, task: str) -> str | None:
        """Have Triton read the folder, where it does not do so by itself; why it does not.

        A call of the backend's that fails may end the whole tritonserver (2.51), so only what will go well is tried.
        """
        if self._mode == "poll":
            return None
        if not self._reads:
            return NOT_READ
        if not self._triton.is_model_ready(first := f"{self._name}{FIRST_STEP}"):
            return f"{first} is not loaded (--model-control-mode=explicit): load it, then the alias"
        self._triton.load_model(self._alias(task))
        return None

    def _remove(self, task: str) -> str | None:
        folder = self._folder(task)
        if not self._is_own(folder, task) or self._other() is not None:
            return None
        alias = self._alias(task)
        if self._mode == "explicit" and self._triton.is_model_ready(alias):
            self._triton.unload_model(alias)
        with self._aside() as aside:
            folder.rename(aside / folder.name)
        return None if self._reads else NOT_READ

    def _put_right(self) -> None:
        """What `start` left for later."""
        # A load, in which Triton keeps Python's lock, waits for the load before it. That may be this model's own, which
        # needs the lock as long as `initialize` has not returned.
        if self._closing.wait(_WAIT_SECONDS):
            return
        try:
            if not self._wait(lambda: is_listening(os.getppid())) and self._mode == "explicit":
                return
            if self._mode == "explicit":
                self._wait(lambda: self._triton.is_model_ready(self._name))
            with self._lock:
                self._sweep()
            for task in {**dict.fromkeys(self._slots.values()), **self._registry.versions}:
                if self._closing.is_set():
                    return
                with self._lock:
                    self._settle(task, load=task in self._shipped)
                    if task not in self._missing and self._is_unknown(task):
                        self._load_came(task)
        except Exception:
            log.exception("the aliases could not be put right")

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Whether it came true before the end of the wait, or of the model."""
        deadline = time.monotonic() + SETTLING_SECONDS
        while not (there := condition()) and time.monotonic() < deadline:
            if self._closing.wait(_WAIT_SECONDS):
                return False
        return there

    def _is_unknown(self, task: str) -> bool:
        """Whether Triton's command line cannot have known of a task's alias, nor anybody have loaded it since."""
        if task not in self._shipped:
            return True
        return self._is_late and not self._triton.is_model_ready(self._alias(task))

    def _load_came(self, task: str) -> None:
        """Load an alias that nobody else loads."""
        if self._mode != "explicit" or task not in self._registry.versions:
            return
        if (why := self._load(task)) is not None:
            self._missing[task] = why
            log.warning(f"the alias {self._alias(task)} is not served: {why}")

    def _slot_of(self, task: str) -> int | None:
        """The slot that a task has, or gets; it is its own from then on."""
        slot = next((slot for slot, name in self._slots.items() if name == task), None)
        if slot is not None and slot < self._count:
            return slot
        taken = {
            slot: name
            for slot, name in self._slots.items()
            if name in self._registry.versions or self._folder(name).exists()
        }
        slot = free_slot(taken, self._count, self._last)
        if slot is not None:
            self._last = slot
            self._give(slot, task)
        return slot

    def _files(self, task: str, slot: int, version: Version) -> dict[str, str]:
        template = (self._model / self._version / TEMPLATE).read_text()
        config = template.replace(TASK_HERE, task).replace(SLOT_HERE, str(slot))
        labels = {LABELS: labels_text(version.labels)} if version.labels else {}
        return {**labels, ABOUT: about_json(self._name, task, slot), CONFIG: config}

    def _other(self) -> str | None:
        """What will be loaded in this process's place and has the aliases; None where nothing was written since."""
        numbers = (int(path.name) for path in self._model.iterdir() if path.name.isdecimal())
        if (newest := str(max(numbers, default=0))) != self._version:
            return f"version {newest} of {self._name}"
        is_anew = self._program() != self._began_as
        return f"{self._name}, which was written anew," if is_anew else None

    def _program(self) -> tuple[int, int] | None:
        """What tells the folder that this process was started from from one in its place."""
        try:
            status = (self._model / self._version / TEMPLATE).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _alias(self, task: str) -> str:
        return f"{self._name}.{task}"

    def _folder(self, task: str) -> Path:
        return self._repository / self._alias(task)

    def _is_own(self, folder: Path, task: str) -> bool:
        about = read_about(folder)
        return about is not None and (about["of"], about["task"]) == (self._name, task)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[Path]:
        """A folder beside the models, to build in and to throw away in."""
        folder = self._repository / f"{self._working}{os.getpid()}"
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _working(self) -> str:
        return f".{self._name}.aliases-"

    def _sweep(self) -> None:
        """Remove what processes left that were killed."""
        for path in self._repository.glob(f"{self._working}*"):
            if not Path(f"/proc/{path.name.removeprefix(self._working)}").exists():
                shutil.rmtree(path, ignore_errors=True)
