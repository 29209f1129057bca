"""What a target promises, and what ONNX Runtime does instead if it is let."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from utune_deploy.export.engine import Device
from utune_deploy.export.targets import target
from utune_deploy.export.targets.onnxruntime import PROVIDERS
from utune_deploy.merge.errors import IncompatibleArtefact, MissingDependency, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TASKS = 3


@pytest.fixture
def opens() -> Callable[..., Any]:
    """`open_session` of the target that runs ONNX files as they are."""
    return target("onnxruntime").open_session


def expected(bank: dict[str, np.ndarray], images: np.ndarray, task: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), 1, -1)
    return (flat @ bank["bank/head/weight"][task] + bank["bank/head/bias"][task])[:, 0]


def loads(provider: str, engine: bytes) -> bool:
    """Whether ONNX Runtime itself really gets this provider here."""
    if PROVIDERS[provider] not in ort.get_available_providers():
        return False
    ort.set_default_logger_severity(4)
    session = ort.InferenceSession(engine, providers=[PROVIDERS[provider]])
    return session.get_providers()[0] == PROVIDERS[provider]


def test_a_target_outside_the_table_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown engine target") as caught:
        target("abacus")
    assert caught.value.exit_code == 2
    assert "onnxruntime" in str(caught.value)


def test_rows_answer_with_their_own_task(opens, tiny_engine, tiny_bank, pictures) -> None:
    bank = tiny_bank(TASKS)
    session = opens(tiny_engine(bank, {"utune.identity": "me"}), Device(threads=1))
    assert session.provider == "CPUExecutionProvider"
    assert session.metadata == {"utune.identity": "me"}
    for batch in (1, 2, 3, 17):
        images, task = pictures(batch), np.arange(batch) % TASKS
        found = session.run(images, task)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected(bank, images, task), rtol=0, atol=1e-5)


def test_an_engine_opens_from_a_path(
    opens, tiny_engine, tiny_bank, pictures, tmp_path: Path
) -> None:
    bank = tiny_bank(TASKS)
    (tmp_path / "model.onnx").write_bytes(tiny_engine(bank))
    session = opens(tmp_path / "model.onnx")
    images, task = pictures(2), np.array([2, 0])
    np.testing.assert_array_equal(
        session.run(images, task), opens(tiny_engine(bank)).run(images, task)
    )


def test_images_need_not_be_contiguous(opens, tiny_engine, tiny_bank, pictures) -> None:
    session = opens(tiny_engine(tiny_bank(TASKS)))
    images, task = pictures(4), np.array([0, 9, 1, 9, 2, 9, 0, 9])[::2]
    strided = np.asfortranarray(images)
    np.testing.assert_array_equal(session.run(strided, task), session.run(images, task.copy()))


def test_rows_outside_the_bank_answer_nan_and_their_neighbours_do_not_notice(
    opens, tiny_engine, tiny_bank, pictures
) -> None:
    session = opens(tiny_engine(tiny_bank(TASKS)))
    images = pictures(6)
    found = session.run(images, np.array([0, TASKS, 1, -1, 2, 1 << 40]))
    assert np.isnan(found[[1, 3, 5]]).all()
    alone = session.run(images[[0, 2, 4]], np.array([0, 1, 2]))
    np.testing.assert_array_equal(found[[0, 2, 4]], alone)


def test_a_multi_task_engine_refuses_images_without_rows(
    opens, tiny_engine, tiny_bank, pictures
) -> None:
    with pytest.raises(UsageError, match="needs a task row per image"):
        opens(tiny_engine(tiny_bank(TASKS))).run(pictures(1))


def test_an_unknown_provider_is_a_usage_error(opens, tiny_engine, tiny_bank) -> None:
    with pytest.raises(UsageError, match="unknown provider") as caught:
        opens(tiny_engine(tiny_bank(1)), Device("tpu"))
    assert caught.value.exit_code == 2
    assert caught.value.details == {"wanted": str(sorted(PROVIDERS)), "found": "tpu"}


def test_a_provider_that_the_runtime_was_built_without_is_a_missing_dependency(
    opens, tiny_engine, tiny_bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependency, match="has no CUDAExecutionProvider") as caught:
        opens(tiny_engine(tiny_bank(1)), Device("cuda"))
    assert caught.value.exit_code == 5
    assert "doctor" in caught.value.details["do"]


def test_a_provider_that_cannot_load_is_a_missing_dependency_and_never_another_one(
    opens, tiny_engine, tiny_bank, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = tiny_engine(tiny_bank(1))
    if loads("cuda", engine):
        pytest.skip("CUDA loads on this machine")
    capfd.readouterr()
    with pytest.raises(MissingDependency) as caught:
        opens(engine, Device("cuda"))
    assert caught.value.exit_code == 5
    assert capfd.readouterr().out == ""


@pytest.mark.gpu
def test_cuda_runs_on_cuda_and_agrees_with_the_cpu(opens, tiny_engine, tiny_bank, pictures) -> None:
    engine = tiny_engine(tiny_bank(TASKS))
    if not loads("cuda", engine):
        pytest.skip("CUDA does not load on this machine")
    session = opens(engine, Device("cuda"))
    assert session.provider == "CUDAExecutionProvider"
    images, task = pictures(5), np.arange(5) % TASKS
    np.testing.assert_allclose(
        session.run(images, task), opens(engine).run(images, task), rtol=0, atol=1e-2
    )


@pytest.mark.parametrize("engine", [b"", b"not an onnx file", b"\x08\x0a\x12\x03cut"])
def test_bytes_that_are_no_model_are_incompatible(opens, engine: bytes) -> None:
    with pytest.raises(IncompatibleArtefact, match="cannot load the engine") as caught:
        opens(engine)
    assert caught.value.exit_code == 4
    assert caught.value.details["where"] == "engine in memory"


def test_a_file_that_is_no_model_is_incompatible(opens, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no")
    with pytest.raises(IncompatibleArtefact, match="cannot load the engine") as caught:
        opens(tmp_path / "model.onnx")
    assert caught.value.details["where"] == str(tmp_path / "model.onnx")


class TestBankOfInputs:
    @pytest.mark.parametrize(
        "change",
        [
            lambda bank: {},
            lambda bank: {"bank/head/weight": bank["bank/head/weight"]},
            lambda bank: {**bank, "bank/other": bank["bank/head/bias"]},
            lambda bank: {name.removeprefix("bank/"): value for name, value in bank.items()},
        ],
        ids=["none", "one missing", "one surplus", "other names"],
    )
    def test_a_bank_of_other_names_is_refused_and_the_old_one_stays(
        self, opens, tiny_engine, tiny_bank, pictures, change
    ) -> None:
        bank = tiny_bank(TASKS)
        with pytest.raises(IncompatibleArtefact, match="does not hold the tensors"):
            opens(tiny_engine(), bank=change(bank))
        session = opens(tiny_engine(), bank=bank)
        images, task = pictures(3), np.arange(3)
        before = session.run(images, task)
        with pytest.raises(IncompatibleArtefact, match="does not hold the tensors") as caught:
            session.replace_bank(change(bank))
        assert caught.value.exit_code == 4
        np.testing.assert_array_equal(session.run(images, task), before)

    def test_an_engine_of_constants_takes_no_bank(self, opens, tiny_engine, tiny_bank) -> None:
        session = opens(tiny_engine(tiny_bank(TASKS)))
        with pytest.raises(IncompatibleArtefact, match="does not hold the tensors") as caught:
            session.replace_bank(tiny_bank(TASKS))
        assert "constants" in caught.value.details["wanted"]

    def test_a_to_b_to_a_gives_the_same_bits(self, opens, tiny_engine, tiny_bank, pictures) -> None:
        first, second = tiny_bank(TASKS), tiny_bank(TASKS, 1)
        session = opens(tiny_engine(), bank=first)
        images, task = pictures(7), np.arange(7) % TASKS
        before = session.run(images, task)
        session.replace_bank(second)
        other = session.run(images, task)
        session.replace_bank(first)
        np.testing.assert_array_equal(session.run(images, task), before)
        assert not np.array_equal(other, before)
        np.testing.assert_allclose(other, expected(second, images, task), rtol=0, atol=1e-5)

    def test_a_bank_may_grow_and_shrink(self, opens, tiny_engine, tiny_bank, pictures) -> None:
        session = opens(tiny_engine(), bank=tiny_bank(1))
        images = pictures(2)
        assert np.isnan(session.run(images, np.array([0, 4]))[1]).all()
        bank = tiny_bank(5, 2)
        session.replace_bank(bank)
        task = np.array([0, 4])
        np.testing.assert_allclose(
            session.run(images, task), expected(bank, images, task), rtol=0, atol=1e-5
        )

    def test_the_session_keeps_its_own_copy(self, opens, tiny_engine, tiny_bank, pictures) -> None:
        bank = tiny_bank(TASKS)
        session = opens(tiny_engine(), bank=bank)
        images, task = pictures(3), np.arange(3)
        before = session.run(images, task)
        for value in bank.values():
            value[:] = np.nan
        np.testing.assert_array_equal(session.run(images, task), before)


def test_threads_get_their_own_rows(opens, tiny_engine, tiny_bank, pictures) -> None:
    session = opens(tiny_engine(tiny_bank(TASKS)), Device(threads=1))
    cases = [(pictures(n), np.arange(n) % TASKS) for n in range(1, 17)]
    wanted = [session.run(*case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: [session.run(*case) for case in cases], range(16)):
            for row, right in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(row, right)


def test_a_call_sees_one_bank_while_another_thread_replaces_it(
    opens, tiny_engine, tiny_bank, pictures
) -> None:
    banks = [tiny_bank(TASKS, seed) for seed in range(2)]
    session = opens(tiny_engine(), Device(threads=1), bank=banks[0])
    images, task = pictures(6), np.arange(6) % TASKS
    right = []
    for bank in banks:
        session.replace_bank(bank)
        right.append(session.run(images, task).tobytes())

    def ask(_: int) -> set[bytes]:
        return {session.run(images, task).tobytes() for _ in range(50)}

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, number) for number in range(4)]
        for turn in range(100):
            session.replace_bank(banks[turn % 2])
        for answer in asked:
            assert answer.result() <= set(right)


def named_engine() -> bytes:
    """a [B, 2] float32, b [B, 2] int64, bank/c [1] -> a + b + c."""
    kinds = {"a": (TensorProto.FLOAT, ["batch", 2]), "b": (TensorProto.INT64, ["batch", 2]), "bank/c": (TensorProto.FLOAT, [1])}  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["b"], ["b1"], to=TensorProto.FLOAT),
            helper.make_node("Sum", ["a", "b1", "bank/c"], ["logits"]),
        ],
        "named",
        [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return model.SerializeToString()


class TestNamedInputs:
    BANK = {"bank/c": np.array([100], np.float32)}  # noqa: RUF012
    A, B = np.array([[1, 2]], np.float32), np.array([[10, 20]])

    def test_inputs_are_taken_by_name_in_any_order(self, opens) -> None:
        session = opens(named_engine(), bank=self.BANK)
        for inputs in ({"a": self.A, "b": self.B}, {"b": self.B, "a": self.A}):
            np.testing.assert_array_equal(session.run(inputs), [[111, 122]])

    def test_the_one_input_of_an_engine_may_be_named(
        self, opens, tiny_engine, tiny_bank, pictures
    ) -> None:
        session = opens(tiny_engine(tiny_bank(TASKS)))
        images, task = pictures(2), np.array([2, 0])
        np.testing.assert_array_equal(
            session.run({"images": images}, task), session.run(images, task)
        )

    @pytest.mark.parametrize(
        ("inputs", "found"),
        [
            (A, "one array of shape [1, 2]"),
            ({}, "none"),
            ({"a": A}, "a"),
            ({"a": A, "b": B, "bank/c": A}, "a, b, bank/c"),
            ({"a": A, "c": B}, "a, c"),
        ],
    )
    def test_other_names_are_one_usage_error(self, opens, inputs, found) -> None:
        with pytest.raises(UsageError) as caught:
            opens(named_engine(), bank=self.BANK).run(inputs)
        assert caught.value.exit_code == 2
        assert "a, b" in caught.value.details["wanted"]
        assert caught.value.details["found"] == found
