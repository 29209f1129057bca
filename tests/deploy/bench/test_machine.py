from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from utune_deploy.deploy.bench import machine
from utune_deploy.deploy.bench.report import TaskFacts, about_bundle
from utune_deploy.export.bundle import Bundle, Engine, Task
from utune_deploy.export.engine import Tensor
from utune_deploy.merge.preprocessing import Preprocessing


def test_the_processor_is_named(tmp_path, monkeypatch):
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nmodel name\t: A Fast One @ 3 GHz\n")
    monkeypatch.setattr(machine, "CPU_FACTS", facts)
    assert machine.read_machine().cpu == "A Fast One @ 3 GHz"


def test_a_processor_without_a_model_name_is_named_by_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPU_FACTS", tmp_path / "absent")
    monkeypatch.setattr("platform.processor", lambda: "aarch64")
    assert machine.read_machine().cpu == "aarch64"


@pytest.mark.parametrize(("text", "wanted"), [("powersave\n", "powersave"), (None, None)])
def test_the_governor_is_read_where_there_is_one(tmp_path, monkeypatch, text, wanted):
    path = tmp_path / "scaling_governor"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(machine, "GOVERNOR", path)
    assert machine.read_machine().governor == wanted


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (
            "echo 'NVIDIA H200, 570.1, 143771 MiB'",
            ("NVIDIA H200, driver 570.1, 143771 MiB",),
        ),
        ("echo 'No devices were found'", ()),
        ("exit 9", ()),
    ],
)
def test_devices_are_those_that_the_driver_lists(tmp_path, monkeypatch, script, wanted):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.read_machine().gpus == wanted


def test_only_installed_distributions_have_a_version(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "surely-not-installed"))
    assert list(machine.read_machine().versions) == ["numpy"]


def test_the_peak_is_never_below_what_is_resident_now():
    now = machine.resident_now()
    assert machine.resident_peak() >= now > 0


def test_a_bundle_says_what_a_report_is_about():
    preprocessing = Preprocessing(size=(64, 32))
    bundle = Bundle(
        path=Path("pets.bundle"),
        name="pets",
        mode="multi",
        bank="inputs",
        engine=Engine(
            target="onnxruntime",
            file="model.onnx",
            precision="fp32",
            opset=20,
            max_batch=8,
            inputs=(
                Tensor("bank/down", "float32", (2, 8, 4)),
                Tensor("images", "float32", ("batch", 3, 64, 32)),
                Tensor("task", "int64", ("batch",)),
            ),
            outputs=(Tensor("logits", "float32", ("batch", 3)),),
        ),
        tasks=(
            Task("cats", 0, ("tabby", "siamese"), preprocessing, "0" * 64),
            Task("dogs", 3, ("pug", "collie", "beagle"), preprocessing, "1" * 64),
        ),
        backbone={"architecture": "vit_tiny_patch16_224"},
        plan={},
        check={},
        versions={},
        identity="ab" * 32,
    )
    about = about_bundle(bundle)
    assert about.tasks == (TaskFacts("cats", 0, 2), TaskFacts("dogs", 3, 3))
    assert about.image_shape == (3, 64, 32)
    assert about.max_batch == 8
    assert ("engine", "onnxruntime, fp32, opset 20") in about.facts
    assert ("backbone", "vit_tiny_patch16_224") in about.facts
    assert about.inputs == ()
    assert about.reads == (Tensor("images", "float32", ("batch", 3, 64, 32)),)
    ids = Tensor("ids", "int64", ("batch", 8), 30)
    features = Tensor("feats", "float32", ("batch", 4, 6))
    engine = replace(bundle.engine, inputs=(ids, features, bundle.engine.inputs[-1]))
    plain = tuple(replace(task, labels=(), width=6) for task in bundle.tasks)
    about = about_bundle(replace(bundle, engine=engine, tasks=plain))
    assert about.image_shape is None
    assert about.inputs == about.reads == (ids, features)
    assert [task.classes for task in about.tasks] == [6, 6]
    assert {("ids", "8 int64"), ("feats", "4 x 6 float32")} <= set(about.facts)
