"""From the files of other projects to the answers that their own code gave: reader, torch, fold, ONNX.

The data stand beside the repository, or where UTUNE_GOLDEN points; their README says how they were made.
Every case that lies there is run, and a table of all errors is printed at the end.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from utune_deploy.export.engine import Device
from utune_deploy.export.graph import Inputs, clean, serialise, trace
from utune_deploy.export.passes import rewrite
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge.attach import Tuned, restore
from utune_deploy.merge.backbone import Backbone, create, load, wrap
from utune_deploy.merge.bank import stack
from utune_deploy.merge.delta import Delta, load_delta, save_delta
from utune_deploy.merge.fold import fold, refusals
from utune_deploy.merge.importers import read
from utune_deploy.merge.lower import lower
from utune_deploy.merge.mixed import Mixed, Single
from utune_deploy.merge.sites import measure

GOLDEN = Path(
    os.environ.get("UTUNE_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")
)
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}; set UTUNE_GOLDEN to their folder"
)
FLOAT64, FLOAT32 = 1e-9, 2e-5  # largest difference over largest value

VIT = "vit_base_patch16_224"
GEOMETRY = (
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values",
    "class_token", "no_embed_class", "pre_norm", "fc_norm", "global_pool",
)  # fmt: skip
NOT_SAVED = ("ffn_option", "ffn_adapter_scalar", "ffn_adapter_layernorm_option")


@dataclass(frozen=True)
class Case:
    """A stored run.

    Attributes:
        name: Its folder, and the adapter in it where there are several.
        source: Who wrote it.
        file: What is read.
        architecture: Of the backbone.
        arguments: Of the backbone.
        weights: Of the backbone.
        settings: What the file does not say of itself.
        io: Inputs and outputs.
        output: Name of the output.
    """

    name: str
    source: str
    file: Path
    architecture: str
    arguments: dict[str, Any]
    weights: Path
    settings: dict[str, str]
    io: Path
    output: str = "logits"

    @property
    def backbone(self) -> Backbone:
        return load(self.architecture, self.arguments, self.weights)

    def tensors(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and logits; `kind` is `expected` or `expected64`."""
        io = load_file(self.io)
        (images,) = (value for key, value in io.items() if key.startswith("input."))
        return images, io[f"{kind}.{self.output}"]


def _cases() -> list[Case]:
    return [case for folder in sorted(GOLDEN.glob("*")) for case in _in_folder(folder)]


def _in_folder(folder: Path) -> list[Case]:
    if not (folder / "config.json").is_file():
        return []
    config = json.loads((folder / "config.json").read_text())
    weights, io = folder / "backbone.safetensors", folder / "io.safetensors"
    if folder.name.startswith("ms_"):
        options = config["original_config"]["model"]["backbone"]
        arguments = {key: options[key] for key in GEOMETRY if options.get(key) is not None}
        file = folder / "checkpoint.pth"
        return [Case(folder.name, "modelscope", file, VIT, arguments, weights, {}, io)]
    if folder.name.startswith("vpetl"):
        options = config["original_config"]["SwinTransformer3D"]
        arguments = {k: v for k, v in options.items() if k != "drop_path_rate"}
        arguments["clip_size"] = config["clip_shape_BCTHW"][2:]
        settings = {key: str(config["not_in_state_dict"][key]) for key in NOT_SAVED}
        file = folder / "checkpoint.pth"
        return [
            Case(folder.name, "vpetl", file, "video_swin_base", arguments, weights, settings, io)
        ]
    if folder.name.startswith("swift"):
        options = config.get("backbone_config") or config["original_config"]["model"]["backbone"]
        arguments = {key: options[key] for key in GEOMETRY if options.get(key) is not None}
        return [Case(folder.name, "swift", folder / "swift", VIT, arguments, weights, {}, io)]
    if folder.name.startswith("peft"):
        arguments = {k: v for k, v in config["arguments"].items() if k != "num_classes"}
        swin = "Swin" in config["timm_class"]
        made = ("swin_tiny_patch4_window7_224" if swin else VIT, arguments, weights)
        if (folder / "adapter_config.json").is_file():
            return [Case(folder.name, "peft", folder, *made, {}, io)]
        return [case for inner in sorted(folder.glob("*/")) for case in _peft(inner, made)]
    return []


def _peft(folder: Path, made: tuple[str, dict[str, Any], Path]) -> list[Case]:
    name, io = f"{folder.parent.name}/{folder.name}", folder / "io.safetensors"
    if (folder / "adapter_config.json").is_file():
        return [Case(name, "peft", folder, *made, {}, io)]
    return [
        Case(f"{name}/{adapter.name}", "peft", adapter, *made, {}, io, f"all_rows.{adapter.name}")
        for adapter in sorted(folder.glob("*/"))
    ]


CASES = _cases()
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The delta of a case, through a file; read once."""
    seen: dict[str, tuple[Backbone, Delta]] = {}

    def imported(case: Case) -> tuple[Backbone, Delta]:
        if case.name not in seen:
            backbone = case.backbone
            foreign = read(case.source, case.file, backbone, case.settings)
            path = tmp_path_factory.mktemp("deltas") / "d.safetensors"
            save_delta(path, foreign.delta(case.name.replace("/", "-"), backbone))
            seen[case.name] = backbone, load_delta(path)
        return seen[case.name]

    return imported


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def answers(model: torch.nn.Module, inputs: Inputs, feeds: list[np.ndarray]) -> torch.Tensor:
    """Of the model as an engine in ONNX Runtime."""
    torch.set_num_threads(1)
    graph = trace(model.eval(), inputs)
    rewrite(graph)
    session = OnnxRuntimeSession(serialise(clean(graph), {}), Device(threads=1))
    return torch.from_numpy(session.run(*feeds))


@needs_golden
@all_cases
def test_the_original_answers(case, imported, request):
    backbone, delta = imported(case)
    images, wanted = case.tensors("expected")
    images64, wanted64 = case.tensors("expected64")
    sites = measure(backbone)
    errors = {}
    with torch.no_grad():
        errors["torch fp32"] = error(restore(backbone, delta, sites)(images), wanted)
        double = wrap(
            create(case.architecture, {**case.arguments, "num_classes": 0}).model.double(),
            case.architecture,
            case.arguments,
        )
        frozen = backbone.model.state_dict()
        double.model.load_state_dict(
            {k: v.double() for k, v in frozen.items() if not backbone.is_classifier(k)}
        )
        exact = Tuned(double, delta.branches, delta.tensors)(images64.double())
        errors["torch fp64"] = error(exact, wanted64)
    single = Single(backbone, stack([lower(backbone, delta, sites)], torch.float32))
    found = answers(single, Inputs(backbone.example(batch=2)), [images.numpy()])
    errors["onnx"] = error(found, wanted)
    if not refusals(delta, backbone):
        arguments = {**case.arguments, "num_classes": len(delta.labels)}
        plain = create(case.architecture, arguments).model
        plain.load_state_dict(dict(fold(delta, backbone, sites=sites).tensors))
        with torch.no_grad():
            errors["folded"] = error(plain(images), wanted)
    request.config.stash.setdefault(ROWS, {})[case.name] = errors
    for column, value in errors.items():
        assert value <= (FLOAT64 if column == "torch fp64" else FLOAT32), column


ROWS = pytest.StashKey[dict[str, dict[str, float]]]()


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Print all errors when the last case is through."""
    yield
    rows = request.config.stash.get(ROWS, {})
    if not rows:
        return
    columns = ("torch fp64", "torch fp32", "onnx", "folded")
    lines = [f"{'case':45s}" + "".join(f"{c:>12s}" for c in columns)]
    for name, errors in sorted(rows.items()):
        cells = (f"{errors[c]:12.1e}" if c in errors else f"{'-':>12s}" for c in columns)
        lines.append(f"{name:45s}" + "".join(cells))
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        terminal.ensure_newline()
        for line in lines:
            terminal.write_line(line)


@needs_golden
def test_all_tasks_of_one_backbone_in_one_engine(imported, request):
    """Every task of the shared ViT that can be parallel, in one engine, rows shuffled."""
    shared: dict[str, list[tuple[Case, Backbone, Delta]]] = {}
    for case in CASES:
        backbone, delta = imported(case)
        shared.setdefault(backbone.identity.fingerprint, []).append((case, backbone, delta))
    listed = max(shared.values(), key=len)
    backbone = listed[0][1]
    sites = measure(backbone)
    bank = stack([lower(backbone, delta, sites) for _, _, delta in listed], torch.float32)
    if GOLDEN.name == "golden" and "UTUNE_GOLDEN" not in os.environ:
        assert len(listed) >= 14
        assert len({slot.branch.tuner for slot in bank.slots}) >= 9
    rows = [(number, row) for number, (case, _, _) in enumerate(listed) for row in range(2)]
    order = np.random.default_rng(4).permutation(len(rows))
    images = torch.stack(
        [listed[rows[at][0]][0].tensors("expected")[0][rows[at][1]] for at in order]
    )
    task = np.array([rows[at][0] for at in order], dtype=np.int64)
    inputs = Inputs(backbone.example(batch=2), torch.tensor([0, 1]))
    mixed = answers(Mixed(backbone, bank), inputs, [images.numpy(), task])
    for at, found in zip(order, mixed, strict=True):
        case = listed[rows[at][0]][0]
        wanted = case.tensors("expected")[1]
        one = found[: wanted.shape[1]]
        assert error(one, wanted[rows[at][1]]) <= FLOAT32, case.name
