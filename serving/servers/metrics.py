"""The port that Prometheus reads, apart from the requests' own as Triton has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from ..watching.metrics import exposition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request

    from ..watching.metrics import Model


def metrics_app(models: Sequence[Model]) -> Starlette:
    """`GET /metrics` over the models' counters."""

    async def metrics(request: Request) -> Response:
        body, kind = exposition(models, request.headers.get("Accept", ""))
        return Response(body, headers={"Content-Type": kind})

    return Starlette(routes=[Route("/metrics", metrics)])
