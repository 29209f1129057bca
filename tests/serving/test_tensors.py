"""Tensors of the protocol: every type there and back, as bytes and as JSON, and everything else refused."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from utune_deploy.serving.rejections import InvalidRequest
from utune_deploy.serving.tensors import (
    BYTES,
    DATATYPES,
    InputTensor,
    OutputTensor,
    datatype,
    numbers,
    text_output,
    texts,
)

SAMPLES = {
    kind: np.array([0, 1, 1], bool)
    if kind == "BOOL"
    else np.array([0.0, -1.5, np.finfo(dtype).max], dtype)
    if dtype.kind == "f"
    else np.array([np.iinfo(dtype).min, 1, np.iinfo(dtype).max], dtype)
    for kind, dtype in DATATYPES.items()
}


def given_back(kind: str, array: np.ndarray, form: str) -> np.ndarray:
    """An array through the wire: out as an output, in as an input."""
    out = OutputTensor("x", kind, array)
    content = {
        "bytes": out.raw,
        "view": lambda: memoryview(out.raw()),
        "flat": lambda: json.loads(json.dumps(out.values())),
        "nested": lambda: json.loads(json.dumps(array.tolist())),
    }[form]()
    return numbers(InputTensor("x", kind, array.shape, content))


FORMS = ["bytes", "view", "flat", "nested"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", DATATYPES)
def test_numbers_of_every_type_come_back_bit_for_bit(kind, shape, form):
    wanted = SAMPLES[kind].reshape(shape)
    found = given_back(kind, wanted, form)
    assert (found.dtype, found.shape) == (wanted.dtype, shape)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", DATATYPES)
def test_every_type_has_the_protocols_name(kind):
    assert datatype(DATATYPES[kind].name) == kind


@given(st.data())
@settings(deadline=None)
def test_any_array_of_any_type_comes_back_bit_for_bit(data):
    kind = data.draw(st.sampled_from(sorted(DATATYPES)))
    finite = {"allow_nan": False, "allow_infinity": False} if kind.startswith("FP") else {}
    shape = arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
    wanted = data.draw(arrays.arrays(DATATYPES[kind], shape, elements=finite))
    for form in FORMS:
        assert given_back(kind, wanted, form).tobytes() == wanted.tobytes()


def test_bytes_are_not_copied_and_big_endian_arrays_are_turned():
    raw = np.arange(4, dtype="<f4").tobytes()
    assert not numbers(InputTensor("x", "FP32", (4,), raw)).flags.owndata
    turned = OutputTensor("x", "INT32", np.array([1, 2], dtype=">i4"))
    assert turned.raw() == b"\1\0\0\0\2\0\0\0"
    strided = OutputTensor("x", "FP32", np.arange(6, dtype="f4").reshape(2, 3)[:, :2])
    assert strided.raw() == np.array([0, 1, 3, 4], "<f4").tobytes()
    assert strided.values() == [0.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("kind", "shape", "content"),
    [
        ("FP8", (1,), [1]),
        ("float32", (1,), [1]),
        (BYTES, (1,), ["a"]),
        ("FP32", (2,), [1.0]),
        ("FP32", (1,), [1.0, 2.0]),
        ("FP32", (2, 2), [[1, 2, 3, 4]]),
        ("FP32", (2, 2), [[1, 2], [3]]),
        ("FP32", (4,), [[1, 2], [3, 4]]),
        ("FP32", (1,), ["1"]),
        ("FP32", (1,), [None]),
        ("FP32", (1,), [True]),
        ("FP32", (1,), [{}]),
        ("FP32", (1,), [10**400]),
        ("FP32", (1,), b"abc"),
        ("FP32", (2,), b"abcd"),
        ("FP32", (0,), b"abcd"),
        ("FP32", (2**40, 2**40), b""),
        ("FP32", (0, 2**70), b""),
        ("FP32", (0, 2**70), []),
        ("FP32", (0, 2**62, 2**62), b""),
        ("FP32", (1,) * 100, [1.0]),
        ("FP32", (1,) * 100, b"abcd"),
        ("INT64", (1,), [1.0]),
        ("INT64", (1,), [2**63]),
        ("INT64", (2,), [2**63, -1]),
        ("INT8", (1,), [128]),
        ("INT8", (1,), [-129]),
        ("UINT8", (1,), [-1]),
        ("UINT8", (1,), [256]),
        ("UINT64", (1,), [2**64]),
        ("UINT64", (1,), [-1]),
        ("INT32", (1,), [True]),
        ("BOOL", (1,), [1]),
        ("BOOL", (1,), ["true"]),
        ("BOOL", (2,), b"\0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_numbers_that_are_not_what_they_say_are_refused(kind, shape, content):
    with pytest.raises(InvalidRequest):
        numbers(InputTensor("x", kind, shape, content))


@pytest.mark.parametrize("content", [b"\2", b"\xff\0"])
def test_a_byte_that_is_no_truth_value_is_true(content):
    found = numbers(InputTensor("x", "BOOL", (len(content),), content))
    assert found.astype(np.int64).max() >= 1


@pytest.mark.parametrize(("kind", "largest"), [("FP16", 1e5), ("FP32", 1e39)])
def test_a_number_beyond_a_floats_range_becomes_infinite_without_a_warning(kind, largest):
    found = numbers(InputTensor("x", kind, (2,), [largest, -largest]))
    np.testing.assert_array_equal(found, [np.inf, -np.inf])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=10,
)
sizes = st.integers(0, 4) | st.sampled_from([2**31, 2**63, 2**70])


@given(
    st.sampled_from([*DATATYPES, BYTES, "X"]),
    st.lists(sizes, max_size=4),
    st.lists(json_values, max_size=4) | st.binary(max_size=24),
)
@settings(deadline=None, max_examples=400)
def test_no_content_brings_another_error(kind, shape, content):
    tensor = InputTensor("x", kind, tuple(shape), content)
    for read in (numbers, texts):
        try:
            found = read(tensor)
        except InvalidRequest:
            continue
        if read is numbers:
            assert found.shape == tuple(shape)
        else:
            assert len(found) == math.prod(shape)
            assert all(isinstance(element, (str, bytes)) for element in found)


WORDS = [b"pets", b"", "Fl\u00fcgel".encode(), bytes(range(256))]


def test_elements_of_bytes_come_back():
    out = OutputTensor("x", BYTES, np.array(WORDS, dtype=object).reshape(2, 2))
    assert texts(InputTensor("x", BYTES, (2, 2), out.raw())) == WORDS
    assert texts(InputTensor("x", BYTES, (4, 1), memoryview(out.raw()))) == WORDS
    assert texts(InputTensor("x", BYTES, (4,), WORDS)) == WORDS
    with pytest.raises(InvalidRequest, match="not text, which JSON would need"):
        out.values()


@given(st.lists(st.binary(max_size=20), max_size=6))
@settings(deadline=None)
def test_any_elements_come_back(elements):
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    raw = OutputTensor("x", BYTES, array).raw()
    assert texts(InputTensor("x", BYTES, (len(elements),), raw)) == elements


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ((3,), ["a", "b", "c"]),
        ((3, 1), ["a", "b", "c"]),
        ((3, 1), [["a"], ["b"], ["c"]]),
        ((1, 3), [["a", "b", "c"]]),
        ((1, 3, 1), [[["a"], ["b"], ["c"]]]),
    ],
)
def test_elements_may_be_flat_or_nested_as_their_shape(shape, content):
    assert texts(InputTensor("x", BYTES, shape, content)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ((2,), ["a"]),
        ((1,), ["a", "b"]),
        ((2,), [["a"], ["b"]]),
        ((2, 1), [["a"], "b"]),
        ((2, 1), [[["a"]], [["b"]]]),
        ((1, 3), [["a"], ["b", "c"]]),
        ((1,), [1]),
        ((1,), [None]),
        ((1,), [{}]),
        ((0,), ["a"]),
        ((1,), b""),
        ((1,), b"\1\0\0"),
        ((1,), b"\5\0\0\0abcd"),
        ((1,), b"\xff\xff\xff\xffabcd"),
        ((2,), struct.pack("<I", 1) + b"a"),
        ((1,), struct.pack("<I", 1) + b"ab"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_elements_that_are_not_what_they_say_are_refused(shape, content):
    with pytest.raises(InvalidRequest):
        texts(InputTensor("x", BYTES, shape, content))


def test_a_text_is_one_element():
    out = text_output("reply", "Fl\u00fcgel")
    assert (out.name, out.datatype, out.array.shape) == ("reply", BYTES, (1,))
    assert out.values() == ["Fl\u00fcgel"]
