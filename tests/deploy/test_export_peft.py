"""`utune-deploy export-peft`, as a shell sees it, and PEFT on what it wrote."""

from __future__ import annotations

import copy
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from utune_deploy.merge.attach import Tuned
from utune_deploy.merge.backbone import save
from utune_deploy.merge.delta import save_delta

if TYPE_CHECKING:
    from pathlib import Path

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.delta import Delta


@pytest.fixture
def folder(tmp_path: Path, vit: Backbone, deltas: dict[str, Delta]) -> Path:
    save(tmp_path / "backbone", vit)
    for task in ("lora", "dual"):
        save_delta(tmp_path / f"{task}.safetensors", deltas[task])
    return tmp_path


def test_peft_loads_what_was_written(
    cli: Any, folder: Path, vit: Backbone, deltas: dict[str, Delta]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    weights = ("--weights", folder / "backbone")
    code, out, err = cli(
        "export-peft", folder / "lora.safetensors", *weights, "-o", folder / "adapter", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["task"], found["classes"], found["ranks"]) == ("lora", 5, [2])
    assert "num_classes=5" in err
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = copy.deepcopy(vit.model)
    model.reset_classifier(5)  # type: ignore[operator]
    images = vit.example(2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logits = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()(images)
        wanted = Tuned(vit, deltas["lora"].branches, deltas["lora"].tensors)(images)
    assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()

    again = folder / "again.safetensors"
    arguments = ("--from", "peft", "--task", "lora", *weights, "-o", again)
    assert cli("import", folder / "adapter", *arguments)[0] == 0


def test_the_answer_for_a_person(cli: Any, folder: Path) -> None:
    arguments = ("--weights", folder / "backbone", "-o", folder / "adapter")
    code, out, _ = cli("export-peft", folder / "lora.safetensors", *arguments)
    assert code == 0
    assert out.startswith(f"wrote {folder / 'adapter'}: task lora, LoRA of rank 2, the head")


def test_nothing_is_written_over_or_by_halves(cli: Any, folder: Path) -> None:
    taken = folder / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    for more in ((), ("--force",)):
        arguments = ("--weights", folder / "backbone", "-o", taken, *more)
        code, _, err = cli("export-peft", folder / "lora.safetensors", *arguments)
        assert code == 2
        assert str(taken) in err
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    arguments = ("--weights", folder / "backbone", "-o", folder / "adapter")
    code, _, err = cli("export-peft", folder / "dual.safetensors", *arguments)
    assert code == 2
    assert "has no form as a PEFT adapter" in err
    assert "between down and up" in err
    assert not (folder / "adapter").exists()
