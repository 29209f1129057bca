"""The layout `native`: its graph answers as the service does, and its configuration says what the graph has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2

from utune_deploy.export import served
from utune_deploy.export.engine import Device
from utune_deploy.export.served import wrapping
from utune_deploy.merge.errors import BuildFailed, UsageError
from utune_deploy.serving.repository import write_repository
from utune_deploy.serving.repository.options import ModelOptions
from utune_deploy.serving.service import Service

KINDS = {
    "tensor(float)": model_config_pb2.TYPE_FP32,
    "tensor(int64)": model_config_pb2.TYPE_INT64,
    "tensor(string)": model_config_pb2.TYPE_STRING,
    "tensor(bool)": model_config_pb2.TYPE_BOOL,
}


def opened(graph) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def ask(bundle, inputs, tasks=None, *, all_tasks=False) -> dict[str, np.ndarray]:
    """The graph's outputs by name."""
    session = opened(served.serve_graph(bundle, all_tasks))
    feeds = dict(inputs) if isinstance(inputs, dict) else {"images": inputs}
    if tasks is not None:
        feeds["task"] = np.array([[name] for name in tasks], dtype=object)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def config_of(model):
    text = (model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def requests_of(name, rows, sentences):
    """Inputs for a fixture's bundle, and its tasks mixed."""
    if name == "single":
        return rows(6)[0], ["cars"] * 6
    if name == "text":
        return sentences(6), rows(6)[1]
    images, tasks = rows(6)
    return images, [task if task != "flowers" or name != "arrays" else "cars" for task in tasks]


@pytest.mark.parametrize(
    "name", ["bundle", "single", "text", "arrays", "two_engines", "fan_out", "banked"]
)
def test_the_graph_answers_as_the_service(name, request, rows, sentences):
    bundle = request.getfixturevalue(name)
    inputs, tasks = requests_of(name, rows, sentences)
    expected = Service.open(bundle, Device(threads=1)).answer(inputs, tasks)
    found = ask(bundle, inputs, tasks)
    assert found["logits"].tobytes() == expected.logits.tobytes()
    assert found["valid"].shape == (6, 1)
    assert found["valid"].all()
    if expected.labels:
        assert tuple(found["label"].ravel()) == expected.labels
        np.testing.assert_array_max_ulp(found["score"].ravel(), expected.scores, 1)
    else:
        assert set(found) == {"logits", "valid"}


@pytest.mark.parametrize("name", ["two_engines", "fan_out", "everything"])
def test_the_graph_of_all_tasks_answers_as_the_service(name, request, rows, sentences):
    bundle = request.getfixturevalue(name)
    inputs = sentences(4) if name == "everything" else rows(4)[0]
    expected = Service.open(bundle, Device(threads=1), all_tasks=True).answer(inputs)
    found = ask(bundle, inputs, all_tasks=True)
    count = len(bundle.tasks)
    assert found["logits"].shape[:2] == (4, count)
    assert found["logits"].tobytes() == expected.logits.tobytes()
    assert tuple(found["task"].ravel()) == expected.tasks
    assert found["valid"].all()
    if expected.labels:
        assert found["label"].shape == found["score"].shape == (4, count)
        assert tuple(found["label"].ravel()) == expected.labels
        np.testing.assert_array_max_ulp(found["score"].ravel(), expected.scores, 1)


@pytest.mark.parametrize("bad", ["nan", "inf", "task", "nothing"])
@pytest.mark.parametrize("name", ["bundle", "fan_out"])
def test_a_row_that_cannot_be_answered_is_flagged_alone(name, bad, request, rows):
    bundle = request.getfixturevalue(name)
    images, tasks = rows(5)
    right = ask(bundle, images, tasks)
    if bad in ("nan", "inf"):
        images = images.copy()
        images[2, 1, 3, 3] = float(bad)
    else:
        tasks[2] = {"task": "boats", "nothing": ""}[bad]
    found = ask(bundle, images, tasks)
    assert found["valid"].ravel().tolist() == [True, True, False, True, True]
    assert np.isnan(found["logits"][2]).all()
    assert np.isnan(found["score"][2, 0])
    assert found["label"][2, 0] == ""
    others = [0, 1, 3, 4]
    for output in ("logits", "score"):
        assert found[output][others].tobytes() == right[output][others].tobytes()
    assert (found["label"][others] == right["label"][others]).all()


@pytest.mark.parametrize("wrong", [-1, 11, 2**40])
def test_an_id_out_of_range_is_flagged_and_ends_no_call(text, rows, sentences, wrong):
    inputs, tasks = sentences(4), rows(4)[1]
    right = ask(text, inputs, tasks)
    inputs["input_ids"][1, 5] = wrong
    found = ask(text, inputs, tasks)
    assert found["valid"].ravel().tolist() == [True, False, True, True]
    assert np.isnan(found["logits"][1]).all()
    assert found["logits"][[0, 2, 3]].tobytes() == right["logits"][[0, 2, 3]].tobytes()


def test_a_bad_row_spoils_its_own_answers_to_all_tasks(two_engines, rows):
    images = rows(3)[0].copy()
    images[0, 0, 0, 0] = np.nan
    found = ask(two_engines, images, all_tasks=True)
    assert found["valid"].ravel().tolist() == [False, True, True]
    assert np.isnan(found["logits"][0]).all()
    assert set(found["label"][0]) == {""}
    assert np.isfinite(found["logits"][1:]).all()
    assert "" not in set(found["label"][1:].ravel())


def test_labels_and_tasks_may_be_any_text(bundle, rows):
    first = replace(bundle.tasks[0], name="vögel auf Ästen", labels=tuple("äöü😀 "))
    images, tasks = rows(3)
    odd = replace(bundle, tasks=(first, *bundle.tasks[1:]))
    found = ask(odd, images, ["vögel auf Ästen", *tasks[1:]])
    plain = ask(bundle, images, tasks)
    assert found["label"][0, 0] == "äöü😀 "[int(plain["label"][0, 0][-1])]


@pytest.mark.parametrize(
    "name", ["bundle", "single", "text", "arrays", "two_engines", "fan_out", "everything", "banked"]
)
def test_the_configuration_is_that_of_the_graph(name, request, tmp_path):
    bundle = request.getfixturevalue(name)
    write_repository(bundle, tmp_path, layout="native", graphs=served)
    models = sorted(tmp_path.iterdir())
    assert len(models) == 1 + (bundle.engine_of_all is not None)
    for model in models:
        config = config_of(model)
        assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
        assert config.name == model.name
        session = opened((model / "1" / config.default_model_filename).read_bytes())
        for stated, there in (
            (config.input, session.get_inputs()), (config.output, session.get_outputs()),
        ):  # fmt: skip
            assert [(t.name, t.data_type, list(t.dims)) for t in stated] == [
                (t.name, KINDS[t.type], t.shape[1:]) for t in there
            ]
            assert not any(t.optional for t in stated if hasattr(t, "optional"))
            assert all(isinstance(t.shape[0], str) for t in there)  # the batch is free
        assert session.get_modelmeta().custom_metadata_map["utune.identity"] == bundle.identity


def test_a_gpu_engine_rounds_only_where_it_was_exported_so(bundle, tmp_path):
    device, options = Device("cuda"), ModelOptions(gpus=(0, 3), instances=2)
    for precision, tf32 in (("fp32", "0"), ("tf32", "1")):
        other = replace(bundle, engine=replace(bundle.engine, precision=precision))
        model = write_repository(
            other, tmp_path, layout="native", graphs=served, device=device, options=options, force=True,
        )  # fmt: skip
        config = config_of(model)
        (group,) = config.instance_group
        assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
        assert (group.count, list(group.gpus)) == (2, [0, 3])
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": tf32})


def test_names_inside_the_engine_may_be_those_of_outputs(bundle, rows, tmp_path):
    model = onnx.load(bundle.path / "model.onnx")
    names = {"raw": "score", "own": "label", "lines": "valid"}
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    onnx.save(model, tmp_path / "model.onnx")
    images, tasks = rows(4)
    found, right = (ask(b, images, tasks) for b in (replace(bundle, path=tmp_path), bundle))
    assert found["logits"].tobytes() == right["logits"].tobytes()
    assert (found["label"] == right["label"]).all()


def test_an_engine_that_is_no_onnx_graph_is_refused(bundle, tmp_path):
    other = replace(bundle, engine=replace(bundle.engine, target="tensorrt"))
    with pytest.raises(UsageError, match="only an ONNX engine") as refused:
        write_repository(other, tmp_path, layout="native", graphs=served)
    assert "hot" in refused.value.details["do"]
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_graph_that_one_file_cannot_hold_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(wrapping, "LARGEST", 1000)
    with pytest.raises(BuildFailed, match="too large"):
        served.serve_graph(bundle)


def test_an_unknown_layout_is_refused(bundle, tmp_path):
    with pytest.raises(UsageError, match="unknown layout"):
        write_repository(bundle, tmp_path, layout="lukewarm")


def test_pictures_are_prepared_and_answered(bundle, rows, tmp_path):
    write_repository(bundle, tmp_path, layout="native", graphs=served, pictures=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tiny", "tiny.pictures", "tiny.prepare",
    ]  # fmt: skip
    config, prepare = config_of(tmp_path / "tiny.pictures"), config_of(tmp_path / "tiny.prepare")
    main = config_of(tmp_path / "tiny")
    assert config.platform == "ensemble"
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [
        ("picture", model_config_pb2.TYPE_UINT8, [-1, -1, 3]),
        ("task", model_config_pb2.TYPE_STRING, [1]),
    ]
    assert [t.name for t in config.output] == [t.name for t in main.output]
    first, second = config.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == ("tiny.prepare", "tiny")
    assert set(first.input_map) == {t.name for t in prepare.input}
    assert set(first.output_map) == {t.name for t in prepare.output}
    assert set(second.input_map) == {t.name for t in main.input}
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    tasks = np.array([[name] for name in rows(3)[1]], dtype=object)
    feeds = {"picture": pictures, "task": tasks}
    for step in (first, second):
        session = opened((tmp_path / step.model_name / "1" / "model.onnx").read_bytes())
        there = [output.name for output in session.get_outputs()]
        given = {name: feeds[name] for name in step.input_map}
        feeds |= dict(zip(there, session.run(None, given), strict=True))
    prepared = [
        bundle.task(name).preprocessing.apply(Image.fromarray(picture))
        for (name,), picture in zip(tasks, pictures, strict=True)
    ]
    expected = Service.open(bundle, Device(threads=1)).answer(np.stack(prepared), rows(3)[1])
    np.testing.assert_allclose(feeds["logits"], expected.logits, atol=0.2)
    assert tuple(feeds["label"].ravel()) == expected.labels


def test_a_new_version_has_pictures_if_there_were(bundle, tmp_path):
    write_repository(bundle, tmp_path, layout="native", graphs=served, pictures=True)
    write_repository(bundle, tmp_path, layout="native", graphs=served, new_version=True)
    for name in ("tiny", "tiny.pictures", "tiny.prepare"):
        assert sorted(p.name for p in (tmp_path / name).iterdir() if p.is_dir()) == ["1", "2"]
    write_repository(bundle, tmp_path, layout="native", graphs=served, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_pictures_are_refused_where_there_are_none(bundle, text, tmp_path):
    with pytest.raises(UsageError, match="has no model of pictures"):
        write_repository(bundle, tmp_path, pictures=True)
    with pytest.raises(UsageError, match="does not read single pictures"):
        write_repository(text, tmp_path, layout="native", graphs=served, pictures=True)
    assert not list(tmp_path.iterdir())
