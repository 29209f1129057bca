"""The way from NAME.tasks to NAME's own process, where Triton runs each model in one of its own.

A socket of this machine in a folder that only its owner may enter, with a key beside it. What goes over it is JSON
and a packed task's bytes, never pickled objects: whoever finds a way to the socket has found no way to run code.

    command   {"command": ..., "file": true or false}, then the file's bytes
    reply     {"reply": ...} or {"code": one of `triton.errors`, "line": ...}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import stat
import tempfile
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...merge.errors import UsageError, UtuneError
from ..rejections import one_line
from ..triton.errors import INTERNAL, code_of

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

KEY_BYTES = 32


class Refused(Exception):
    """What the other side says instead of a reply.

    Attributes:
        code: One of `triton.errors`.
    """

    def __init__(self, code: str, line: str) -> None:
        super().__init__(line)
        self.code = code


def address(folder: Path | None, model: str, version: str) -> Path:
    """The socket of one version of a model.

    Args:
        folder: None for one of the server that both processes were started by.
        model: Its name.
        version: Its version.
    """
    if folder is None:
        folder = Path(tempfile.gettempdir()) / f"utune-{os.getuid()}-{os.getppid()}"
    # A socket's path has room for about a hundred bytes, and names are longer than that at times.
    return folder / f"{hashlib.sha256(model.encode()).hexdigest()[:16]}-{version}"


class TaskLink:
    """The end in the model's process; `close` takes nothing new and finishes what runs."""

    def __init__(
        self, where: Path, run: Callable[[dict[str, Any], bytes | None], dict[str, Any]]
    ) -> None:
        """Listen.

        Args:
            where: The socket.
            run: Carries out one command with its file; called in several threads.

        Raises:
            UsageError: The folder is somebody else's, or others may enter it; or its path is too long.
        """
        self._where = where
        self._run = run
        _make_private(where.parent)
        _sweep(where)
        # A model that is loaded anew runs in two processes for a while, so each has a socket of its own. The name
        # that is known leads to the newer one's.
        self._own = where.with_name(f"{where.name}.{os.getpid()}")
        for stale in (self._own, _key_of(self._own)):
            stale.unlink(missing_ok=True)
        key = secrets.token_bytes(KEY_BYTES)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(_key_of(self._own), flags, 0o600), "wb") as file:
            file.write(key)
        try:
            self._listener = Listener(str(self._own), family="AF_UNIX", authkey=key)
        except OSError as cause:
            raise UsageError(
                "the socket cannot be made",
                where=self._own,
                found=cause.strerror or str(cause),
                do="name a folder with a shorter path",
            ) from cause
        link = self._own.with_suffix(".new")
        link.unlink(missing_ok=True)
        link.symlink_to(self._own.name)
        link.replace(where)
        self._closing = False
        self._runs: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, name="utune-tasks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """See the class."""
        self._closing = True
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as wake:
            wake.connect(str(self._own))  # `accept` returns; nobody waits for its greeting
        self._thread.join()
        self._listener.close()
        _key_of(self._own).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if self._where.readlink() == Path(self._own.name):
                self._where.unlink()
        with contextlib.suppress(OSError):  # another model's socket is still there
            self._where.parent.rmdir()
        with self._lock:
            runs = list(self._runs)
        for thread in runs:
            thread.join()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):  # the other side's affair
                continue
            thread = threading.Thread(target=self._answer, args=(connection,), daemon=True)
            with self._lock:
                self._runs.add(thread)
            thread.start()

    def _answer(self, connection: Connection) -> None:
        try:
            with connection, contextlib.suppress(OSError, EOFError):
                head = json.loads(connection.recv_bytes())
                file = connection.recv_bytes() if head["file"] else None
                connection.send_bytes(json.dumps(self._reply(head["command"], file)).encode())
        finally:
            with self._lock:
                self._runs.discard(threading.current_thread())

    def _reply(self, command: dict[str, Any], file: bytes | None) -> dict[str, Any]:
        try:
            return {"reply": self._run(command, file)}
        except UtuneError as error:
            return {"code": code_of(error), "line": one_line(error)}
        except Exception as mistake:
            log.exception("a command failed")
            return {"code": INTERNAL, "line": f"the server failed by a mistake: {mistake!r}"}


def ask(where: Path, command: dict[str, Any], file: bytes | None = None) -> dict[str, Any]:
    """Have a command carried out in the model's process.

    Raises:
        Refused: It was not; or the process is not there, or ended meanwhile.
    """
    try:
        own = where.with_name(str(where.readlink()))
        connection = Client(str(own), family="AF_UNIX", authkey=_key_of(own).read_bytes())
    except (OSError, EOFError, AuthenticationError) as cause:
        raise Refused("UNAVAILABLE", "the model of these tasks is not ready, or stops") from cause
    try:
        with connection:
            connection.send_bytes(
                json.dumps({"command": command, "file": file is not None}).encode()
            )
            if file is not None:
                connection.send_bytes(file)
            reply = json.loads(connection.recv_bytes())
    except (OSError, EOFError) as cause:  # it may have been carried out: nobody is to try again
        raise Refused(INTERNAL, "the model's process ended before it had replied") from cause
    if "reply" not in reply:
        raise Refused(reply["code"], reply["line"])
    return reply["reply"]


def _key_of(where: Path) -> Path:
    return where.with_name(f"{where.name}.key")


def _sweep(where: Path) -> None:
    """Remove what processes left here that were killed."""
    for path in where.parent.glob(f"{where.name}.*"):
        number = path.name[len(where.name) + 1 :].partition(".")[0]
        if not (number.isdecimal() and Path(f"/proc/{number}").exists()):
            path.unlink(missing_ok=True)


def _make_private(folder: Path) -> None:
    """Make a folder that its owner alone may enter.

    Raises:
        UsageError: It is there, and is not like that.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if (
        not stat.S_ISDIR(facts.st_mode)
        or facts.st_uid != os.getuid()
        or stat.S_IMODE(facts.st_mode) & 0o077
    ):
        raise UsageError(
            "the folder of the sockets is not this user's alone",
            where=folder,
            wanted=f"a folder of user {os.getuid()} with mode 700",
            found=f"user {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o}",
            do="remove it, or name another one",
        )
