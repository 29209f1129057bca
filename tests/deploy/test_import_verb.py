"""`utune-deploy import`, as a shell sees it: an error names the file that was read, not the one to be written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from utune_deploy.merge.backbone import save
from utune_deploy.merge.delta import load_delta

if TYPE_CHECKING:
    from pathlib import Path

    from utune_deploy.merge.backbone import Backbone


@pytest.fixture
def probe(tmp_path: Path, vit: Backbone) -> Path:
    """A head of three classes, two of which have one name."""
    save(tmp_path / "backbone", vit)
    head = {"fc.weight": torch.ones(3, 48), "fc.bias": torch.zeros(3)}
    saved = {"backbone_weight": {}, "head_weight": head, "CLASSES": ["cat", "dog", "cat"]}
    torch.save(saved, tmp_path / "probe.pth")
    return tmp_path / "probe.pth"


def test_classes_of_one_name(cli: Any, probe: Path) -> None:
    folder = probe.parent
    arguments = ("--from", "modelscope", "--task", "t", "--weights", folder / "backbone")
    output = folder / "out.safetensors"
    said = cli("import", probe, *arguments, "-o", output)
    assert said.code == 4
    assert str(probe) in said.err
    assert str(output) not in said.err
    assert not output.exists()
    labels = folder / "labels.txt"
    labels.write_text("a\nb\n")
    said = cli("import", probe, *arguments, "-o", output, "--labels", labels)
    assert said.code == 4
    assert str(labels) in said.err
    labels.write_text("a\nb\nc\n")
    assert cli("import", probe, *arguments, "-o", output, "--labels", labels).code == 0


@pytest.fixture
def tuned(tmp_path: Path, vit: Backbone) -> Path:
    """A fine-tuned timm model of three classes in a folder of its own, and its backbone in another."""
    save(tmp_path / "backbone", vit)
    tensors = {name: t.contiguous() for name, t in vit.model.state_dict().items()}
    head = {"head.weight": torch.ones(3, 48), "head.bias": torch.zeros(3)}
    (tmp_path / "tuned").mkdir()
    save_file({**tensors, **head}, tmp_path / "tuned" / "model.safetensors")
    return tmp_path / "tuned" / "model.safetensors"


def _named(*names: str) -> dict[str, Any]:
    return {"id2label": {str(number): name for number, name in enumerate(names)}}


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        (_named("cat", "dog", "cow"), ("cat", "dog", "cow")),
        ({"label_names": ["cat", "dog", "cow"]}, ("cat", "dog", "cow")),
        (_named("LABEL_0", "LABEL_1", "LABEL_2"), None),
        (_named("cat", "dog"), None),  # of another head
        (_named("cat", "dog", "cat"), None),
        ({"id2label": {"0": "cat", "1": "dog", "3": "cow"}}, None),
        ({"id2label": ["cat"]}, None),
        ({}, None),
    ],
)
def test_classes_are_those_of_the_configuration_beside_the_file(
    cli: Any, tuned: Path, config: dict[str, Any], labels: tuple[str, ...] | None
) -> None:
    folder = tuned.parent.parent
    (tuned.parent / "config.json").write_text(json.dumps(config))
    output = folder / "out.safetensors"
    said = cli(
        "import", tuned, "--from", "timm", "--task", "t", "--weights", folder / "backbone", "-o", output
    )  # fmt: skip
    assert said.code == 0, said.err
    assert load_delta(output).labels == (labels or ("class_0", "class_1", "class_2"))
    assert ("config.json beside the file" in said.out) == bool(labels)
    assert ("numbered" in said.err) == (labels is None)


def test_names_beside_the_backbone_are_offered_and_not_taken(cli: Any, tuned: Path) -> None:
    folder = tuned.parent.parent
    config = folder / "backbone" / "config.json"
    config.write_text(json.dumps(_named("cat", "dog", "cow")))
    arguments = ("import", tuned, "--from", "timm", "--task", "t", "--weights", folder / "backbone")
    said = cli(*arguments, "-o", folder / "a.safetensors")
    assert load_delta(folder / "a.safetensors").labels[0] == "class_0"
    assert f"--labels {config}" in said.err
    assert cli(*arguments, "-o", folder / "b.safetensors", "--labels", config).code == 0
    assert load_delta(folder / "b.safetensors").labels == ("cat", "dog", "cow")
    config.write_text("{}")
    said = cli(*arguments, "-o", folder / "c.safetensors", "--labels", config)
    assert (said.code, str(config) in said.err) == (2, True)
