"""Counted work, memory alone, nodes and ceilings of a graph small enough to do by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from utune_deploy.deploy.bench import ceilings as ceilings_module
from utune_deploy.deploy.bench import state as state_module
from utune_deploy.deploy.bench.case import Case
from utune_deploy.deploy.bench.ceilings import Ceilings, array_bytes, measure_ceilings
from utune_deploy.deploy.bench.footprint import measure_footprint
from utune_deploy.deploy.bench.furnish import furnish
from utune_deploy.deploy.bench.nodes import profile_nodes, summarise_events
from utune_deploy.deploy.bench.parts import FFN, HEAD, NORM, SUMS, TUNERS, parts
from utune_deploy.deploy.bench.source import Source
from utune_deploy.deploy.bench.subject import Subject
from utune_deploy.deploy.bench.taken import per_task
from utune_deploy.deploy.bench.work import (
    Counter,
    GraphFacts,
    Work,
    graph_facts,
)
from utune_deploy.export.engine import Device
from utune_deploy.export.products import is_attention, is_gemm
from utune_deploy.merge.errors import CheckFailed, UsageError

ONE = Device(threads=1)


def model(nodes, inputs, weights, answer=("batch", 5, 2)):
    """Serialised; inputs are `name: (type, shape)`."""
    values = [helper.make_tensor_value_info(name, *given) for name, given in inputs.items()]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(answer))
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "by hand", values, [logits], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.fixture
def bank():
    """`images [B, 5, 4] W [4, 3]`, then a weight `[3, 2]` of the row's own task, one of three."""
    return model(
        [
            helper.make_node("MatMul", ["images", "trunk.mlp.fc1.weight"], ["h"], name="first"),
            helper.make_node("Gather", ["bank/x/down", "task"], ["w"], name="pick", axis=0),
            helper.make_node("MatMul", ["h", "w"], ["y"], name="second"),
            helper.make_node("Add", ["y", "bank/head/bias"], ["logits"], name="last"),
        ],
        {
            "images": (TensorProto.FLOAT, ["batch", 5, 4]),
            "task": (TensorProto.INT64, ["batch"]),
        },
        {
            "trunk.mlp.fc1.weight": normal(4, 3),
            "bank/x/down": normal(3, 3, 2),
            "bank/head/bias": normal(2),
        },
    )


@pytest.mark.parametrize(("rows", "asked"), [([0, 0], 1), ([0, 2], 2), ([1, 1, 2, 1], 2)])
def test_work_is_that_of_a_count_by_hand(bank, rows, asked):
    b = len(rows)
    work = Counter(Source(bank))(b, rows)
    assert work.macs == b * 5 * 4 * 3 + b * 5 * 3 * 2
    assert work.weight_bytes == 4 * (4 * 3) + asked * 4 * (3 * 2)
    # images and h out, h in and y out
    assert work.activation_bytes == 4 * b * 5 * (4 + 3 + 3 + 2)
    assert (work.flops, work.bytes) == (2 * work.macs, work.weight_bytes + work.activation_bytes)


def test_a_weight_that_two_products_read_is_read_once():
    shared = model(
        [
            helper.make_node("MatMul", ["images", "w"], ["h"]),
            helper.make_node("Transpose", ["w"], ["v"], perm=[1, 0]),
            helper.make_node("MatMul", ["h", "v"], ["logits"]),
        ],
        {"images": (TensorProto.FLOAT, ["batch", 5, 64])},
        {"w": normal(64, 64)},
        ("batch", 5, 64),
    )
    assert Counter(Source(shared))(1, [0]).weight_bytes == 4 * 64 * 64


def test_the_graph_is_counted_without_the_values_of_its_weights(bank):
    assert graph_facts(Source(bank)) == GraphFacts(4 * (12 + 18 + 2), gemms=2, attentions=0)
    large = model(
        [helper.make_node("MatMul", ["images", "w"], ["logits"])],
        {"images": (TensorProto.FLOAT, ["batch", 5, 64])}, {"w": normal(64, 64)}, ("batch", 5, 64),
    )  # fmt: skip
    source = Source(large)
    assert graph_facts(source).parameters_bytes == 4 * 64 * 64
    assert Counter(source)(2, [0, 0]).macs == 2 * 5 * 64 * 64
    with pytest.raises(AssertionError, match="only its shape"):
        source.graph.graph.initializers["w"].const_value.numpy()


@pytest.mark.parametrize(
    ("operator", "gemm", "attention"),
    [
        ("MatMul", True, False), ("FusedMatMul", True, False), ("Gemm", True, False), ("FusedConv", True, False),
        ("ConvTranspose", True, False), ("Attention", False, True), ("MultiHeadAttention", False, True),
        ("Convert", False, False), ("Add", False, False),
    ],
)  # fmt: skip
def test_products_and_attentions_are_known_by_their_operators(operator, gemm, attention):
    assert (is_gemm(operator), is_attention(operator)) == (gemm, attention)


def test_subjects_with_a_source_are_furnished_and_the_others_left(bank, about):
    with_source = Subject("a", "", lambda rows, task: rows, source=Source(bank))
    other = Subject("b", "", lambda rows, task: rows)
    found = furnish([with_source, other], [Case(2)], about, 0, footprint=False, nodes=False)
    assert found[1] is other
    assert found[0].graph is not None
    assert found[0].work(1, [0]).macs == 5 * 4 * 3 + 5 * 3 * 2


def test_an_operator_without_a_rule_leaves_the_work_uncounted(about):
    unknown = model(
        [helper.make_node("FusedMatMul", ["images", "w"], ["logits"], domain="com.microsoft")],
        {"images": (TensorProto.FLOAT, ["batch", 5, 4])}, {"w": normal(4, 2)},
    )  # fmt: skip
    subject = Subject("a", "", lambda rows, task: rows, source=Source(unknown, takes_task=False))
    (found,) = furnish([subject], [Case(1)], about, 0, footprint=False, nodes=False)
    assert found.work is None
    assert found.graph.gemms == 1


def test_the_roofline_is_the_longer_of_two_times():
    ceilings = Ceilings("CPU", "float32", 1e9, (8, 8, 8), 1e8, 12)
    assert ceilings.ridge == 10
    assert ceilings.bound_ms(Work(5_000_000, 1000, 0)) == pytest.approx(
        10.0
    )  # 10 MFLOP at 1 GFLOP/s
    assert ceilings.bound_ms(Work(5000, 1_000_000, 1_000_000)) == pytest.approx(20.0)
    assert ceilings.reached(Work(5_000_000, 1, 1), 40.0) == pytest.approx(0.25)


def test_ceilings_are_those_of_real_products_and_sums(monkeypatch):
    monkeypatch.setattr(ceilings_module, "SIDES", (32, 64))
    monkeypatch.setattr(ceilings_module, "LEAST_S", 0.0)
    monkeypatch.setattr(ceilings_module, "array_bytes", lambda: 1 << 16)
    found = measure_ceilings(ONE)
    assert found.provider == "CPUExecutionProvider"
    assert found.product in {(32, 32, 32), (64, 64, 64)}
    assert found.moved_bytes == 3 << 16
    assert found.flops_per_second > 0 < found.bytes_per_second


def test_the_arrays_of_the_sum_are_larger_than_the_cache_and_small_in_memory(monkeypatch):
    memory = SimpleNamespace(available=64 << 30)
    monkeypatch.setattr(ceilings_module.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(ceilings_module, "last_level_cache", lambda: 100 << 20)
    assert array_bytes() == 100 << 20
    monkeypatch.setattr(ceilings_module, "last_level_cache", lambda: None)
    assert array_bytes() == ceilings_module.LEAST_BYTES
    memory.available = 160 << 20
    assert array_bytes() == 10 << 20


def test_a_footprint_is_measured_in_a_process_of_its_own(bank):
    rows = np.zeros((2, 5, 4), np.float32)
    found = measure_footprint(Source(bank, ONE), rows, np.array([0, 2]))
    assert (found.disk_bytes, found.batch) == (len(bank), 2)
    assert 0 <= found.opened_bytes <= found.called_bytes < 64 << 20
    assert found.peak_bytes is None or found.peak_bytes >= found.called_bytes
    assert found.open_ms > 0 < found.first_call_ms


def test_a_process_that_fails_is_told(tmp_path):
    with pytest.raises(CheckFailed, match="--no-footprint"):
        measure_footprint(
            Source(b"no model", ONE, takes_task=False), np.zeros((1, 1), "f4"), np.zeros(1)
        )


def test_the_footprint_is_a_command(bank, tmp_path):
    (tmp_path / "model.onnx").write_bytes(bank)
    np.savez(
        tmp_path / "rows.npz", images=np.zeros((3, 5, 4), np.float32), task=np.array([0, 1, 2])
    )
    command = [sys.executable, "-m", "utune_deploy.deploy.bench.footprint", tmp_path / "model.onnx"]
    command += ["--rows", tmp_path / "rows.npz", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["batch"] == 3


def test_nodes_are_profiled_and_their_sums_agree(bank):
    rows, task = np.zeros((2, 5, 4), np.float32), np.array([0, 2])
    found = profile_nodes(Source(bank, ONE), Case(2), rows, task)
    assert (found.gemms, found.attentions) == (2, 0)
    assert {time.name: time.nodes for time in found.groups} == {FFN: 1, TUNERS: 2, HEAD: 1}
    for times in (found.groups, found.operators):
        assert sum(time.ms for time in times) == pytest.approx(found.kernels_ms)
    assert sum(time.nodes for time in found.operators) == 4
    with pytest.raises(UsageError, match="--nodes"):
        profile_nodes(Source(bank, Device("cuda")), Case(2), rows, task)


def test_events_are_medians_without_the_first_call(bank):
    def event(name, us, category="Node"):
        return {
            "cat": category,
            "name": f"{name}_kernel_time",
            "dur": us,
            "args": {"op_name": "MatMul"},
        }

    events = [event("first", us) for us in (9000, 1000, 2000, 6000)]
    events += [event("second", us) for us in (9000, 500, 500, 500)]
    events.append({"cat": "Session", "name": "model_run", "dur": 10, "args": {}})
    found = summarise_events(events, Source(bank).graph, Case(2), [20.0, 4.0, 5.0, 6.0])
    assert (found.calls, found.call_ms, found.kernels_ms) == (3, 5.0, 2.5)
    assert [(time.name, time.ms) for time in found.groups] == [(FFN, 2.0), (TUNERS, 0.5)]
    assert [(time.name, time.nodes, time.ms) for time in found.operators] == [("MatMul", 2, 2.5)]


def test_parts_follow_names_and_neighbours():
    names = ["trunk.norm1.weight", "trunk.norm1.bias"]
    graph = model(
        [
            helper.make_node("LayerNormalization", ["images", *names], ["n"], name="norm"),
            helper.make_node("MatMul", ["n", "val_1"], ["a"], name="up"),
            helper.make_node("Add", ["a", "trunk.mlp.fc1.bias"], ["b"], name="bias"),
            helper.make_node("Relu", ["b"], ["c"], name="act"),
            helper.make_node("Add", ["c", "images"], ["logits"], name="residual"),
        ],
        {"images": (TensorProto.FLOAT, ["batch", 5, 4])},
        {**dict.fromkeys(names, normal(4)), "val_1": normal(4, 4), "trunk.mlp.fc1.bias": normal(4)},
        ("batch", 5, 4),
    )
    assert parts(Source(graph).graph) == {
        "norm": NORM, "up": FFN, "bias": FFN, "act": FFN, "residual": SUMS
    }  # fmt: skip


def test_a_further_task_is_the_slope_between_the_fewest_and_the_most():
    assert per_task([(64, 960), (8, 400), (16, None)]) == 10.0
    assert per_task([(8, 400)]) is per_task([]) is None


class Refused(Exception):
    """What NVML raises."""


def refuse(handle):
    raise Refused


def test_devices_are_asked_through_nvml_where_it_is_installed(monkeypatch):
    nvml = SimpleNamespace(
        NVMLError=Refused, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda handle: b"A Device",
        NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda handle, which: 1000 * which, nvmlDeviceGetTemperature=lambda handle, _: 61,
        nvmlDeviceGetPowerUsage=refuse, nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0b101,
        nvmlClocksThrottleReasonGpuIdle=1, nvmlClocksThrottleReasonSwPowerCap=4, nvmlClocksThrottleReasonNone=0,
    )  # fmt: skip
    monkeypatch.setattr(state_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(state_module.importlib, "import_module", lambda name: nvml)
    (device,) = state_module.read_state(devices=True).devices
    assert device == state_module.DeviceState("A Device", 1000, 2000, 61, None, ("SwPowerCap",))
    assert state_module.read_state(devices=False).devices == ()
