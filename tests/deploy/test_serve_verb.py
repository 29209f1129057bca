"""`serve`: every option reaches the server that is asked for, or is refused."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

from utune_deploy.serving.servers import server

if TYPE_CHECKING:
    from collections.abc import Callable

    from utune_deploy.export.bundle import Bundle

COMMON = (
    "--host", "127.0.0.1", "--http-port", 0, "--grpc-port", 0, "--metrics-port", 0, "--max-delay-ms", 1,
    "--timeout-ms", 100, "--max-queued", 64, "--max-task-queued", 32, "--weight", "lora=2", "--no-task-control",
    "--log-format", "json", "--threads", 1,
)  # fmt: skip


def _accepts(engine: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of the engine's function, bound to its signature as Python would."""
    module = server(engine)
    real = getattr(module, f"serve_{engine}")
    inner = {"ray": "running", "embedded": "running"}.get(engine)
    calls: list[dict[str, Any]] = []

    def called(*args: Any, **settings: Any) -> None:
        bound = inspect.signature(real).bind(*args, **settings).arguments
        if inner == "running" and engine == "ray":
            inspect.signature(module.running).bind(args[0], **bound.get("settings", {}))
        calls.append({**bound, **bound.pop("queueing", {}), **bound.pop("settings", {})})

    monkeypatch.setattr(module, f"serve_{engine}", called)
    return calls


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        ("embedded", ["--shared-memory", "--log-requests"]),
        ("triton", ["--shared-memory", "--aliases", "--otlp", "http://127.0.0.1:4318"]),
        ("ray", ["--ray-address", "auto", "--replicas", 2, "--max-replicas", 3]),
    ],
)
def test_every_option_reaches_its_server(
    engine: str, more: list[Any], bundles: Callable[[str], Bundle], cli: Any, tmp_path: Any, monkeypatch: Any
) -> None:  # fmt: skip
    if engine == "ray":
        pytest.importorskip("ray", reason="the extra [ray] is not installed")
    calls = _accepts(engine, monkeypatch)
    said = cli(
        "serve", bundles("inputs").path, "--engine", engine, *COMMON, *more,
        "--tasks", tmp_path / "kept", "--rows", 64,
    )  # fmt: skip
    assert said.code == 0, said.err
    (given,) = calls
    assert given["task_control"] is False
    assert given["keep"] == tmp_path / "kept"
    assert given["rows"] == 64
    assert given.get("aliases", False) is ("--aliases" in more)


@pytest.mark.parametrize(
    ("engine", "option", "sentence"),
    [
        ("embedded", ["--otlp", "http://127.0.0.1:4318"], "writes no traces"),
        ("ray", ["--otlp", "http://127.0.0.1:4318"], "writes no traces"),
        ("embedded", ["--aliases"], "by the task's own name"),
        ("triton", ["--log-requests"], "no line of ours"),
        ("ray", ["--shared-memory"], "do not reach replicas"),
        ("embedded", ["--replicas", 2], "of --engine ray"),
        ("triton", ["--ray-address", "auto"], "of --engine ray"),
        ("embedded", ["--weight", "lora=-1"], "weight"),
    ],
)
def test_an_option_of_another_server_is_refused(
    engine: str, option: list[Any], sentence: str, bundles: Callable[[str], Bundle], cli: Any
) -> None:
    said = cli("serve", bundles("inputs").path, "--engine", engine, *option)
    assert said.code == 2
    assert sentence in said.err


def test_a_folder_of_tasks_that_another_server_has_is_refused(
    bundles: Callable[[str], Bundle], cli: Any, tmp_path: Any
) -> None:
    from utune_deploy.serving.tasks.claim import claim

    with claim(tmp_path / "kept"):
        said = cli(
            "serve", bundles("inputs").path, "--engine", "embedded", "--threads", 1,
            "--http-port", 0, "--grpc-port", 0, "--tasks", tmp_path / "kept",
        )  # fmt: skip
    assert said.code == 2
    assert "another server keeps its tasks there" in said.err


def test_weights_of_tasks_that_are_not_there(
    bundles: Callable[[str], Bundle], cli: Any, monkeypatch: Any
) -> None:
    """Such a task may come later, or never."""
    calls = _accepts("embedded", monkeypatch)
    said = cli("serve", bundles("inputs").path, "--weight", "nobody=2", "--rate", "lora=5")
    assert said.code == 0
    assert "weights and rates of nobody count once" in said.err
    (given,) = calls
    assert given["weights"] == {"nobody": 2.0}
    said = cli("serve", bundles("constants").path, "--rate", "nobody=2")
    assert said.code == 2
    assert "nobody; its tasks are constants" in said.err
    assert len(calls) == 1
