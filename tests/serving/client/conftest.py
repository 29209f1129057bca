"""Both clients behind one blocking face, a server that fails on purpose, and a stand-in for the tasks' model."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from utune_deploy.serving.client import AsyncClient, Client, Retry
from utune_deploy.serving.client.calls import Infer
from utune_deploy.serving.client.failures import Failure
from utune_deploy.serving.rejections import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUICK = Retry(attempts=4, first_s=0.01, longest_s=0.02)


class Awaited:
    """An `AsyncClient` in a loop of its own, as if it blocked."""

    def __init__(self, *arguments, **settings) -> None:
        self.client = AsyncClient(*arguments, **settings)
        self.loop = asyncio.new_event_loop()

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.client, name)
        return lambda *a, **k: self.loop.run_until_complete(verb(*a, **k))

    def put(self, wrap: Callable[[Any], Any]) -> None:
        self.client._transport = wrap(self.client._transport)

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.loop.run_until_complete(self.client.close())
        finally:
            self.loop.close()


class Blocking(Client):
    """A `Client` whose transport can be wrapped."""

    def put(self, wrap: Callable[[Any], Any]) -> None:
        self._transport = wrap(self._transport)


@pytest.fixture(params=["blocking", "async"])
def client_kind(request) -> Any:
    """The class of the client: both take the same settings."""
    return Blocking if request.param == "blocking" else Awaited


@pytest.fixture(params=["http", "grpc"])
def url(request) -> Callable[[Any], str]:
    """`url(addresses)` of one of the two fronts."""
    return lambda addresses: f"{request.param}://{getattr(addresses, request.param)}"


class Tasks:
    """A stand-in for the model NAME.tasks: what it is told, and a table that tests change."""

    def __init__(self, bundle) -> None:
        self.model = bundle.name + ".tasks"
        self.commands: list[dict[str, Any]] = []
        self.files: list[bytes] = []
        self.table = {
            task.name: {
                "name": task.name,
                "version": 1,
                "versions": [1],
                "labels": list(task.labels),
                "preprocessing": task.preprocessing.to_json(),
                "width": task.width,
                "resident": True,
                "pinned": False,
                "delta": task.delta,
            }
            for task in bundle.tasks
        }

    def answer(self, call: Infer) -> dict[str, np.ndarray]:
        assert all(array.shape == (1,) for array in call.inputs.values())
        command = json.loads(call.inputs["command"][0])
        self.commands.append(command)
        name, action = command.get("task"), command["action"]
        if "file" in call.inputs:
            self.files.append(call.inputs["file"][0])
            name = self.files[-1].decode()
            old = self.table.get(
                name, {**next(iter(self.table.values())), "versions": [], "name": name}
            )
            version = len(old["versions"]) + 1
            self.table[name] = {**old, "version": version, "versions": [*old["versions"], version]}
        elif name is not None and name not in self.table:
            raise Failure(InvalidRequest("unknown task", found=name))
        if action == "list":
            reply = {"tasks": list(self.table.values())}
        elif action == "remove":
            del self.table[name]
            reply = {"removed": name}
        else:
            changes = {
                "use": {"version": command.get("version")},
                "pin": {"pinned": True},
                "unpin": {"pinned": False},
            }
            self.table[name] = {**self.table[name], **changes.get(action, {})}
            reply = {"task": self.table[name]}
        return {"reply": np.array([json.dumps({"model": "tiny", **reply}).encode()], dtype=object)}

    def beside(self, transport: Any) -> Any:
        """The transport, with this model on the same server."""
        tasks = self

        class Both:
            def __init__(self) -> None:
                self.calls: list[Any] = []

            def send(self, call, limit_s):
                self.calls.append(call)
                if isinstance(call, Infer) and call.model == tasks.model:
                    return tasks.answer(call)
                return transport.send(call, limit_s)

            def close(self):
                return transport.close()

        class BothAsync(Both):
            async def send(self, call, limit_s):
                answered = super().send(call, limit_s)
                return answered if isinstance(answered, dict) else await answered

        self.seam = BothAsync() if asyncio.iscoroutinefunction(transport.send) else Both()
        return self.seam


@pytest.fixture
def tasks_of() -> type[Tasks]:
    return Tasks


OUTPUTS = {
    "logits": ("FP32", [1, 2], [0.0, 1.0]),
    "label": ("BYTES", [1, 1], ["dog"]),
    "score": ("FP32", [1, 1], [0.75]),
}
CONFIG = {
    "max_batch_size": 8,
    "input": [
        {"name": "images", "data_type": "TYPE_FP32", "dims": [2]},
        {"name": "task", "data_type": "TYPE_STRING", "dims": [1]},
    ],
}


class Stage:
    """An HTTP server whose answers to inference are scripted, and all else well.

    Attributes:
        script: What the next requests meet, one function of the handler each; then they are answered.
        bodies: The JSON heads of the inference requests.
        models: What the index names.
    """

    def __init__(self) -> None:
        self.script: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.bodies: list[dict[str, Any]] = []
        self.models = ["tiny", "tiny.all", "tiny.tasks", "pets"]
        self.let_go = threading.Event()

    @staticmethod
    def say(status: int, body: Any, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
        def act(handler: BaseHTTPRequestHandler) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)

        return act

    @staticmethod
    def reset(handler: BaseHTTPRequestHandler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        self.let_go.wait()
        handler.close_connection = True

    def cut(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"{")
        handler.close_connection = True

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        outputs = [
            {"name": name, "datatype": kind, "shape": shape, "data": data}
            for name, (kind, shape, data) in OUTPUTS.items()
        ]
        self.say(200, {"model_name": "tiny", "outputs": outputs})(handler)


@pytest.fixture
def stage() -> Iterator[Any]:
    with _staged() as made:
        yield made


@contextmanager
def _staged():
    made = Stage()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError, ValueError):  # a connection that a script closed
                super().handle()

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

        def do_GET(self) -> None:
            made.say(200, CONFIG)(self)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/index"):
                index = [{"name": name, "state": "READY"} for name in made.models]
                made.say(200, index)(self)
                return
            length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
            made.bodies.append(json.loads(body[:length]))
            act = made.script.pop(0) if made.script else made.answer
            act(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        made.server, made.url = server, f"http://127.0.0.1:{server.server_address[1]}"
        yield made
    finally:
        made.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()
