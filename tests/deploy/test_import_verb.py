"""`utune-deploy import`, as a shell sees it: an error names the file that was read, not the one to be written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from utune_deploy.merge.backbone import save

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
