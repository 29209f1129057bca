"""The file for perf_analyzer: every entry is a request that a server answers."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

from utune_deploy.serving import perf_analyzer, protocol
from utune_deploy.serving.greeting import greeting
from utune_deploy.serving.registry import Registry
from utune_deploy.serving.servers.ports import Addresses


@pytest.mark.parametrize("kind", ["bundle", "single", "text", "arrays", "fan_out"])
def test_every_entry_is_answerable(request, tmp_path, kind):
    bundle = request.getfixturevalue(kind)
    registry = Registry(bundle)
    perf_analyzer.write(tmp_path / "requests.json", bundle)
    entries = json.loads((tmp_path / "requests.json").read_text())["data"]
    datatypes = {facts.name: facts.datatype for facts in protocol.model_inputs(registry)}
    asked = []
    for entry in entries:
        assert set(entry) == set(datatypes)
        tensors = [
            protocol.InputTensor(name, datatypes[name], (1, *value["shape"]), value["content"])
            for name, value in entry.items()
        ]
        checked = protocol.read_request(registry, tensors)
        assert len(checked) == 1
        asked += checked.tasks
    assert len(entries) == 8
    assert asked == [registry.names[number % len(registry.names)] for number in range(8)]


def test_float_numbers_have_a_decimal_point_and_integers_none(text, bundle):
    for name, value in perf_analyzer.requests(text)["data"][0].items():
        kind = {"visual_feats": float, "task": str}.get(name, int)
        assert {type(number) for number in value["content"]} == {kind}
    words = json.dumps(perf_analyzer.requests(bundle)["data"][0]["images"]["content"])
    assert all("." in word for word in words.strip("[]").split(", "))


def test_each_task_has_an_entry_and_rows_differ(bundle):
    entries = perf_analyzer.requests(bundle, entries=1)["data"]
    assert [entry["task"]["content"] for entry in entries] == [["pets"], ["cars"], ["flowers"]]
    pictures = [np.array(entry["images"]["content"]) for entry in entries]
    assert len({picture.tobytes() for picture in pictures}) == 3


def test_the_greeting_prints_the_command(bundle, tmp_path):
    addresses = Addresses(http="127.0.0.1:1", grpc="127.0.0.1:2")
    path = tmp_path / "a file.json"

    def command(**settings) -> list[str]:
        text = greeting(bundle, addresses, server="embedded", provider="cpu", **settings)
        (line,) = [line for line in text.splitlines() if "perf_analyzer -m" in line]
        return shlex.split(line)

    assert command(perf_input=path)[-2:] == ["--input-data", str(path)]
    assert command()[-1] == "FILE"
    assert command()[:7] == ["perf_analyzer", "-m", "tiny", "-i", "grpc", "-u", "127.0.0.1:2"]
