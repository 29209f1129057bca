"""UniPT beside every kind of trunk, from training to a checked bundle: text, pictures, maps, both sides of T5."""

from __future__ import annotations

import pytest
import torch

from utune_deploy.deploy.build import export_bundle
from utune_deploy.deploy.task import Task
from utune_deploy.merge.attach import attach
from utune_deploy.merge.backbone import create
from utune_deploy.merge.errors import UsageError
from utune_deploy.merge.methods import unipt

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TRUNKS = {
    "vit": ("vit_base_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}),
    "resnet": ("resnet18", {"channels": (8, 8, 16, 16), "stem_width": 8}),
    "bert": ("bert", {**TEXT, "length": 8, "vocab_size": 40, "max_position_embeddings": 16}),
    "clip_image": ("clip_image", {**TEXT, "image_size": 32, "patch_size": 8, "projection_dim": 16}),
    "clip_text": ("clip_text", {**TEXT, "length": 8, "vocab_size": 40, "projection_dim": 16}),
    "t5": ("t5", {"length": 8, "answer_length": 3, "vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "states": ("states", {"shapes": [[6, 24], [6, 24], [6, 16]], "mask": True}),
    "maps": ("states", {"shapes": [[6, 16, 16], [8, 8, 8], [12, 4, 4]]}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUNKS)
def test_from_training_to_a_checked_bundle(name, tmp_path):
    torch.manual_seed(0)
    backbone = create(*TRUNKS[name])
    tasks = []
    for number in range(2):
        classes = None if name == "t5" else 3 + number
        tuned = attach(backbone, unipt(8), classes=classes, seed=number)
        drawn = torch.Generator().manual_seed(number)
        for parameter in tuned.trainable():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=drawn)
        labels = [f"class {k}" for k in range(classes or 0)]
        tasks.append(Task(tuned.delta(f"task{number}", labels), f"{number:064}"))
    bundle = export_bundle(tmp_path / "bundle", backbone, tasks, max_batch=2, fan_out=True)
    assert bundle.check["passed"]
    assert bundle.check["fan_out"]["passed"]
    assert [t.name for t in bundle.engine.inputs][:-1] == [entry.name for entry in backbone.inputs]
    (shared,) = bundle.plan["shared"]
    assert shared["until"]  # one pass of the trunk for both
    counted = bundle.plan["macs"]
    if list(backbone.model.parameters()):  # there is a trunk to share
        assert counted["every task"] < counted["tasks one by one"]


def test_classes_cannot_name_several_vectors():
    backbone = create(*TRUNKS["t5"])
    with pytest.raises(UsageError, match="several vectors per row") as refused:
        attach(backbone, unipt(8), classes=3)
    assert "classes=None" in str(refused.value.details["do"])
