"""One task in one file: what is written is what is read, and no file brings another error than its own."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from utune_deploy.merge.errors import IncompatibleArtefact
from utune_deploy.serving.tasks.packed import (
    METADATA,
    Packed,
    Probe,
    layout_json,
    read_packed,
    write_packed,
)

HEAD = "bank/head/weight"


@pytest.mark.parametrize("probe", [True, False])
def test_a_task_is_read_as_it_was_written(make_task, probe):
    wanted = make_task("birds", seed=3, probe=probe).packed
    found = read_packed(write_packed(wanted))
    assert (found.task, found.identity, found.fingerprint) == (
        wanted.task, wanted.identity, wanted.fingerprint,
    )  # fmt: skip
    assert set(found.tensors) == set(wanted.tensors)
    for name, value in wanted.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value)
    assert (found.probe is None) == (not probe)
    if found.probe is not None:
        assert found.probe.budget == wanted.probe.budget
        assert found.probe.logits.dtype == np.float64
        np.testing.assert_array_equal(found.probe.logits, wanted.probe.logits)
        np.testing.assert_array_equal(found.probe.inputs["images"], wanted.probe.inputs["images"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_tensors_of_half_precision_stay_what_they_are(make_task, dtype):
    made = make_task("birds")
    tensors = {name: value.astype(dtype).T for name, value in made.packed.tensors.items()}
    found = read_packed(made.changed(tensors=tensors).data).tensors
    for name, value in tensors.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], value)


def test_the_same_task_gives_the_same_bytes(make_task):
    assert (
        make_task("birds", seed=3, probe=True).data == make_task("birds", seed=3, probe=True).data
    )


def test_tasks_without_labels_and_without_pictures_are_packed(make_task):
    task = make_task("birds").changed(labels=(), width=4, preprocessing=None)
    found = read_packed(task.data).task
    assert (found.labels, found.width, found.preprocessing) == ((), 4, None)


def test_a_sender_learns_what_it_must_know_of_a_bundle(inputs_bundle):
    assert layout_json(inputs_bundle) == {
        "identity": inputs_bundle.identity, "fingerprint": "f" * 64, "precision": "fp32", "slots": [],
    }  # fmt: skip


def facts_of(made) -> dict:
    data = made.data
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"][METADATA])


def file_of(made, facts: object) -> bytes:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    tensors = {**made.packed.tensors, "probe/images": np.zeros((1, 3, 8, 8), np.float32)}
    return save({**tensors, "probe/logits": np.zeros((1, 3))}, metadata={METADATA: text})


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "no safetensors file"),
        (b"hello", "no safetensors file"),
        (save({"a": np.zeros(3)}), "the file is no packed task"),
        (save({"a": np.zeros(3)}, metadata={"other": "text"}), "the file is no packed task"),
        (save({"a": np.zeros(3)}, metadata={METADATA: "{"}), "lacks a field"),
        (save({"a": np.zeros(3)}, metadata={METADATA: "[" * 100_000}), "lacks a field"),
        (save({"a": np.zeros(3)}, metadata={METADATA: "[]"}), "lacks a field"),
        (save({"a": np.zeros(3)}, metadata={METADATA: "{}"}), "lacks a field"),
    ],
    ids=["nothing", "text", "no metadata", "a delta", "no JSON", "nested", "a list", "no fields"],
)
def test_what_is_no_packed_task_is_one_error(data, sentence):
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read_packed(data)


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "utune-delta"}, {"version": None}])
def test_another_format_is_refused(make_task, change):
    made = make_task("birds", probe=True)
    with pytest.raises(IncompatibleArtefact, match="unknown format or version"):
        read_packed(file_of(made, facts_of(made) | change))


@pytest.mark.parametrize(
    "field", ["format", "version", "identity", "fingerprint", "task", "budget"]
)
def test_every_field_is_needed(make_task, field):
    made = make_task("birds", probe=True)
    facts = facts_of(made)
    del facts[field]
    with pytest.raises(IncompatibleArtefact, match="lacks a field"):
        read_packed(file_of(made, facts))


def test_a_probe_needs_its_answers(make_task):
    made = make_task("birds", probe=True)
    packed = made.packed
    inputs = {**packed.probe.inputs}
    tensors = {**packed.tensors, **{f"probe/{name}": value for name, value in inputs.items()}}
    with pytest.raises(IncompatibleArtefact, match="lacks a field"):
        read_packed(save(tensors, metadata={METADATA: json.dumps(facts_of(made))}))


@pytest.mark.parametrize(
    "budget",
    ["NaN", "1e999", "1" + "0" * 400, "null", "[]", '"wide"', "-Infinity"],
    ids=lambda text: text[:9],
)
def test_a_budget_that_is_no_number_of_use_is_refused(make_task, budget):
    made = make_task("birds", probe=True)
    text = json.dumps(facts_of(made) | {"budget": "HERE"}).replace('"HERE"', budget)
    with pytest.raises(IncompatibleArtefact, match="lacks a field"):
        read_packed(file_of(made, text))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.data())
@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_field_of_any_other_value_brings_no_other_error(make_task, data):
    made = make_task("birds", probe=True)
    facts = facts_of(made)
    place = data.draw(st.sampled_from([facts, facts["task"], facts["task"]["preprocessing"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    try:
        packed = read_packed(file_of(made, facts))
    except IncompatibleArtefact:
        return
    assert isinstance(packed, Packed)
    assert all(isinstance(label, str) for label in packed.task.labels)
    assert isinstance(packed.probe, Probe)
