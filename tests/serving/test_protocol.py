"""Wire tensors: bytes and lists in, bytes and lists out."""

from __future__ import annotations

import re

import numpy as np
import pytest

from utune_deploy.export.engine import Device
from utune_deploy.serving import protocol
from utune_deploy.serving.protocol import InputTensor, OutputRequest
from utune_deploy.serving.registry import Registry
from utune_deploy.serving.rejections import InvalidRequest, one_line
from utune_deploy.serving.service import Service

SHAPE = (2, 3, 8, 8)
PIXELS = np.arange(2 * 3 * 8 * 8, dtype=np.float32).reshape(SHAPE)
NAMES = b"\x04\0\0\0pets\x04\0\0\0cars"


RAW = PIXELS.tobytes()


def _images(content=RAW, shape=SHAPE, datatype="FP32") -> InputTensor:
    return InputTensor("images", datatype, shape, content, "m")


def _task(content=NAMES, shape=(2, 1), datatype="BYTES") -> InputTensor:
    return InputTensor("task", datatype, shape, content, "m")


@pytest.mark.parametrize(
    "images",
    [_images(), _images(PIXELS.tolist()), _images(PIXELS.ravel().tolist())],
    ids=["raw", "nested", "flat"],
)
@pytest.mark.parametrize(
    "task",
    [
        _task(),
        _task(shape=(2,)),
        _task(["pets", "cars"]),
        _task([["pets"], ["cars"]]),
        _task([b"pets", b"cars"], shape=(2,)),
    ],
)
def test_every_spelling_reads_the_same(service, images, task):
    request = protocol.read_request(service.registry, [task, images])
    assert request.inputs["images"].tobytes() == PIXELS.tobytes()
    assert request.tasks == ("pets", "cars")


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([], r"expected 2 inputs but got 0 .* missing required input\(s\) \['images','task'\]"),
        ([_task()], r"Got input\(s\) \['task'\], but missing required input\(s\) \['images'\]"),
        ([_images()], r"missing required input\(s\) \['task'\].* one of pets, cars, flowers"),
        ([_images(), _images(), _task()], "input 'images' already exists in request"),
        ([_images(), InputTensor("x", "FP32", (1,), [1])], "unexpected inference input 'x'"),
        (
            [_images(datatype="FP64"), _task()],
            "data-type is 'FP64', but model 'tiny' expects 'FP32'",
        ),
        (
            [_images(), _task(datatype="INT64")],
            "data-type is 'INT64', but model 'tiny' expects 'BYTES'",
        ),
        ([_images(PIXELS.tobytes()[:-1]), _task()], "for model 'm'. Expected 1536, got 1535"),
        ([_images(PIXELS.ravel()[1:].tolist()), _task()], "Expected 1536, got 1532"),
        ([_images(PIXELS.reshape(2, -1).tolist()), _task()], "does not hold"),
        ([_images(shape=(2, 3, 8, 9)), _task()], r"Expected \[-1,3,8,8\], got \[2,3,8,9\]"),
        (
            [_images(shape=(10**9, 10**9)), _task()],
            r"unexpected shape .* got \[1000000000,1000000000\]",
        ),
        ([_images(shape=()), _task()], r"unexpected shape .* got \[\]"),
        ([_images([[1.0], [1.0, 2.0]]), _task()], "wrong kind"),
        ([_images(["1.5"] * 384), _task()], "wrong kind"),
        ([_images([None] * 384), _task()], "wrong kind"),
        ([_images([True] * 384), _task()], "wrong kind"),
        ([_images([10**400] * 384), _task()], "wrong kind"),
        ([_images([1e39] * 384), _task()], "not finite"),
        ([_images([float("nan")] * 384), _task()], "not finite"),
        ([_images(), _task(NAMES[:-1])], "expecting string of length 4 but only 3 bytes"),
        ([_images(), _task(NAMES[:10])], "length indicator .* expecting 4 bytes but only 2 bytes"),
        ([_images(), _task(b"\xff\xff\xff\xffpets")], "length 4294967295 but only 4 bytes"),
        ([_images(), _task(["pets"])], "expected 2 string elements .* for model 'm', got 1"),
        ([_images(), _task(["pets"] * 4)], "elements 3 for .* expecting 2 .*found: 4 elements"),
        ([_images(), _task([1, 2])], "wrong kind"),
        ([_images(), _task([None, "pets"])], "wrong kind"),
        ([_images(), _task(shape=(1, 2))], "wrong shape"),
        ([_images(), _task(b"\x01\0\0\0\xff\x04\0\0\0cars")], "UTF-8"),
    ],
)
def test_a_malformed_tensor_has_its_own_sentence(service, inputs, sentence):
    with pytest.raises(InvalidRequest) as refusal:
        protocol.read_request(service.registry, inputs)
    assert re.search(sentence, one_line(refusal.value))


def test_outputs_come_in_the_models_order_and_only_those_asked_for(service):
    answers = service.answer(PIXELS / 100, ["pets", "cars"])
    everything = protocol.write_answers(service.registry, answers)
    assert [(t.name, t.datatype, t.array.shape) for t in everything] == [
        ("logits", "FP32", (2, 5)),
        ("label", "BYTES", (2, 1)),
        ("score", "FP32", (2, 1)),
    ]
    some = [OutputRequest("score"), OutputRequest("label")]
    tensors = protocol.write_answers(service.registry, answers, some)
    assert [t.name for t in tensors] == ["label", "score"]


def test_values_and_bytes_say_the_same(service):
    answers = service.answer(PIXELS / 100, ["pets", "cars"])
    logits, label, _ = protocol.write_answers(service.registry, answers)
    assert np.array(logits.values(), np.float32).tobytes() == logits.raw()
    assert label.values() == list(answers.labels)
    first, second = (text.encode() for text in answers.labels)
    head = [len(text).to_bytes(4, "little") for text in (first, second)]
    assert label.raw() == head[0] + first + head[1] + second


def test_classes_are_the_rows_own_best_first(service):
    answers = service.answer(PIXELS / 100, ["pets", "cars"])
    asked = [OutputRequest("logits", classes=9)]
    (tensor,) = protocol.write_answers(service.registry, answers, asked)
    assert tensor.datatype == "BYTES"
    cells = tensor.array.tolist()
    for row, (task, count) in enumerate((("pets", 5), ("cars", 3))):
        best = np.argsort(-answers.logits[row, :count])
        assert [cell.split(b":", 1)[1].decode() for cell in cells[row][:count]] == [
            f"{index}:{task}-{index}" for index in best
        ]
        assert cells[row][count:] == [b""] * (5 - count)


@pytest.mark.parametrize(
    "output", [OutputRequest("x"), OutputRequest("label", 1), OutputRequest("logits", -1)]
)
def test_an_output_that_is_not_there_is_refused(service, output):
    with pytest.raises(InvalidRequest):
        protocol.check_outputs(service.registry, [output])


def test_the_task_is_optional_only_where_there_is_one(service, single):
    several = protocol.model_config(service.registry, max_delay_ms=1)
    alone = protocol.model_config(Registry(single), max_delay_ms=0)
    assert [entry.get("optional", False) for entry in several["input"]] == [False, False]
    assert [entry.get("optional", False) for entry in alone["input"]] == [False, True]
    assert several["dynamic_batching"]["max_queue_delay_microseconds"] == 1000


IDS = np.arange(12, dtype=np.int64).reshape(2, 6) % 11
MASK = InputTensor("attention_mask", "INT64", (2, 6), [1] * 12)
FEATS = InputTensor("visual_feats", "FP32", (2, 2, 4), [0.5] * 16)


@pytest.mark.parametrize("content", [IDS.tobytes(), IDS.tolist(), IDS.ravel().tolist()])
def test_integers_read_the_same_in_every_spelling(text, content):
    ids = InputTensor("input_ids", "INT64", (2, 6), content)
    request = protocol.read_request(Registry(text), [FEATS, _task(), ids, MASK])
    assert request.inputs["input_ids"].dtype == np.int64
    assert request.inputs["input_ids"].tolist() == IDS.tolist()
    assert request.inputs["visual_feats"].tolist() == [[[0.5] * 4] * 2] * 2


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (InputTensor("input_ids", "FP32", (2, 6), [1.0] * 12), "expects 'INT64'"),
        (InputTensor("input_ids", "INT64", (2, 6), IDS.tobytes()[:-4]), "Expected 96, got 92"),
        (InputTensor("input_ids", "INT64", (2, 6), [1.0] * 12), "a list of integers"),
        (InputTensor("input_ids", "INT64", (2, 6), [True] * 12), "a list of integers"),
        (InputTensor("input_ids", "INT64", (2, 6), ["1"] * 12), "a list of integers"),
        (InputTensor("input_ids", "INT64", (2, 6), [2**63] * 12), "a list of integers"),
        (InputTensor("input_ids", "INT64", (2, 6), [2**63, -1] * 6), "a list of integers"),
        (InputTensor("input_ids", "INT64", (2, 6), [2**70] * 12), "a list of integers"),
        (InputTensor("input_ids", "INT64", (2, 6), [2**62] * 12), "out of range"),
        (InputTensor("input_ids", "INT64", (2, 6), [1] * 11), "Expected 96, got 88"),
    ],
)
def test_integers_that_are_none_have_their_own_sentence(text, ids, sentence):
    with pytest.raises(InvalidRequest, match=sentence):
        protocol.read_request(Registry(text), [ids, MASK, FEATS, _task()])


def test_the_metadata_lists_every_input_in_the_engines_order(text):
    assert protocol.model_metadata(Registry(text))["inputs"] == [
        {"name": "input_ids", "datatype": "INT64", "shape": [-1, 6]},
        {"name": "attention_mask", "datatype": "INT64", "shape": [-1, 6]},
        {"name": "visual_feats", "datatype": "FP32", "shape": [-1, 2, 4]},
        {"name": "task", "datatype": "BYTES", "shape": [-1, 1]},
    ]
    with pytest.raises(InvalidRequest, match=r"missing required input\(s\) \['input_ids','task'\]"):
        protocol.read_request(Registry(text), [MASK, FEATS])


def test_an_answer_without_labels_is_its_logits(arrays):
    service = Service.open(arrays, Device(threads=1))
    metadata = protocol.model_metadata(service.registry)
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 2, 5]}]
    answers = service.answer(PIXELS / 100, ["pets", "cars"])
    (tensor,) = protocol.write_answers(service.registry, answers)
    assert tensor.array.shape == (2, 2, 5)
    for output in (OutputRequest("label"), OutputRequest("score"), OutputRequest("logits", 2)):
        with pytest.raises(InvalidRequest):
            protocol.check_outputs(service.registry, [output])


def test_all_tasks_are_one_model_more(two_engines):
    every = Service.open(two_engines, Device(threads=1), all_tasks=True)
    metadata = protocol.model_metadata(every.registry)
    assert metadata["name"] == "tiny.all"
    assert [entry["name"] for entry in metadata["inputs"]] == ["images"]
    tensors = protocol.write_answers(every.registry, every.answer(PIXELS / 100))
    assert [(t.name, t.datatype, t.array.shape) for t in tensors] == [
        ("logits", "FP32", (2, 3, 5)),
        ("task", "BYTES", (2, 3)),
        ("label", "BYTES", (2, 3)),
        ("score", "FP32", (2, 3)),
    ]
    assert tensors[1].values() == ["pets", "cars", "flowers"] * 2
    for row, answers in enumerate(every.answer_all(PIXELS / 100)):
        assert tensors[0].array[row].tobytes() == answers.logits.tobytes()
        assert [label.decode() for label in tensors[2].array[row]] == list(answers.labels)
    with pytest.raises(InvalidRequest, match="unexpected inference input 'task'"):
        protocol.read_request(every.registry, [_images(), _task()])
    with pytest.raises(InvalidRequest, match="cannot be given as classes"):
        protocol.check_outputs(every.registry, [OutputRequest("logits", 2)])
