"""A client of the servers: pictures or arrays in, labels and scores out, over HTTP or gRPC.

    with Client("http://127.0.0.1:8000") as client:
        client.ask("cat.jpg", task="pets").label

`Client` blocks, `AsyncClient` awaits; both have the same verbs, each written once in `verbs`. Needs neither
torch nor a runtime.
"""

from __future__ import annotations

from .aio import AsyncClient
from .answers import Answer, TaskInfo
from .blocking import Client
from .retry import Retry

__all__ = ["Answer", "AsyncClient", "Client", "Retry", "TaskInfo"]
