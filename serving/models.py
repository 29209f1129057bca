"""What the servers carry: models by name and version, whoever stands behind them.

HTTP and gRPC know a model by this protocol alone. A bundle brings several: NAME, one for each of its tasks,
NAME.tasks for their life, NAME.all where an engine answers every task at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..merge.errors import UsageError
from .rejections import UnknownModel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

    from .tensors import InputTensor, OutputRequest, OutputTensor


@dataclass(frozen=True)
class Asked:
    """One inference request, from the wire.

    Attributes:
        inputs: Its tensors.
        outputs: What it wants back; none for everything.
        version: The model's version; empty for the one in use.
        priority: 1 comes before 2; 0 is the default.
        timeout_us: Microseconds that it may wait in a queue; 0 for the server's own limit.
        parameters: Everything else that it said.
    """

    inputs: Sequence[InputTensor]
    outputs: Sequence[OutputRequest] = ()
    version: str = ""
    priority: int = 0
    timeout_us: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Model(Protocol):
    """One name that requests may address."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def versions(self) -> tuple[str, ...]:
        """Those that may be asked for; the last is the one in use."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a request would be taken."""
        ...

    def metadata(self, version: str) -> dict[str, Any]:
        """What `GET /v2/models/NAME` says."""
        ...

    def config(self, version: str) -> dict[str, Any]:
        """Its configuration in the fields of Triton's `ModelConfig`."""
        ...

    def statistics(self) -> list[dict[str, Any]]:
        """Of each version, in the fields of the statistics extension."""
        ...

    async def infer(self, asked: Asked) -> list[OutputTensor]:
        """Answer a request.

        Raises:
            UtuneError: It cannot be answered; see `rejections`.
        """
        ...


@runtime_checkable
class Decoupled(Protocol):
    """What a model has beside `Model` when a request may bring any number of answers.

    Only gRPC's stream can carry them; `Model.infer` of such a model refuses.
    """

    def stream(self, asked: Asked) -> AsyncGenerator[list[OutputTensor]]:
        """Answer a request, one list of tensors per answer.

        Raises:
            UtuneError: See `Model.infer`.
        """
        ...


class Repository(Protocol):
    """The models that there are, which may change."""

    def find(self, name: str) -> Model | None:
        """The model of that name."""
        ...

    def models(self) -> Iterable[Model]:
        """All of them, in a fixed order."""
        ...

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model, or load it anew, as the repository extension asks.

        Raises:
            UtuneError: It cannot be.
        """
        ...

    async def unload(self, name: str) -> None:
        """Take a model away.

        Raises:
            UtuneError: It cannot be.
        """
        ...


class Fixed:
    """A repository whose models are there as long as the server is."""

    def __init__(self, *models: Model) -> None:
        """Of these."""
        self._models = {model.name: model for model in models}

    def find(self, name: str) -> Model | None:
        """See `Repository.find`."""
        return self._models.get(name)

    def models(self) -> Iterable[Model]:
        """See `Repository.models`."""
        return self._models.values()

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """See `Repository.load`."""
        require_model(self, name)
        raise UsageError("the models of this server do not change", where=name)

    async def unload(self, name: str) -> None:
        """See `Repository.unload`."""
        await self.load(name, {})


def require_model(repository: Repository, name: str, version: str = "") -> Model:
    """The model of that name that has that version.

    Raises:
        UnknownModel: There is none.
    """
    model = repository.find(name)
    if model is None or (version and version not in model.versions):
        said = f"'{name}' version {version}" if version else f"'{name}'"
        raise UnknownModel(
            f"Request for unknown model: {said} is not found",  # Triton's words: its clients look for them
            wanted=f"version {' or '.join(model.versions)}"
            if model
            else "see /v2/repository/index",
        )
    return model


def index(repository: Repository, *, only_ready: bool = False) -> list[dict[str, str]]:
    """What the repository's index says, every version of every model."""
    return [
        {"name": model.name, "version": version, "state": "READY" if model.ready else "UNAVAILABLE"}
        for model in repository.models()
        for version in model.versions
        if model.ready or not only_ready
    ]
