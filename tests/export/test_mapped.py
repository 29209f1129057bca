"""safetensors read where they lie: the library's own reader is the oracle, and no file brings another error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from utune_deploy.export.mapped import DTYPES, map_file, read_views
from utune_deploy.merge.errors import IncompatibleArtefact

if TYPE_CHECKING:
    from pathlib import Path

TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
}
SHAPES = [(), (1,), (3,), (0,), (2, 0, 4), (2, 3, 5)]


def noise(dtype: object, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.default_rng(1).standard_normal(shape) * 100).astype(dtype)


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_every_type_that_is_known_is_tested() -> None:
    assert {name: dtype.type for name, dtype in DTYPES.items()} == TYPES


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_tensors_are_those_that_the_library_reads(
    kind: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"a": noise(TYPES[kind], shape), "b": noise(np.float32, (3, 2))}
    data = save(tensors, metadata={"key": "value"})
    (tmp_path / "file").write_bytes(data)
    metadata, mapped = map_file(tmp_path / "file")
    assert metadata == {"key": "value"}
    assert set(mapped) == {"a", "b"}
    for name, value in (tensors if kind == "BF16" else load(data)).items():
        assert mapped[name].dtype == value.dtype
        assert mapped[name].shape == value.shape
        assert mapped[name].tobytes() == value.tobytes()
    for name, view in read_views(data, where="memory")[1].items():
        assert view.tobytes() == mapped[name].tobytes()


def test_bfloat16_is_what_torch_reads(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({"a": values}, tmp_path / "file")
    found = map_file(tmp_path / "file")[1]["a"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        found.astype(np.float32), load_file(tmp_path / "file")["a"].float()
    )


def test_a_file_without_tensors_or_metadata_is_read() -> None:
    assert read_views(packed({}), where="memory") == ({}, {})
    assert read_views(save({}, metadata={"a": "b"}), where="memory") == ({"a": "b"}, {})


def test_views_cannot_be_written_to_and_copy_nothing(tmp_path: Path) -> None:
    data = save({"a": noise(np.float32, (1000,)), "b": noise(ml_dtypes.bfloat16, (7,))})
    (tmp_path / "file").write_bytes(data)
    for tensors in (map_file(tmp_path / "file")[1], read_views(data, where="memory")[1]):
        for view in tensors.values():
            assert not view.flags.writeable
            assert not view.flags.owndata
            with pytest.raises(ValueError, match="read-only"):
                view[0] = 1


def test_a_mapped_file_may_be_removed_while_it_is_read(tmp_path: Path) -> None:
    value = noise(np.float32, (5000,))
    path = tmp_path / "file"
    path.write_bytes(save({"a": value}))
    view = map_file(path)[1]["a"]
    path.unlink()
    np.testing.assert_array_equal(view, value)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "a header of no bytes": b"\0" * 8,
    "a header that is cut": packed({"a": ENTRY})[:-9],
    "a header without end": (1 << 62).to_bytes(8, "little") + b"{}",
    "a header as long as a number goes": b"\xff" * 16,
    "no JSON": packed(b"{"),
    "no UTF-8": packed(b'{"\xff": 1}'),
    "nested without end": packed(b"[" * 200_000),
    "a list": packed([]),
    "a number": packed(1),
    "metadata in a list": packed({"__metadata__": [1]}),
    "a tensor that is a number": packed({"a": 1}),
    "a tensor without type": packed({"a": {**ENTRY, "dtype": None}}, bytes(8)),
    "a type of its own": packed({"a": {**ENTRY, "dtype": "F8_E4M3"}}, bytes(8)),
    "a type in a list": packed({"a": {**ENTRY, "dtype": ["F32"]}}, bytes(8)),
    "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "one offset": packed({"a": {**ENTRY, "data_offsets": [0]}}, bytes(8)),
    "three offsets": packed({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, bytes(8)),
    "offsets before the data": packed({"a": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8)),
    "offsets the wrong way": packed({"a": {**ENTRY, "shape": [-2], "data_offsets": [8, 0]}}, bytes(8)),
    "behind the end": packed({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(8)),
    "data that is cut": packed({"a": ENTRY}, bytes(7)),
    "another size": packed({"a": {**ENTRY, "shape": [3]}}, bytes(12)),
    "sizes below nothing": packed({"a": {**ENTRY, "shape": [-1, -2]}}, bytes(8)),
    "an infinite size": packed(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', bytes(8)),
    "an offset that is no number": packed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', bytes(8)),
    "a size beyond an address": packed({"a": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}),
    "sizes beyond an address": packed({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
    "too many axes": packed({"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_malformed_file_is_one_error(bad: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BAD[bad])
    for read in (
        lambda: map_file(tmp_path / "file"),
        lambda: read_views(BAD[bad], where=tmp_path / "file"),
    ):
        with pytest.raises(IncompatibleArtefact, match="no safetensors file") as caught:
            read()
        assert caught.value.details["where"] == str(tmp_path / "file")


@pytest.mark.parametrize("place", ["folder", "nowhere"])
def test_what_is_no_file_is_one_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IncompatibleArtefact, match="no safetensors file"):
        map_file(tmp_path / place)


def only_one_error(data: bytes) -> None:
    try:
        _, tensors = read_views(data, where="memory")
    except IncompatibleArtefact:
        return
    for view in tensors.values():
        view.tobytes()


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes_bring_no_other_error(data: bytes) -> None:
    only_one_error(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
sizes = st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**63, 2**70, -1]) | json_values
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*TYPES, "U8"]) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    },
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3)
    | json_values,
    st.binary(max_size=16),
)
@example({"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}}, bytes(4))
@settings(deadline=None, max_examples=300)
def test_random_headers_bring_no_other_error(header: object, data: bytes) -> None:
    only_one_error(packed(header, data))


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_file_with_a_few_bytes_changed_brings_no_other_error(data: st.DataObject) -> None:
    good = bytearray(save({"a": noise(np.float32, (2, 3)), "b": noise(np.int64, (4,))}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    only_one_error(bytes(good[: data.draw(st.integers(0, len(good)))]))
