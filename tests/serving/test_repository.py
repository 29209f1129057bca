"""A Triton repository: what is written, and that it needs nothing beside it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import UsageError
from utune_deploy.serving.repository import config_text, write_repository
from utune_deploy.serving.repository.options import ModelOptions


def _parsed(text: str):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_configuration_parses_back(bundle):
    config = _parsed(
        config_text(bundle, device=Device(threads=3), options=ModelOptions(max_delay_ms=2))
    )
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "python", 8)
    inputs = [(t.name, t.data_type, list(t.dims), t.optional) for t in config.input]
    assert inputs == [
        ("images", model_config_pb2.TYPE_FP32, [3, 8, 8], False),
        ("task", model_config_pb2.TYPE_STRING, [1], False),
    ]
    outputs = [(t.name, t.data_type, list(t.dims), t.label_filename) for t in config.output]
    assert outputs == [
        ("logits", model_config_pb2.TYPE_FP32, [5], ""),
        ("label", model_config_pb2.TYPE_STRING, [1], ""),
        ("score", model_config_pb2.TYPE_FP32, [1], ""),
    ]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert config.parameters["threads"].string_value == "3"
    assert config.parameters["identity"].string_value == bundle.identity


def test_the_delay_is_never_zero(bundle):
    config = _parsed(config_text(bundle, options=ModelOptions(max_delay_ms=0)))
    assert config.dynamic_batching.max_queue_delay_microseconds == 100


def test_a_gpu_engine_is_an_instance_on_the_gpu(bundle):
    config = _parsed(config_text(bundle, device=Device("cuda")))
    (group,) = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert (group.count, list(group.gpus)) == (1, [0])


def test_one_task_brings_its_labels(single, tmp_path):
    model = write_repository(single, tmp_path)
    config = _parsed((model / "config.pbtxt").read_text())
    assert config.output[0].label_filename == "labels.txt"
    assert (model / "labels.txt").read_text() == "cars-0\ncars-1\ncars-2\n"


def test_the_carried_bundle_is_the_bundle(bundle, tmp_path):
    model = write_repository(bundle, tmp_path)
    assert open_bundle(model / "1" / "bundle").identity == bundle.identity


def test_a_repository_answers_without_this_package_and_without_torch(bundle, service, tmp_path):
    version = write_repository(bundle, tmp_path) / "1"
    script = f"""
import sys, types, numpy as np
# What Triton's stub provides: a module, and the version folder's model.py run as `model`.
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
import importlib.util as u
spec = u.spec_from_file_location("model", {str(version / "model.py")!r})
model = u.module_from_spec(spec)
spec.loader.exec_module(model)
instance = model.TritonPythonModel()
instance.initialize({{
    "model_repository": {str(version.parent)!r}, "model_version": "1",
    "model_config": '{{"parameters": {{"provider": {{"string_value": "cpu"}}, "threads": {{"string_value": "1"}}}}}}',
}})
import utune_deploy.serving.service as carried
assert carried.__file__.startswith({str(version)!r}), carried.__file__
heavy = {{"torch", "timm", "onnx", "starlette", "uvicorn", "grpc", "tritonclient"}} & set(sys.modules)
assert not heavy, heavy
answers = instance._service.answer(np.ones((2, 3, 8, 8), np.float32), ["cars", "pets"])
sys.stdout.buffer.write(answers.logits.tobytes())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    answers = service.answer(np.ones((2, 3, 8, 8), np.float32), ["cars", "pets"])
    assert done.stdout == answers.logits.tobytes()


def test_a_model_that_is_there_is_replaced_only_when_asked(bundle, tmp_path):
    model = write_repository(bundle, tmp_path)
    (model / "stale").write_text("")
    with pytest.raises(UsageError, match="already exists"):
        write_repository(bundle, tmp_path)
    assert (model / "stale").exists()
    write_repository(bundle, tmp_path, force=True)
    assert not (model / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("name", ["../up", "", "a b", ".hidden", "a/b"])
def test_a_name_that_cannot_be_a_folder_is_refused(bundle, tmp_path, name):
    with pytest.raises(UsageError, match="cannot be a model's folder"):
        write_repository(replace(bundle, name=name), tmp_path)


def test_all_tasks_are_a_second_model(two_engines, tmp_path):
    model = write_repository(two_engines, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.all"]
    assert model == tmp_path / "tiny"
    config = _parsed((tmp_path / "tiny.all" / "config.pbtxt").read_text())
    assert (config.name, config.max_batch_size) == ("tiny.all", 8)
    assert [(t.name, list(t.dims)) for t in config.input] == [("images", [3, 8, 8])]
    assert [(t.name, list(t.dims)) for t in config.output] == [
        ("logits", [3, 5]), ("task", [3]), ("label", [3]), ("score", [3]),
    ]  # fmt: skip
    assert config.parameters["all_tasks"].string_value == "true"
    assert "all_tasks" not in _parsed((model / "config.pbtxt").read_text()).parameters
    carried = open_bundle(tmp_path / "tiny.all" / "1" / "bundle")
    assert carried.fan_out == two_engines.fan_out


def test_named_inputs_and_arrays_are_configured(everything):
    config = _parsed(config_text(everything, all_tasks=True))
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [
        ("input_ids", model_config_pb2.TYPE_INT64, [6]),
        ("attention_mask", model_config_pb2.TYPE_INT64, [6]),
        ("visual_feats", model_config_pb2.TYPE_FP32, [2, 4]),
    ]
    assert [(t.name, list(t.dims)) for t in config.output] == [
        ("logits", [2, 2, 3]), ("task", [2]),
    ]  # fmt: skip


def test_neither_model_is_written_over_unasked(two_engines, bundle, tmp_path):
    write_repository(bundle, tmp_path)
    with pytest.raises(UsageError, match="already exists"):
        write_repository(two_engines, tmp_path)
    assert not (tmp_path / "tiny.all").exists()
    write_repository(two_engines, tmp_path, force=True)
    other = write_repository(replace(bundle, name="other.all"), tmp_path)
    write_repository(replace(bundle, name="other"), tmp_path, force=True)
    assert other.exists()
    write_repository(bundle, tmp_path, force=True)
    assert not (tmp_path / "tiny.all").exists()  # it would answer from the bundle that was replaced
