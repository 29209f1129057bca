"""A delta's file: the same bytes every time, whole or not at all, and a sentence for every damage."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from utune_deploy.merge import delta as delta_module
from utune_deploy.merge.attach import restore
from utune_deploy.merge.backbone import Backbone, Identity
from utune_deploy.merge.delta import Delta, load_delta, require_backbone, save_delta, validate
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.files import atomic_file, atomic_folder, canonical_json, digest
from utune_deploy.merge.methods import (
    bitfit,
    deep_prompt,
    head_branch,
    lora,
    parallel_adapter,
    prefix,
)
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.merge.sites import measure
from utune_deploy.merge.tuner import Branch, Point
from utune_deploy.merge.tuners import TUNERS
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import ACTIVATIONS, Bottleneck
from utune_deploy.merge.tuners.bypass import Bypass
from utune_deploy.merge.tuners.class_and_mean import ClassAndMean
from utune_deploy.merge.tuners.difference import Difference
from utune_deploy.merge.tuners.embedding import Embedding
from utune_deploy.merge.tuners.gain import Gain
from utune_deploy.merge.tuners.gpo import Gpo
from utune_deploy.merge.tuners.head import Head
from utune_deploy.merge.tuners.kronecker import Kronecker
from utune_deploy.merge.tuners.ladder import Ladder
from utune_deploy.merge.tuners.norm import Norm
from utune_deploy.merge.tuners.perceptron import Perceptron
from utune_deploy.merge.tuners.prefix import Prefix
from utune_deploy.merge.tuners.prompt import Prompt
from utune_deploy.merge.tuners.rotation import Rotation
from utune_deploy.merge.tuners.side_network import SideNetwork
from utune_deploy.merge.tuners.unipt import UniPT
from utune_deploy.merge.tuners.unipt_pyramid import UniPTPyramid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

IDENTITY = Identity("vit_tiny_patch16_224", {"img_size": 32}, "0" * 64)
FIRST = "18dcdeb3057d649072dc84f1107ac08f25b77be7b43c08fd2e8510d27d61c0c2"
SECOND = "4979992bb0db9309ec97272a8e0e538f8292e13925307652b8cb6b9cd27eec70"
THIRD = "9a1666dc83408667628af3bb946ca202034c8f56dbaff26c9b1835d96e3b19fe"
GOLDEN = "d10fc3cd82b6597ade1db7f2d1d8e54d0c6e71deb1d02073fa66b4daf958e9df"


def point(text: str) -> Point:
    return Point.parse(text)


def tiny(*, age: int = 3) -> Delta:
    """A fixed delta of every kind, small enough to be read in a hex dump.

    At age 0 it has only the kinds and settings that version 1 of the format began with, at age 1 those
    before networks beside the trunk and heads of several layers, at age 2 those before heads of two taps.
    """
    name, head = head_branch("head")
    op = point("blocks.0.attn.qkv:output")
    branches = {
        "lora": Branch(Bottleneck("identity", bias=False), point("blocks.0.attn.qkv:input"), op),
        "adapter": Branch(Bottleneck("gelu", bias=True), *[point("blocks.0.mlp:output")] * 2),
        "prefix": Branch(Prefix(joint_softmax=True), *[point("blocks.0.attn:keys")] * 2),
        "prompt": Branch(Prompt(), *[point("blocks.0:tokens")] * 2),
        "shift": Branch(Bias(), op, op),
        name: head,
    }
    norm, image = point("blocks.0.norm1:output"), point("patch_embed.proj:input")
    if age >= 1:
        branches |= {
            "normed": Branch(Bottleneck("relu", bias=False, norm="in", eps=1e-6), image, op),
            "patches": Branch(
                Bottleneck("relu", bias=False), point("patch_embed.proj:patches"), op
            ),
            "kronecker": Branch(Kronecker(2, 3), point("blocks.0.attn.qkv:input"), op),
            "rotation": Branch(Rotation(2, 2, 1), *[point("blocks.0.attn.qkv:input")] * 2),
            "gain": Branch(Gain(shift=True), norm, norm),
            "norm": Branch(Norm(1e-6), point("blocks.0.norm1:input"), norm),
            "shallow": Branch(
                Prompt(joint_softmax=False), point("blocks.0:tokens"), point("blocks.1:tokens")
            ),
            "side": Branch(SideNetwork("fcn4"), image, point("norm:input")),
            "bypass": Branch(
                Bypass(1, "gelu"),
                point("blocks.0:input"),
                point("norm:input"),
                (point("blocks.0:output"),),
            ),
            "token": Branch(Difference("cls_token", (1, 1, 2)), *[point(":weights")] * 2),
        }
    if age >= 2:
        first, last, mask = (point(f"{name}:output") for name in ("blocks.0", "blocks.1", "mask"))
        top, second = point("head:input"), "second"
        branches |= {
            "unipt": Branch(
                UniPT((2,), 2, 1, 3, own="end", guard="clamp", eps=1e-6, masked=True),
                first, top, (last, mask, point("end:output")),
            ),
            "pyramid": Branch(
                UniPTPyramid((2, 1), 2, 1, 3, "batch", gives="mean", cells=(4, 2)),
                image, top, (first, last),
            ),
            "ladder": Branch(Ladder((2, 2), 2, 2, 3, 3, gives="mean"), first, top, (last,)),
            "gpo": Branch(Gpo(17, 2, 1, masked=True), last, top, (mask,)),
            "perceptron": Branch(
                Perceptron((2,), "gelu", 1e-12),
                point(f"{second}:input"), point(f"{second}:output"),
            ),
            "embedding": Branch(
                Embedding(2, unit=True), point("third:input"), point("third:output")
            ),
        }  # fmt: skip
    if age >= 3:
        taps = point("fourth:input"), point("fourth:output"), (point("norm:output"),)
        branches["beside"] = Branch(ClassAndMean(5), *taps)
    sizes = {"in": 2, "out": 3, "r": 2, "c": 2, "d": 1}
    tensors, value = {}, 0
    for branch, where in branches.items():
        tensors[branch] = {}
        for tensor, axes in where.tuner.shapes.items():
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in axes]
            count = math.prod(shape)
            tensors[branch][tensor] = (torch.arange(value, value + count) / 8).reshape(shape)
            value += count
    return Delta(
        "digits",
        ("null", "ein\u015b"),
        Preprocessing((32, 32)),
        IDENTITY,
        branches,
        tensors,
        {"method": "by hand", "seed": "0"},
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_delta(path, tiny())
    return path


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None) -> Path:
    save_file(dict(tensors), path, metadata=metadata)
    return path


def flat(delta: Delta) -> dict[str, torch.Tensor]:
    return {f"{b}/{n}": t.clone() for b, named in delta.tensors.items() for n, t in named.items()}


def header(delta: Delta) -> dict[str, Any]:
    return delta_module._header(delta)


def refused(action: Callable[[], Any], sentence: str) -> IncompatibleArtefact:
    """The action is refused with this sentence and the exit code of a damaged artefact."""
    with pytest.raises(IncompatibleArtefact, match=sentence) as caught:
        action()
    assert caught.value.exit_code == 4
    return caught.value


# Bytes


def test_golden_bytes(written, tmp_path):
    """The format does not drift: a changed hash is a new version of the format."""
    assert hashlib.sha256(written.read_bytes()).hexdigest() == GOLDEN
    for age, wanted in enumerate((FIRST, SECOND, THIRD, GOLDEN)):
        found = save_delta(tmp_path / f"{age}", tiny(age=age))
        assert found == wanted, (
            "settings that were added later are not written where they are defaults"
        )
        assert save_delta(tmp_path / f"{age} again", load_delta(tmp_path / f"{age}")) == wanted


def test_settings_that_a_file_does_not_name_are_the_defaults(tmp_path):
    path = write(tmp_path / "a", flat(tiny()), {"utune": canonical_json(header(tiny()))})
    loaded = load_delta(path)
    assert branch_of(header(loaded), "adapter")["settings"] == {"activation": "gelu", "bias": True}
    assert loaded.branches["adapter"].tuner == Bottleneck("gelu", True, "none", 1e-5)
    assert branch_of(header(loaded), "prompt")["settings"] == {}
    assert branch_of(header(loaded), "shallow")["settings"] == {"joint_softmax": False}
    assert branch_of(header(loaded), "bypass")["tap"] == ["blocks.0:input", "blocks.0:output"]
    assert branch_of(header(loaded), "lora")["tap"] == "blocks.0.attn.qkv:input"
    assert branch_of(header(loaded), "embedding")["settings"] == {"size": 2, "unit": True}
    assert branch_of(header(loaded), "gpo")["tap"] == ["blocks.1:output", "mask:output"]


def test_defaults_that_a_file_names_are_refused(tmp_path):
    """One delta has one header: what may be left out is left out."""
    values = header(tiny())
    branch_of(values, "adapter")["settings"]["norm"] = "none"
    path = write(tmp_path / "a", flat(tiny()), {"utune": canonical_json(values)})
    refused(lambda: load_delta(path), "surplus or of another type")
    values = header(tiny())
    branch_of(values, "lora")["tap"] = ["blocks.0.attn.qkv:input"]
    path = write(tmp_path / "b", flat(tiny()), {"utune": canonical_json(values)})
    refused(lambda: load_delta(path), "surplus or of another type")


def test_the_same_delta_gives_the_same_bytes(written, tmp_path):
    again, loaded = tmp_path / "again.safetensors", tmp_path / "loaded.safetensors"
    first = digest(written)
    assert save_delta(again, tiny()) == first
    assert save_delta(loaded, load_delta(written)) == first
    assert digest(again) == digest(loaded) == first


def test_loading_gives_what_was_saved(written):
    before, after = tiny(), load_delta(written)
    assert replace(after, tensors={}) == replace(before, tensors={})
    assert list(after.branches) == list(before.branches)
    assert flat(after).keys() == flat(before).keys()
    for name, tensor in flat(before).items():
        assert torch.equal(flat(after)[name], tensor), name
    assert after.parameters == before.parameters
    assert after.head == "head/head"
    assert {branch.tuner.kind for branch in after.branches.values()} == set(TUNERS), (
        "a new kind belongs into `tiny`"
    )


def test_views_and_shared_tensors_are_saved(tmp_path):
    """A tensor that is a view of another is written as values of its own."""
    delta = tiny()
    table = torch.arange(12.0).reshape(2, 6)
    tensors = {**delta.tensors, "prefix": {"key": table[:, :3], "value": table[:, 3:]}}
    save_delta(tmp_path / "a", replace(delta, tensors=tensors))
    loaded = load_delta(tmp_path / "a").tensors["prefix"]
    assert torch.equal(loaded["key"], table[:, :3])
    assert torch.equal(loaded["value"], table[:, 3:])


# Whole or not at all


def test_an_existing_file_is_kept_unless_forced(written):
    first = digest(written)
    other = replace(tiny(), task="other")
    with pytest.raises(UsageError, match="already exists") as caught:
        save_delta(written, other)
    assert caught.value.exit_code == 2
    assert digest(written) == first
    assert save_delta(written, other, force=True) != first
    assert load_delta(written).task == "other"
    assert list(written.parent.iterdir()) == [written]


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(written, monkeypatch):
    first = digest(written)

    def half(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(delta_module, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_delta(written, tiny(), force=True)
    assert digest(written) == first
    assert list(written.parent.iterdir()) == [written]


def interrupted(path: Path) -> None:
    path.write_text("half")
    raise KeyError


def test_atomic_file_and_folder(tmp_path):
    target, folder = tmp_path / "deep" / "file", tmp_path / "deep" / "folder"
    for _ in range(2):  # new, then replaced
        with atomic_file(target) as path:
            path.write_text("whole")
        with atomic_folder(folder) as path:
            (path / "one").write_text("whole")
    for context, name in ((atomic_file, target), (atomic_folder, folder)):
        with pytest.raises(KeyError), context(name) as path:
            interrupted(path / "one" if path.is_dir() else path)
    assert target.read_text() == (folder / "one").read_text() == "whole"
    assert sorted(p.name for p in target.parent.iterdir()) == ["file", "folder"]
    umask_mode = (tmp_path / "deep").stat().st_mode & 0o777
    assert folder.stat().st_mode & 0o777 == umask_mode
    assert target.stat().st_mode & 0o777 == umask_mode & 0o666


def test_a_delta_that_could_not_be_read_is_not_written(tmp_path):
    refused(lambda: save_delta(tmp_path / "a", replace(tiny(), labels=("one",))), "labels")
    stray = {**tiny().tensors, "stray": {"x": torch.ones(1)}}
    refused(lambda: save_delta(tmp_path / "a", replace(tiny(), tensors=stray)), "does not declare")
    assert list(tmp_path.iterdir()) == []


# Damaged files


def test_no_such_file(tmp_path):
    with pytest.raises(UsageError, match="no such file") as caught:
        load_delta(tmp_path / "none")
    assert caught.value.exit_code == 2


def test_truncated_at_every_tenth_byte(tmp_path):
    save_delta(tmp_path / "whole", tiny(age=0))
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "short"
    for length in [*range(0, len(whole), 10), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(lambda: load_delta(path), "truncated or not safetensors")
    path.write_bytes(whole + b"\0")
    refused(lambda: load_delta(path), "truncated or not safetensors")


@pytest.mark.parametrize(
    "data", [b"PK\3\4" * 50, bytes(range(256)) * 9, struct.pack("<Q", 1 << 62)]
)
def test_garbage(data, tmp_path):
    path = tmp_path / "garbage"
    path.write_bytes(data)
    refused(lambda: load_delta(path), "truncated or not safetensors")


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"utune": "{}", "format": "pt"}, {"Utune": "{}"}]
)
def test_not_a_delta(metadata, tmp_path):
    path = write(tmp_path / "plain", flat(tiny()), metadata)
    refused(lambda: load_delta(path), "the file is not a delta")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "{}", '{"format": "utune-delta"}'])
def test_malformed_header(text, tmp_path):
    path = write(tmp_path / "a", flat(tiny()), {"utune": text})
    refused(lambda: load_delta(path), "the header of the delta is malformed")


@pytest.mark.parametrize(
    ("key", "value"), [("version", 2), ("version", "1"), ("version", None), ("format", "lora")]
)
def test_unknown_version(key, value, tmp_path):
    text = canonical_json({**header(tiny()), key: value})
    path = write(tmp_path / "a", flat(tiny()), {"utune": text})
    refused(lambda: load_delta(path), "unknown format or version")


PREPROCESSING = {"size": [32, 32], "interpolation": "bicubic", "crop": 1.0}
PREPROCESSING |= {"mean": [0.5] * 3, "std": [0.5] * 3}


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The tiny delta with a header that was edited."""
    values = json.loads(json.dumps(header(tiny())))
    edit(values)
    return write(path, flat(tiny()), {"utune": json.dumps(values)})


def branch_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in values["branches"] if entry["name"] == name)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        f"no {key}": (lambda h, key=key: h.pop(key), "lacks a field")
        for key in ("task", "labels", "preprocessing", "backbone", "branches", "provenance")
    },
    **{
        f"no {key} in a branch": (
            lambda h, key=key: branch_of(h, "lora").pop(key),
            "lacks a field",
        )
        for key in ("name", "kind", "tap", "add", "settings")
    },
    **{
        f"no {key} in the backbone": (lambda h, key=key: h["backbone"].pop(key), "lacks a field")
        for key in ("architecture", "arguments", "fingerprint")
    },
    "branches is a number": (lambda h: h.update(branches=3), "lacks a field"),
    "branches holds text": (lambda h: h.update(branches=["lora"]), "lacks a field"),
    "labels is a number": (lambda h: h.update(labels=2), "lacks a field"),
    "provenance is a list": (lambda h: h.update(provenance=[]), "lacks a field"),
    "two branches of one name": (
        lambda h: h["branches"].append(branch_of(h, "lora")),
        "two branches have one name",
    ),
    "unknown kind": (lambda h: branch_of(h, "lora").update(kind="dora"), "unknown kind"),
    "kind is a list": (lambda h: branch_of(h, "lora").update(kind=[]), "lacks a field"),
    "no task name": (lambda h: h.update(task=""), "no usable name"),
    "task with a slash": (lambda h: h.update(task="a/b"), "no usable name"),
    "task with a line break": (lambda h: h.update(task="a\nb"), "no usable name"),
    "a label too few": (lambda h: h.update(labels=["a"]), "labels do not name"),
    "a label twice": (lambda h: h.update(labels=["a", "a"]), "labels do not name"),
    "no head": (
        lambda h: [
            h["branches"].remove(branch_of(h, name))
            for name in ("head/head", "perceptron", "embedding", "beside")
        ],
        "one head per classifier",
    ),
    "two heads at one classifier": (
        lambda h: branch_of(h, "shift").update(
            kind="head", settings={}, tap="head:input", add="head:output"
        ),
        "one head per classifier",
    ),
    "undeclared branch": (
        lambda h: h["branches"].remove(branch_of(h, "shift")),
        "tensors of branches that its header does not declare",
    ),
    "setting missing": (lambda h: branch_of(h, "lora")["settings"].pop("bias"), "not complete"),
    "setting surplus": (lambda h: branch_of(h, "lora")["settings"].update(r=4), "not complete"),
    "settings of another kind": (
        lambda h: branch_of(h, "shift").update(settings={"bias": True}),
        "not complete",
    ),
    "settings is null": (lambda h: branch_of(h, "shift").update(settings=None), "lacks a field"),
    "unknown activation": (
        lambda h: branch_of(h, "lora")["settings"].update(activation="mish"),
        "setting of a bottleneck branch is out of range",
    ),
    "activation is a list": (
        lambda h: branch_of(h, "lora")["settings"].update(activation=[]),
        "setting of a bottleneck branch is out of range",
    ),
    "bias is a number": (
        lambda h: branch_of(h, "lora")["settings"].update(bias=1),
        "setting of a bottleneck branch is out of range",
    ),
    "joint_softmax is text": (
        lambda h: branch_of(h, "prefix")["settings"].update(joint_softmax="no"),
        "setting of a prefix branch is out of range",
    ),
    **{
        f"point {text!r}": (
            lambda h, text=text: branch_of(h, "lora").update(tap=text),
            "a point of the backbone cannot be read",
        )
        for text in ("", "blocks.0", "blocks.0:side", "blocks.0 :input", "a/b:input", 3)
    },
    "bottleneck on keys": (
        lambda h: branch_of(h, "lora").update(add="blocks.0.attn:keys"),
        "a bottleneck branch cannot stand here",
    ),
    "bottleneck that taps tokens": (
        lambda h: branch_of(h, "lora").update(tap="blocks.0:tokens"),
        "a bottleneck branch cannot stand here",
    ),
    "prefix on an output": (
        lambda h: branch_of(h, "prefix").update(tap="a:output", add="a:output"),
        "a prefix branch cannot stand here",
    ),
    "prefix that taps elsewhere": (
        lambda h: branch_of(h, "prefix").update(tap="blocks.1.attn:keys"),
        "a prefix branch cannot stand here",
    ),
    "prompt on keys": (
        lambda h: branch_of(h, "prompt").update(tap="a:keys", add="a:keys"),
        "a prompt branch cannot stand here",
    ),
    "bottleneck that taps patches, and another place": (
        lambda h: branch_of(h, "lora").update(tap=["a:patches", "b:keys"]),
        "a bottleneck branch reads another number of places",
    ),
    "no tap at all": (lambda h: branch_of(h, "lora").update(tap=[]), "lacks a field"),
    "side network on patches": (
        lambda h: branch_of(h, "side").update(tap="patch_embed.proj:patches"),
        "a side_network branch cannot stand here",
    ),
    "difference on an output": (
        lambda h: branch_of(h, "token").update(tap="a:output", add="a:output"),
        "a difference branch cannot stand here",
    ),
    "difference that taps elsewhere": (
        lambda h: branch_of(h, "token").update(tap="a:weights"),
        "a difference branch cannot stand here",
    ),
    **{
        f"{name} {settings}": (
            lambda h, name=name, settings=settings: branch_of(h, name)["settings"].update(settings),
            "branch is out of range",
        )
        for name, settings in (
            ("normed", {"norm": "before"}),
            ("normed", {"eps": 0.0}),
            ("normed", {"eps": 1}),
            ("kronecker", {"rows": 0}),
            ("kronecker", {"columns": True}),
            ("rotation", {"block": 0}),
            ("rotation", {"level": -1}),
            ("rotation", {"level": 2}),
            ("rotation", {"block": 3}),
            ("gain", {"shift": 1}),
            ("norm", {"eps": -1.0}),
            ("shallow", {"joint_softmax": 0}),
            ("side", {"network": "vgg"}),
            ("bypass", {"depth": 0}),
            ("bypass", {"activation": "mish"}),
            ("unipt", {"widths": [0]}),
            ("unipt", {"widths": [True]}),
            ("unipt", {"widths": []}),
            ("unipt", {"widths": 2}),
            ("unipt", {"width": 1.0}),
            ("unipt", {"norm": "group"}),
            ("unipt", {"norm_eps": "small"}),
            ("unipt", {"masked": "yes"}),
            ("unipt", {"crossed": 1}),
            ("unipt", {"eps": 0.0}),
            ("unipt", {"inner": 4}),
            ("unipt", {"project": "mlp"}),
            ("unipt", {"project": "none"}),
            ("unipt", {"up": "none"}),
            ("unipt", {"onto": "anchor"}),
            ("unipt", {"own": "query", "vector": True}),
            ("pyramid", {"cells": [4]}),
            ("pyramid", {"cells": [4, 0]}),
            ("pyramid", {"channels_last": 1}),
            ("pyramid", {"masked": True}),
            ("pyramid", {"own": "first"}),
            ("ladder", {"widths": [2]}),
            ("ladder", {"heads": 3}),
            ("ladder", {"eps": None}),
            ("ladder", {"gives": "last"}),
            ("ladder", {"masked": []}),
            ("ladder", {"activation": "mish"}),
            ("gpo", {"tokens": 0}),
            ("gpo", {"positions": 3}),
            ("gpo", {"masked": None}),
            ("perceptron", {"hidden": []}),
            ("perceptron", {"hidden": [2.5]}),
            ("perceptron", {"norm_eps": 1}),
            ("perceptron", {"activation": "mish"}),
            ("embedding", {"size": 0}),
            ("embedding", {"size": True}),
            ("embedding", {"unit": "no"}),
            ("embedding", {"eps": -1.0}),
            ("token", {"parameter": "a.b"}),
            ("token", {"shape": [0]}),
            ("token", {"shape": 3}),
            ("token", {"shape": [1.0, 2]}),
        )
    },
    **{
        f"{name} on an input": (
            lambda h, name=name: branch_of(h, name).update(add="other:input"),
            "branch cannot stand here",
        )
        for name in ("head/head", "perceptron", "embedding")
    },
    "an embedding of another size": (
        lambda h: branch_of(h, "embedding")["settings"].update(size=3),
        "the heads do not have the same classes",
    ),
    **{
        f"{name} with a tap too few": (
            lambda h, name=name: branch_of(h, name)["tap"].pop(),
            "branch reads another number of places",
        )
        for name in ("unipt", "pyramid", "ladder", "gpo")
    },
    "a pyramid on patches": (
        lambda h: branch_of(h, "pyramid")["tap"].__setitem__(0, "patch_embed.proj:patches"),
        "a unipt_pyramid branch cannot stand here",
    ),
    "what the head replaces": (
        lambda h: branch_of(h, "ladder").update(add="second:output"),
        "it would never act",
    ),
    **{
        f"preprocessing without {key}": (
            lambda h, key=key: h["preprocessing"].pop(key),
            "preprocessing cannot be read",
        )
        for key in PREPROCESSING
    },
    "preprocessing is a list": (
        lambda h: h.update(preprocessing=[1]),
        "preprocessing cannot be read",
    ),
    **{
        f"preprocessing {key}={value}": (
            lambda h, key=key, value=value: h["preprocessing"].update({key: value}),
            "preprocessing",
        )
        for key, value in (
            ("size", [32]),
            ("size", [0, 32]),
            ("size", [math.inf, 32]),
            ("size", "big"),
            ("interpolation", "area"),
            ("crop", 0),
            ("crop", 1.5),
            ("crop", math.nan),
            ("crop", "all"),
            ("mean", [0.5]),
            ("mean", [math.inf] * 3),
            ("std", [0.5, 0.5, 0.0]),
            ("std", 0.5),
            ("surplus", 1),
        )
    },
    **{
        f"surplus or converted: {name}": (edit, "surplus or of another type")
        for name, edit in {
            "field": lambda h: h.update(rank=4),
            "branch field": lambda h: branch_of(h, "lora").update(rank=4),
            "backbone field": lambda h: h["backbone"].update(url=""),
            "task is a number": lambda h: h.update(task=7),
            "label is a number": lambda h: h.update(labels=[1, 2]),
            "labels is text": lambda h: h.update(labels="ab"),
            "fingerprint is a number": lambda h: h["backbone"].update(fingerprint=7),
            "provenance is a number": lambda h: h["provenance"].update(seed=7),
            "size is not whole": lambda h: h["preprocessing"].update(size=[32.5, 32]),
            "NaN in the arguments": lambda h: h["backbone"]["arguments"].update(drop=math.nan),
        }.items()
    },
    "preprocessing without channels": (
        lambda h: h["preprocessing"].update(mean=[], std=[]),
        "preprocessing",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(case, tmp_path):
    edit, sentence = HEADERS[case]
    path = edited(tmp_path / "a", edit)
    error = refused(lambda: load_delta(path), re.escape(sentence))
    assert str(path) in error.details["where"]
    assert set(error.details) & {"wanted", "found"}


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_preprocessing_survives_json(interpolation):
    for size, crop in (((32, 32), 0.875), ((64, 32), 1.0)):
        before = Preprocessing(size, interpolation, crop, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        values = json.loads(canonical_json(before.to_json()))
        assert Preprocessing.from_json(values, where="here") == before


def nan(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[0] = torch.nan
    return t


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "missing": (lambda t: t.pop("lora/up"), "a tensor is missing", "up"),
    "a whole branch missing": (
        lambda t: [t.pop("shift/shift")],
        "a tensor is missing",
        "shift",
    ),
    "surplus": (lambda t: t.update({"lora/gate": torch.ones(1)}), "a tensor is surplus", "gate"),
    "no branch at all": (lambda t: t.update(gate=torch.ones(1)), "does not declare", "a name"),
    "branch with a suffix": (
        lambda t: t.update({"lora/up/x": torch.ones(1)}),
        "does not declare",
        "lora/up",
    ),
    "one axis": (
        lambda t: t.update({"lora/up": torch.ones(6)}),
        "a tensor has the wrong shape",
        r"\[out=?3?, r=2\]",
    ),
    "scale with an axis": (
        lambda t: t.update({"lora/scale": torch.ones(1)}),
        "a tensor has the wrong shape",
        "scale",
    ),
    "inconsistent rank": (
        lambda t: t.update({"lora/up": torch.ones(3, 5)}),
        "a tensor has the wrong shape",
        r"\[out=?3?, r=2\]",
    ),
    "inconsistent channels": (
        lambda t: t.update({"prefix/value": torch.ones(2, 4)}),
        "a tensor has the wrong shape",
        r"\[r=2, out=3\]",
    ),
    "classes of the head's bias": (
        lambda t: t.update({"head/head/bias": torch.ones(3)}),
        "a tensor has the wrong shape",
        r"\[r=2\]",
    ),
    "NaN": (lambda t: t.update({"lora/down": nan(t["lora/down"])}), "NaN or Inf", "1 of 4"),
    "Inf": (
        lambda t: t.update({"shift/shift": t["shift/shift"] / 0}),
        "NaN or Inf",
        "3 of 3",
    ),
    **{
        str(dtype): (
            lambda t, dtype=dtype: t.update({"lora/down": torch.ones(2, 2).to(dtype)}),
            "does not hold floating-point numbers",
            str(dtype),
        )
        for dtype in (
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.float8_e4m3fn,
            torch.complex64,
        )
    },
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case, tmp_path):
    edit, sentence, detail = TENSORS[case]
    tensors = flat(tiny())
    edit(tensors)
    path = write(tmp_path / "a", tensors, {"utune": canonical_json(header(tiny()))})
    if case == "no branch at all":
        detail = "head/head"  # the declared branches are listed
    error = refused(lambda: load_delta(path), sentence)
    assert re.search(detail, str(error)), str(error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_kept(dtype, tmp_path):
    tensors = {b: {n: t.to(dtype) for n, t in w.items()} for b, w in tiny().tensors.items()}
    save_delta(tmp_path / "a", replace(tiny(), tensors=tensors))
    assert load_delta(tmp_path / "a").tensors["lora"]["up"].dtype == dtype


# A delta and a backbone


class Twice(nn.Module):
    """A model with one op that is called, one called twice, one never, and one without a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"classifier": "head", "input_size": (3, 4, 4)}
        self.once, self.twice, self.never = nn.Linear(48, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.once(images.flatten(1)[:, None])
        return self.head(self.twice(self.twice(x)).mean(1))


def on_twice(tap: str, add: str, *, inputs: int = 6, outputs: int = 6) -> tuple[Backbone, Delta]:
    from utune_deploy.merge.backbone import wrap

    backbone = wrap(Twice(), "twice", {})
    name, head = head_branch("head")
    branches = {
        "lora": Branch(Bottleneck("identity", bias=False), point(tap), point(add)),
        name: head,
    }
    tensors = {
        "lora": {
            "down": torch.ones(2, inputs),
            "up": torch.ones(outputs, 2),
            "scale": torch.ones(()),
        },
        name: {"weight": torch.ones(2, 6), "bias": torch.zeros(2)},
    }
    preprocessing = Preprocessing((4, 4))
    delta = Delta("t", ("a", "b"), preprocessing, backbone.identity, branches, tensors)
    validate(delta, where="here")
    return backbone, delta


@pytest.mark.parametrize(
    ("tap", "add", "sizes", "sentence"),
    [
        ("never.0:input", "once:output", {}, "no such module"),
        ("twice:output", "layers.0:output", {}, "passed 2 times"),
        ("never:input", "layers.0:output", {}, "never calls"),
        ("once:output", "layers.0:output", {}, "no such module"),
        ("never:input", "never:output", {}, "would never act: the backbone never calls"),
        ("twice:input", "twice:output", {}, "would act more than once"),
        ("twice:output", "twice:output", {}, "passed 2 times"),
        ("once:input", "once:output", {}, "in=48 at once:input"),
        ("once:input", "once:output", {"inputs": 48, "outputs": 7}, "out=6 at once:output"),
        ("head:input", "once:output", {}, "joins before the value that it reads is there"),
        (":input", "once:output", {}, "no such module"),
    ],
)
def test_places_that_cannot_carry_a_branch(tap, add, sizes, sentence):
    backbone, delta = on_twice(tap, add, **sizes)
    error = refused(lambda: require_backbone(delta, backbone, measure(backbone)), sentence)
    assert "wanted" in error.details
    refused(lambda: restore(backbone, delta), sentence)


def test_a_place_that_can():
    backbone, delta = on_twice("once:input", "once:output", inputs=48)
    require_backbone(delta, backbone, measure(backbone))


def test_a_head_that_is_not_at_the_classifier():
    backbone, delta = on_twice("once:input", "once:output", inputs=48)
    branch = Branch(Head(), point("once:output"), point("once:output"))
    delta = replace(delta, branches={**delta.branches, "head/head": branch})
    refused(lambda: require_backbone(delta, backbone, measure(backbone)), "place of the classifier")


def test_one_head_for_each_classifier(host, random_delta, sites_of):
    """DeiT's distilled models average the logits of two classifiers."""
    backbone = host("deit")
    sites = sites_of(backbone)
    delta = random_delta(backbone, lora(2), classes=3)
    assert delta.heads == ["head/head", "head_dist/head"]
    require_backbone(delta, backbone, sites)
    fewer = {key: tensor[:2] for key, tensor in delta.tensors["head_dist/head"].items()}
    unlike = replace(delta, tensors={**delta.tensors, "head_dist/head": fewer})
    refused(lambda: validate(unlike, where="here"), "the heads do not have the same classes")
    one = {name: branch for name, branch in delta.branches.items() if name != "head_dist/head"}
    lacking = replace(delta, branches=one, tensors={name: delta.tensors[name] for name in one})
    error = refused(
        lambda: require_backbone(lacking, backbone, sites),
        "not stand in the place of the classifier",
    )
    assert error.details["wanted"] == "head, head_dist"


def test_no_attention_and_no_sequence(swin, vit, random_delta, sites_of):
    delta = random_delta(vit, prefix(2))
    branch = delta.branches["blocks.0.attn/prefix"]
    for module, sentence in (
        ("blocks.0.mlp", "no scaled dot product attention runs inside"),
        ("blocks", "passed 3 times"),
    ):
        at = replace(branch, tap=Point(module, "keys"), add=Point(module, "keys"))
        moved = replace(delta, branches={**delta.branches, "blocks.0.attn/prefix": at})
        refused(lambda moved=moved: require_backbone(moved, vit, sites_of(vit)), sentence)
    at = Branch(Prompt(), *[Point("layers.0.blocks.0", "tokens")] * 2)
    refused(
        lambda: sites_of(swin).check(at, {"token": torch.ones(2, 16)}, where="here"),
        "tokens can join a sequence",
    )


def test_another_backbone(vit, vit64, swin, random_delta, sites_of):
    delta = random_delta(vit, lora(2))
    require_backbone(delta, vit, sites_of(vit))
    for other in (vit64, swin):
        error = refused(
            lambda other=other: require_backbone(delta, other, sites_of(other)),
            "the delta belongs to another backbone",
        )
        assert delta.backbone.fingerprint[:16] in error.details["wanted"]
        assert other.identity.fingerprint[:16] in error.details["found"]


@pytest.mark.parametrize("methods", ["lora", "adapter", "prefix", "prompt", "bitfit"])
def test_round_trip_of_methods(methods, vit, random_delta, run, tmp_path):
    lists = {
        "lora": [lora(4, alpha=8)],
        "adapter": [parallel_adapter(3)],
        "prefix": [prefix(5)],
        "prompt": [deep_prompt(2)],
        "bitfit": [bitfit()],
    }
    delta = random_delta(vit, *lists[methods])
    save_delta(tmp_path / "a", delta)
    images = vit.example(2)
    assert torch.equal(run(vit, load_delta(tmp_path / "a"), images), run(vit, delta, images))


# Properties

names = st.text(
    st.characters(codec="utf-8", exclude_characters="/", exclude_categories=("C", "Z")), min_size=1
)
points = st.builds(
    Point,
    st.from_regex(r"[a-z0-9_]+(\.[a-z0-9_]+){0,3}", fullmatch=True),
    st.sampled_from(["input", "output"]),
)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@st.composite
def branches(draw) -> Branch:
    kind = draw(st.sampled_from(["bottleneck", "prefix", "prompt", "bias"]))
    at = draw(points)
    if kind == "bottleneck":
        tuner = Bottleneck(draw(st.sampled_from(list(ACTIVATIONS))), draw(st.booleans()))
        return Branch(tuner, draw(points), at)
    if kind == "bias":
        return Branch(Bias(), at, at)
    side = "keys" if kind == "prefix" else "tokens"
    tuner = Prefix(draw(st.booleans())) if kind == "prefix" else Prompt()
    return Branch(tuner, Point(at.module, side), Point(at.module, side))


@st.composite
def deltas(draw) -> Delta:
    number = st.integers(1, 5)
    classes = draw(number)
    listed = draw(st.lists(st.tuples(names, branches()), max_size=4, unique_by=lambda x: x[0]))
    head = Branch(Head(), Point("head", "input"), Point("head", "output"))
    listed.insert(draw(st.integers(0, len(listed))), ("the head", head))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensors = {}
    for name, branch in listed:
        sizes = {"in": draw(number), "out": draw(number), "r": draw(number)}
        if branch.tuner.join == "replace":
            sizes["r"] = classes
        dtype = draw(dtypes)
        tensors[name] = {
            key: torch.randn([sizes[a] for a in axes], generator=generator).to(dtype)
            for key, axes in branch.tuner.shapes.items()
        }
    share = st.floats(0.01, 1.0)
    return Delta(
        draw(names),
        tuple(draw(st.lists(st.text(max_size=5), min_size=classes, max_size=classes, unique=True))),
        Preprocessing((draw(number), draw(number)), "bilinear", draw(share)),
        Identity(draw(names), {"img_size": [1, 2], "drop": draw(share)}, "f" * 64),
        dict(listed),
        tensors,
        draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)),
    )


QUICK = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@settings(QUICK, max_examples=60)
@given(before=deltas())
def test_any_delta_survives_its_file(before, tmp_path):
    path = tmp_path / "a"
    first = save_delta(path, before, force=True)
    after = load_delta(path)
    assert replace(after, tensors={}) == replace(before, tensors={})
    assert list(after.branches) == list(before.branches)
    wanted, found = flat(before), flat(after)
    assert wanted.keys() == found.keys()
    assert all(
        torch.equal(wanted[n], found[n]) and wanted[n].dtype == found[n].dtype for n in wanted
    )
    assert save_delta(path, after, force=True) == first


def outcome(path: Path) -> None:
    """A damaged file is a valid delta or a damaged artefact, never anything else."""
    try:
        loaded = load_delta(path)
    except IncompatibleArtefact:
        return
    validate(loaded, where="after damage")
    save_delta(path, loaded, force=True)


@settings(QUICK, max_examples=300)
@given(data=st.data())
def test_corrupt_bytes_are_refused_or_still_a_delta(data, written):
    """Bytes overwritten, cut out or put in, anywhere in the file."""
    whole = written.read_bytes()
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        patch = data.draw(st.binary(max_size=4))
        broken[at : at + data.draw(st.integers(0, 4))] = patch
    path = written.parent / "broken"
    path.write_bytes(bytes(broken))
    outcome(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(QUICK, max_examples=300)
@given(data=st.data())
def test_wrong_values_in_the_header_are_refused_or_still_a_delta(data, tmp_path):
    """Any one value of the header, at any depth, replaced by any JSON value."""

    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else ()
        inner = enumerate(value) if isinstance(value, list) else inner
        return [path, *(p for key, v in inner for p in places(v, (*path, key)))]

    tree = json.loads(canonical_json(header(tiny())))
    *where, last = data.draw(st.sampled_from(places(tree)[1:]))
    spot = tree
    for key in where:
        spot = spot[key]
    spot[last] = data.draw(values)
    outcome(write(tmp_path / "a", flat(tiny()), {"utune": json.dumps(tree)}))
