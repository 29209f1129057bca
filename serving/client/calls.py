"""What a client asks a server, and what it is told, before and after any transport."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ..registry import ALL
from ..tasks.commands import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Infer:
    """An inference request.

    Attributes:
        model: The model's name.
        inputs: `[n, ...]` by name; float32, int64, or object holding UTF-8 bytes.
        priority: As the protocol's extension has it; 0 is the model's default.
        repeatable: Whether asking twice does no more than asking once.
    """

    model: str
    inputs: Mapping[str, NDArray[Any]]
    priority: int = 0
    repeatable: bool = True


@dataclass(frozen=True)
class Config:
    """A question for a model's configuration."""

    model: str
    repeatable: bool = field(default=True, init=False)


@dataclass(frozen=True)
class Index:
    """A question for the names of the models that are ready."""

    repeatable: bool = field(default=True, init=False)


Call: TypeAlias = "Infer | Config | Index"


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says. The reply to `Config`.

    Attributes:
        max_batch: Most rows of one request; at least 1.
        inputs: The protocol's datatype and the sizes of a row, by input.
        hands_over: Triton's statistics of it end where our service takes a request over.
    """

    max_batch: int
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    hands_over: bool = False


Reply: TypeAlias = "dict[str, NDArray[Any]] | ModelFacts | tuple[str, ...]"
"""Of `Infer` the outputs by name, of `Config` the facts, of `Index` the names."""


def model_facts(config: Mapping[str, Any]) -> ModelFacts:
    """The facts in the fields of Triton's `ModelConfig`.

    Raises:
        KeyError, TypeError, ValueError: They are not those fields.
    """
    return ModelFacts(
        max_batch=max(int(config["max_batch_size"]), 1),
        inputs={
            entry["name"]: (
                str(entry["data_type"]).removeprefix("TYPE_").replace("STRING", "BYTES"),
                tuple(int(size) for size in entry["dims"]),
            )
            for entry in config["input"]
        },
        hands_over=config.get("backend") == "python" and "identity" in config.get("parameters", {}),
    )


def ready_models(index: Any) -> tuple[str, ...]:
    """The names in a repository index whose model answers, each once.

    Raises:
        KeyError, TypeError: It is no index.
    """
    return tuple(
        dict.fromkeys(
            entry["name"] for entry in index if entry.get("state", "READY") in ("READY", "")
        )
    )


def bundles(ready: Iterable[str]) -> list[str]:
    """Those of the ready models that are a bundle.

    Every task is a model too: where tasks can be listed, the bundle is the one that lists them.
    """
    names = list(ready)
    listing = [name.removesuffix(TASKS) for name in names if name.endswith(TASKS)]
    return listing or [name for name in names if not name.endswith(ALL)]
