"""A Triton repository: what is written, and that it needs nothing beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from utune_deploy.export import served
from utune_deploy.export.bundle import open_bundle
from utune_deploy.export.engine import Device
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.serving.repository import config_text, write_repository
from utune_deploy.serving.repository.options import ModelOptions
from utune_deploy.serving.triton.settings import Settings


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    assert not config.HasField("dynamic_batching")  # the queue is ours
    assert json.loads(config.parameters["queueing"].string_value)["max_delay_ms"] == 2
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert config.parameters["threads"].string_value == "3"
    assert config.parameters["identity"].string_value == bundle.identity


def _native(bundle, tmp_path, **options):
    model = write_repository(
        bundle, tmp_path, layout="native", graphs=served, options=ModelOptions(**options)
    )
    return model, _parsed((model / "config.pbtxt").read_text())


def test_the_delay_of_tritons_queue_is_never_zero(bundle, tmp_path):
    _, config = _native(bundle, tmp_path, max_delay_ms=0)
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
import sys, unittest.mock, numpy as np
# What Triton's stub provides: a module, and the version folder's model.py run as `model`.
sys.modules["triton_python_backend_utils"] = unittest.mock.MagicMock()
import importlib.util as u
spec = u.spec_from_file_location("model", {str(version / "model.py")!r})
model = u.module_from_spec(spec)
spec.loader.exec_module(model)
instance = model.TritonPythonModel()
instance.initialize({{
    "model_repository": {str(version.parent)!r}, "model_version": "1",
    "model_name": "tiny", "model_instance_name": "tiny_0_0",
    "model_config": '{{"parameters": {{"provider": {{"string_value": "cpu"}}, "threads": {{"string_value": "1"}}}}}}',
}})
import utune_deploy.serving.service as carried
assert carried.__file__.startswith({str(version)!r}), carried.__file__
heavy = {{"torch", "timm", "onnx", "starlette", "uvicorn", "grpc", "tritonclient"}} & set(sys.modules)
assert not heavy, heavy
answers = instance._service.answer(np.ones((2, 3, 8, 8), np.float32), ["cars", "pets"])
instance.finalize()
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
    assert _names(tmp_path) == ["tiny", "tiny.tasks"]


@pytest.mark.parametrize("name", ["../up", "", "a b", ".hidden", "a/b"])
def test_a_name_that_cannot_be_a_folder_is_refused(bundle, tmp_path, name):
    with pytest.raises(UsageError, match="cannot be a model's folder"):
        write_repository(replace(bundle, name=name), tmp_path)


def test_all_tasks_are_a_second_model(two_engines, tmp_path):
    model = write_repository(two_engines, tmp_path)
    assert _names(tmp_path) == ["tiny", "tiny.all", "tiny.tasks"]
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


def test_options_stand_in_the_configuration(bundle, tmp_path):
    model, config = _native(
        bundle, tmp_path,
        max_delay_ms=3, preferred_batches=(8, 4), priority_levels=3, max_queued=50, timeout_ms=20,
        instances=2, keep_versions=2, cache=True, resources=(("R1", 2), ("R2", 1)), warmup=True,
    )  # fmt: skip
    batching = config.dynamic_batching
    assert batching.max_queue_delay_microseconds == 3000
    assert list(batching.preferred_batch_size) == [4, 8]
    assert (batching.priority_levels, batching.default_priority_level) == (3, 3)
    policy = batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (50, 20_000)
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    (group,) = config.instance_group
    assert group.count == 2
    assert [(r.name, r.count) for r in group.rate_limiter.resources] == [("R1", 2), ("R2", 1)]
    assert config.version_policy.latest.num_versions == 2
    assert config.response_cache.enable
    (warmup,) = config.model_warmup
    assert warmup.batch_size == 1
    assert warmup.inputs["images"].zero_data
    assert list(warmup.inputs["images"].dims) == [3, 8, 8]
    assert warmup.inputs["task"].input_data_file == "task"
    assert (model / "warmup" / "task").read_bytes() == b"\x04\0\0\0pets"


def test_our_queue_has_its_options_in_parameters(inputs_bundle, tmp_path):
    options = ModelOptions(
        max_delay_ms=0, priority_levels=2, max_queued=50, timeout_ms=20, max_task_queued=9,
        rate=50.0, rates=(("pets", 3.0),),
        weights=(("pets", 2.0),), rows=12, keep=Path("kept"), task_control=True, sockets=tmp_path,
    )  # fmt: skip
    device = Device(threads=2, prepared=Path("prepared"), arena=False)
    model = write_repository(inputs_bundle, tmp_path, device=device, options=options)
    config = _parsed((model / "config.pbtxt").read_text())
    texts = {name: value.string_value for name, value in config.parameters.items()}
    assert Settings.read(texts) == Settings(
        device=Device(threads=2, prepared=Path("prepared").absolute(), arena=False), rows=12, keep=Path("kept").absolute(), task_control=True, sockets=tmp_path,
        queueing={
            "max_delay_ms": 0, "max_queued_rows": 50, "max_task_rows": 9, "default_timeout_ms": 20,
            "rate": 50.0, "rates": {"pets": 3.0},
            "weights": {"pets": 2.0}, "priority_levels": 2, "default_priority": 2,
        },
    )  # fmt: skip
    tasks = _parsed((tmp_path / "tiny.tasks" / "config.pbtxt").read_text())
    assert (tasks.max_batch_size, tasks.backend) == (0, "python")
    assert [(t.name, t.optional) for t in tasks.input] == [("command", False), ("file", True)]
    assert tasks.parameters["sockets"].string_value == str(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"preferred_batches": (4,)}, {"resources": (("R", 1),)}, {"weights": (("pets", 0.0),)},
        {"task_control": True, "instances": 2}, {"task_control": True, "cache": True}, {"rows": 12},
    ],
    ids=str,
)  # fmt: skip
def test_what_means_nothing_in_the_layout_hot_is_refused(bundle, tmp_path, wrong):
    with pytest.raises(UsageError):
        write_repository(bundle, tmp_path, options=ModelOptions(**wrong))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [{"max_task_queued": 3}, {"rate": 2.0}, {"weights": (("pets", 2.0),)}, {"task_control": True}],
    ids=str,
)
def test_what_needs_our_service_is_refused_in_the_layout_native(bundle, tmp_path, wrong):
    with pytest.raises(UsageError, match="no code of ours"):
        _native(bundle, tmp_path, **wrong)


def test_what_is_not_asked_for_is_not_configured(bundle, tmp_path):
    _, config = _native(bundle, tmp_path)
    assert not config.dynamic_batching.HasField("default_queue_policy")
    assert not config.dynamic_batching.priority_levels
    assert not config.response_cache.enable
    assert not config.model_warmup
    assert not config.HasField("optimization")
    assert not config.instance_group[0].HasField("rate_limiter")
    assert config.version_policy.latest.num_versions == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_delay_ms": -1}, {"priority_levels": -1}, {"max_queued": -1}, {"timeout_ms": -0.5},
        {"instances": 0}, {"keep_versions": 0}, {"preferred_batches": (0,)}, {"preferred_batches": (4, 9)},
        {"resources": (("R", 0),)}, {"resources": (("", 1),)}, {"resources": (("R", 1), ("R", 2))},
        {"gpus": ()}, {"gpus": (-1,)}, {"gpus": (1, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(bundle, tmp_path, wrong):
    with pytest.raises(UsageError):
        write_repository(bundle, tmp_path, options=ModelOptions(**wrong))
    assert not list(tmp_path.iterdir())


def test_the_python_backend_has_one_gpu(bundle, tmp_path):
    with pytest.raises(UsageError, match="first GPU"):
        write_repository(bundle, tmp_path, device=Device("cuda"), options=ModelOptions(gpus=(0, 1)))


# versions


def _versions(model) -> list[str]:
    return sorted(path.name for path in model.iterdir() if path.is_dir() and path.name.isdecimal())


@pytest.mark.parametrize("layout", ["hot", "native"])
def test_a_task_is_added_as_a_version(fewer, bundle, tmp_path, layout):
    write_repository(fewer, tmp_path, layout=layout, graphs=served)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny" / "1").rglob("*")}
    model = write_repository(bundle, tmp_path, layout=layout, graphs=served, new_version=True)
    assert _versions(model) == ["1", "2"]
    assert {path: path.stat().st_mtime_ns for path in (model / "1").rglob("*")} == before
    config = _parsed((model / "config.pbtxt").read_text())
    assert config.parameters["identity"].string_value == bundle.identity
    if layout == "hot":
        assert open_bundle(model / "2" / "bundle").identity == bundle.identity
        assert open_bundle(model / "1" / "bundle").identity == fewer.identity
    assert not list(tmp_path.rglob(".*"))
    write_repository(bundle, tmp_path, layout=layout, graphs=served, new_version=True)
    assert _versions(model) == ["1", "2", "3"]


def test_a_version_that_cannot_be_written_leaves_all_as_it_was(bundle, tmp_path):
    model = write_repository(bundle, tmp_path, layout="native", graphs=served)
    config = (model / "config.pbtxt").read_bytes()

    class Full:
        task_names = staticmethod(served.task_names)

        @staticmethod
        def serve_graph(*_):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_repository(
            bundle, tmp_path, layout="native", graphs=Full, new_version=True,
            options=ModelOptions(max_queued=3),
        )  # fmt: skip
    assert _versions(model) == ["1"]
    assert (model / "config.pbtxt").read_bytes() == config


def test_versions_that_stay_keep_their_tensors(single, bundle, tmp_path):
    write_repository(replace(single, name="tiny"), tmp_path)
    with pytest.raises(IncompatibleArtefact, match="versions that stay"):
        write_repository(bundle, tmp_path, new_version=True, options=ModelOptions(keep_versions=2))
    assert _versions(tmp_path / "tiny") == ["1"]
    write_repository(bundle, tmp_path, new_version=True)
    config = _parsed((tmp_path / "tiny" / "config.pbtxt").read_text())
    assert list(config.output[0].dims) == [5]


def test_a_version_needs_a_model_of_its_layout(bundle, tmp_path):
    with pytest.raises(UsageError, match="no model to add a version to"):
        write_repository(bundle, tmp_path, new_version=True)
    write_repository(bundle, tmp_path)
    with pytest.raises(UsageError, match="another layout"):
        write_repository(bundle, tmp_path, layout="native", graphs=served, new_version=True)
    with pytest.raises(UsageError, match="not both"):
        write_repository(bundle, tmp_path, new_version=True, force=True)
    (tmp_path / "tiny" / "config.pbtxt").write_text("not a configuration")
    with pytest.raises(IncompatibleArtefact, match="cannot be read"):
        write_repository(bundle, tmp_path, new_version=True)


def test_a_second_engine_that_is_gone_goes_with_the_version(two_engines, bundle, tmp_path):
    write_repository(two_engines, tmp_path)
    write_repository(bundle, tmp_path, new_version=True)
    assert _names(tmp_path) == ["tiny", "tiny.tasks"]
    write_repository(two_engines, tmp_path, new_version=True)
    assert _versions(tmp_path / "tiny") == ["1", "2", "3"]
    assert _versions(tmp_path / "tiny.all") == ["3"]


# aliases


@pytest.mark.parametrize("layout", ["hot", "native"])
def test_an_alias_is_an_ensemble_over_the_one_model(bundle, tmp_path, layout):
    write_repository(bundle, tmp_path, layout=layout, graphs=served, aliases=True)
    expected = ["tiny", "tiny.cars", "tiny.flowers", "tiny.pets", "tiny.task_names"]
    assert _names(tmp_path) == [*expected, *(["tiny.tasks"] if layout == "hot" else [])]
    alias = tmp_path / "tiny.cars"
    config = _parsed((alias / "config.pbtxt").read_text())
    main = _parsed((tmp_path / "tiny" / "config.pbtxt").read_text())
    assert (config.platform, config.max_batch_size) == ("ensemble", 8)
    assert [t.name for t in config.input] == ["images"]
    assert [(t.name, t.dims) for t in config.output] == [(t.name, t.dims) for t in main.output]
    names, answer = config.ensemble_scheduling.step
    assert (names.model_name, dict(names.input_map)) == ("tiny.task_names", {"images": "images"})
    (said_by,) = names.output_map
    assert names.output_map[said_by] == "task"
    step = _parsed((tmp_path / "tiny.task_names" / "config.pbtxt").read_text())
    assert said_by in {t.name for t in step.output}
    assert (said_by == "cars") is (layout == "native")
    assert answer.model_name == "tiny"
    assert dict(answer.input_map) == {"images": "images", "task": "task"}
    assert list((alias / "1").iterdir()) == []
    assert (alias / "labels.txt").read_text() == "cars-0\ncars-1\ncars-2\n"
    assert config.output[0].label_filename == "labels.txt"


def test_the_first_step_says_the_name_for_each_row(bundle, text, rows, sentences, tmp_path):
    for number, (given, inputs) in enumerate(((bundle, rows(5)[0]), (text, sentences(5)))):
        model = write_repository(
            given, tmp_path / str(number), layout="native", graphs=served, aliases=True
        )
        step = model.with_name("tiny.task_names")
        config = _parsed((step / "config.pbtxt").read_text())
        session = onnxruntime.InferenceSession(
            str(step / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        (needed,) = session.get_inputs()
        assert [t.name for t in config.input] == [needed.name]
        assert [t.name for t in config.output] == [t.name for t in session.get_outputs()]
        rows_of = inputs if isinstance(inputs, np.ndarray) else inputs[needed.name]
        for name, said in zip(
            given_names(given), session.run(None, {needed.name: rows_of}), strict=True
        ):
            assert said.tolist() == [[name]] * 5


def given_names(bundle) -> list[str]:
    return [task.name for task in bundle.tasks]


def test_a_new_version_has_the_aliases_of_its_tasks(bundle, fewer, tmp_path):
    write_repository(fewer, tmp_path, aliases=True)
    write_repository(replace(bundle, name="other"), tmp_path, aliases=True)
    write_repository(bundle, tmp_path, new_version=True)
    assert _versions(tmp_path / "tiny.flowers") == ["1"]  # the task's own
    write_repository(fewer, tmp_path, new_version=True)
    assert not (tmp_path / "tiny.flowers").exists()
    assert _versions(tmp_path / "tiny.task_names") == ["1", "2", "3"]
    assert _versions(tmp_path / "tiny.cars") == ["1"]
    write_repository(fewer, tmp_path, force=True)
    assert _names(tmp_path) == [
        "other", "other.cars", "other.flowers", "other.pets", "other.task_names", "other.tasks",
        "tiny", "tiny.tasks",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["all", "task_names"])
def test_an_alias_that_would_be_another_model_is_refused(two_engines, tmp_path, name):
    first = replace(two_engines.tasks[0], name=name)
    other = replace(two_engines, tasks=(first, *two_engines.tasks[1:]))
    with pytest.raises(UsageError, match="another model"):
        write_repository(other, tmp_path, aliases=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{}, {"force": True}, {"new_version": True}])
def test_another_model_with_the_name_of_an_alias_is_not_written_over(
    bundle, fewer, tmp_path, settings
):
    if settings:
        write_repository(fewer, tmp_path, aliases=True)
    other = tmp_path / "tiny.flowers"
    (other / "7").mkdir(parents=True)
    (other / "config.pbtxt").write_text('name: "tiny.flowers"')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="another model has the name"):
        write_repository(bundle, tmp_path, aliases=True, **settings)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_task_whose_name_is_no_folder_has_no_alias(bundle, tmp_path):
    first = replace(bundle.tasks[0], name="a/b")
    other = replace(bundle, tasks=(first, *bundle.tasks[1:]))
    with pytest.raises(UsageError, match="a task's name"):
        write_repository(other, tmp_path, aliases=True)
    assert not list(tmp_path.iterdir())
