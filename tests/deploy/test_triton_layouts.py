"""`utune-deploy triton` over engines of a real backbone: the native graph answers what the service answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest

from utune_deploy.export.engine import Device
from utune_deploy.export.served import serve_graph
from utune_deploy.serving.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable


def opened(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("form", ["merged", "parallel", "constants", "inputs"])
def test_the_native_graph_answers_as_the_service(
    form: str, bundles: Callable[..., Any], images: Callable[..., np.ndarray]
) -> None:
    bundle = bundles(form)
    service = Service.open(bundle, Device(threads=1))
    names = [service.registry.names[row % len(bundle.tasks)] for row in range(4)]
    rows = images(4)
    expected = service.answer(rows, names)
    session = opened(serve_graph(bundle))
    tasks = np.array([[name] for name in names], dtype=object)
    logits, label, score, valid = session.run(None, {"images": rows, "task": tasks})
    assert valid.all()
    assert logits.tobytes() == expected.logits.tobytes()
    np.testing.assert_array_max_ulp(score.ravel(), expected.scores, 1)
    assert tuple(label.ravel()) == expected.labels
    tasks[1] = "another"
    again, label, score, valid = session.run(None, {"images": rows, "task": tasks})
    assert valid.ravel().tolist() == [True, False, True, True]
    assert np.isnan(again[1]).all()
    assert np.isnan(score[1, 0])
    assert label[1, 0] == ""
    assert again[[0, 2, 3]].tobytes() == logits[[0, 2, 3]].tobytes()


def test_the_native_layout_from_the_command_line(cli: Any, bundles: Any, tmp_path: Any) -> None:
    folder, models = bundles("constants").path, tmp_path / "models"
    settings = (
        "--layout", "native", "--aliases", "--pictures", "--warmup", "--max-queued", 9, "--resource", "R=2",
    )  # fmt: skip
    said = cli("triton", folder, "-o", models, *settings)
    assert said.code == 0, said.err
    (model,) = [path for path in models.iterdir() if "." not in path.name]
    assert (model / "1" / "model.onnx").is_file()
    config = (model / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert "max_queue_size: 9" in config
    assert cli("triton", folder, "-o", models, "--layout", "native", "--new-version").code == 0
    assert (model / "2" / "model.onnx").is_file()
    assert cli("triton", folder, "-o", models, "--new-version").code == 2  # the layout is another
    assert cli("triton", folder, "-o", models, "--resource", "R=x").code == 2
