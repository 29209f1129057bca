"""Engines kept as ONNX Runtime prepares them: the same answers, made once, mapped, and never another's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from utune_deploy.export.engine import Device
from utune_deploy.export.targets import onnxruntime as target
from utune_deploy.export.targets import prepared as room
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 2048
WEIGHT_BYTES = 4 * WIDTH * WIDTH


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """Two square products of 16 MiB each, whose weights ONNX Runtime packs."""
    noise = np.random.default_rng(0)
    weights = [noise.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH for _ in range(2)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["logits"])],
        "products", [value("images", TensorProto.FLOAT, ["batch", WIDTH])],
        [value("logits", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, "ab", strict=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    helper.set_model_props(model, {"utune.identity": "me"})
    onnx.save(model, tmp_path / "engine.onnx")
    return tmp_path / "engine.onnx"


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(threads=1, prepared=tmp_path / "prepared")


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, WIDTH), np.float32)


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The engines that are prepared from here on."""
    made: list[Path] = []
    inner = room._prepare

    def counted(model: Path, *rest: Any) -> None:
        made.append(model)
        inner(model, *rest)

    monkeypatch.setattr(room, "_prepare", counted)
    return made


def entries(device: Device) -> list[Path]:
    assert device.prepared is not None
    return sorted(device.prepared.iterdir())


def test_a_prepared_engine_answers_bit_for_bit_and_is_made_once(
    engine: Path, device: Device, rows: np.ndarray, preparations: list[Path]
) -> None:
    plain = OnnxRuntimeSession(engine, replace(device, prepared=None))
    for _ in range(2):
        session = OnnxRuntimeSession(engine, device)
        np.testing.assert_array_equal(session.run(rows), plain.run(rows))
        assert session.metadata == {"utune.identity": "me"}
    assert preparations == [engine]
    (entry,) = entries(device)
    assert {file.name for file in entry.iterdir()} == {"model.onnx", "weights.bin", "entry.json"}
    assert (entry / "weights.bin").stat().st_size >= 2 * WEIGHT_BYTES
    assert (entry / "model.onnx").stat().st_size < WEIGHT_BYTES / 100


def test_the_weights_of_a_prepared_engine_are_read_where_they_lie_in_the_file(
    engine: Path, device: Device, rows: np.ndarray
) -> None:
    if not psutil.LINUX:
        pytest.skip("what is mapped is read from Linux' smaps")
    session = OnnxRuntimeSession(engine, device)
    session.run(rows)
    (entry,) = entries(device)
    weights = str(entry / "weights.bin")
    maps = [m for m in psutil.Process().memory_maps(grouped=False) if m.path == weights]
    assert sum(m.rss for m in maps) >= 2 * WEIGHT_BYTES
    assert sum(m.anonymous for m in maps) == 0


@pytest.mark.parametrize("other", ["engine", "runtime", "processor", "settings"])
def test_what_was_prepared_from_or_for_something_else_is_not_opened(
    other: str, engine: Path, device: Device, rows: np.ndarray, preparations: list[Path], monkeypatch: Any
) -> None:  # fmt: skip
    OnnxRuntimeSession(engine, device)
    settings = {}
    if other == "engine":
        model = onnx.load(engine)
        helper.set_model_props(model, {"utune.identity": "another"})
        onnx.save(model, engine)
    elif other == "runtime":
        monkeypatch.setattr(room.ort, "__version__", "0.1")
    elif other == "processor":
        monkeypatch.setattr(room, "_processor", lambda: "an abacus")
    else:
        settings = {"as_written": True}
    session = OnnxRuntimeSession(engine, device, **settings)
    assert preparations == [engine, engine]
    assert len(entries(device)) == 2
    if other == "engine":
        assert session.metadata == {"utune.identity": "another"}


@pytest.mark.parametrize("wound", ["weights.bin", "model.onnx", "entry.json", "malformed"])
def test_an_entry_that_is_not_whole_is_made_again(
    wound: str, engine: Path, device: Device, rows: np.ndarray, preparations: list[Path]
) -> None:
    answer = OnnxRuntimeSession(engine, device).run(rows)
    (entry,) = entries(device)
    if wound == "malformed":
        (entry / "entry.json").write_text('{"bytes": [1]}')
    else:
        (entry / wound).write_bytes((entry / wound).read_bytes()[:-100])
    np.testing.assert_array_equal(OnnxRuntimeSession(engine, device).run(rows), answer)
    assert preparations == [engine, engine]
    assert entries(device) == [entry]


def test_several_that_open_at_once_get_one_entry(
    engine: Path, device: Device, rows: np.ndarray
) -> None:
    wanted = OnnxRuntimeSession(engine, replace(device, prepared=None)).run(rows)
    with ThreadPoolExecutor(4) as pool:
        sessions = list(pool.map(lambda _: OnnxRuntimeSession(engine, device), range(4)))
    assert len(entries(device)) == 1
    for session in sessions:
        np.testing.assert_array_equal(session.run(rows), wanted)


def test_a_folder_that_cannot_hold_it_is_a_usage_error(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match="cannot be kept here") as caught:
        OnnxRuntimeSession(engine, Device(prepared=tmp_path / "file"))
    assert str(tmp_path / "file") in str(caught.value)


def test_packed_weights_that_begin_beside_a_boundary_are_not_kept(
    engine: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No processor has registers as wide as this one."""
    monkeypatch.setattr(room, "ALIGNMENT", 1 << 40)
    with pytest.raises(
        IncompatibleArtefact, match="where the processor cannot read them"
    ) as caught:
        OnnxRuntimeSession(engine, device)
    assert "2 that are none" in str(caught.value)
    assert not entries(device)


def test_an_engine_that_cannot_be_loaded_leaves_nothing(tmp_path: Path, device: Device) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(IncompatibleArtefact, match="cannot prepare") as caught:
        OnnxRuntimeSession(tmp_path / "broken.onnx", device)
    assert "broken.onnx" in str(caught.value)
    assert not entries(device)


def test_a_digest_that_is_known_is_not_taken_again(
    engine: Path, device: Device, monkeypatch: Any
) -> None:
    monkeypatch.setattr(target, "sha256_of", lambda _: pytest.fail("the engine was read once more"))
    OnnxRuntimeSession(engine, device, digest="0" * 64)
    (entry,) = entries(device)
    assert json.loads((entry / "entry.json").read_text())["engine"] == "0" * 64


def test_models_in_memory_and_profiles_are_prepared_anew(
    engine: Path, device: Device, tmp_path: Path, preparations: list[Path]
) -> None:
    OnnxRuntimeSession(engine.read_bytes(), device)
    OnnxRuntimeSession(engine, device, profile=tmp_path)
    assert not preparations


def test_memory_without_an_arena_changes_no_answer(engine: Path, rows: np.ndarray) -> None:
    kept, given = (OnnxRuntimeSession(engine, Device(threads=1, arena=a)) for a in (True, False))
    np.testing.assert_array_equal(kept.run(rows), given.run(rows))
    options = target._options(Device(arena=False), as_written=False)
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (False, False)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (Device("cuda", prepared=Path("x")), "the CPU provider's"),
        (Device("cuda", arena=False), "the CPU provider's"),
        (Device(memory_mb=100), "the CUDA provider's"),
    ],
    ids=str,
)
def test_options_of_the_other_provider_are_refused(engine: Path, device: Device, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        OnnxRuntimeSession(engine, device)


def test_a_limit_of_device_memory_is_in_the_provider_s_own_words() -> None:
    options: Callable[..., dict[str, str]] = target._cuda
    assert options(Device("cuda", memory_mb=2), tf32=False, cuda_graph=False) == {
        "use_tf32": "0", "enable_cuda_graph": "0",
        "gpu_mem_limit": "2097152", "arena_extend_strategy": "kSameAsRequested",
    }  # fmt: skip
