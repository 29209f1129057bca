"""Every architecture of the table keeps the promises that `architectures/__init__` makes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from utune_deploy.merge import architectures
from utune_deploy.merge.architectures import ARCHITECTURES, find
from utune_deploy.merge.backbone import Backbone, create, fingerprint, load, save, wrap
from utune_deploy.merge.errors import MissingDependency
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.merge.sites import measure

from .test_trunks import SMALL as TRUNKS
from .test_unipt_trunks import SMALL_CLIP_VIL, SMALL_MDETR

SMALL = {
    "video_swin_base": {
        "clip_size": [4, 16, 24],
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": [2, 3, 3],
    },
    "caffe_resnet": {"image_size": 37, "layers": [1, 2, 1, 1], "stem_width": 4},
    "bert": TRUNKS["bert"][1],
    "clip_image": TRUNKS["clip_image"][1],
    "clip_text": TRUNKS["clip_text"][1],
    "t5": TRUNKS["t5"][1],
    "clip_vil": {k: v for k, v in SMALL_CLIP_VIL.items() if k != "num_classes"},
    "mdetr": {k: v for k, v in SMALL_MDETR.items() if k != "num_classes"},
    "states": TRUNKS["tokens"][1],
}
ANSWERS = {
    "t5": (4, 6),
    "mdetr": (5, 6 + 1 + 4),
}  # of one row, with six classes; (6,) for the others
SEATS = {"bert": "mask", "clip_text": "end", "t5": "memory_mask", "mdetr": "encoder_mask"}
every = pytest.mark.parametrize("name", ARCHITECTURES)


def small(name: str, classes: int = 6) -> Backbone:
    return create(name, {**SMALL[name], "num_classes": classes})


def answer(backbone: Backbone, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return backbone.model(*backbone.draw(batch))


def test_every_architecture_is_tested():
    assert set(SMALL) == set(ARCHITECTURES)


@every
def test_it_is_a_backbone(name):
    backbone = small(name)
    assert type(backbone.model) is find(name)
    assert backbone.identity.architecture == name
    assert backbone.identity.arguments == json.loads(json.dumps(SMALL[name]))
    assert answer(backbone).shape == (2, *ANSWERS.get(name, (6,)))
    assert backbone.dtype == torch.float32


@every
def test_its_inputs_have_names(name):
    backbone = small(name)
    names = [entry.name for entry in backbone.inputs]
    assert len(set(names)) == len(names)
    assert all(entry.high for entry in backbone.inputs if entry.values == "ids")
    drawn = backbone.draw(3)
    assert [t.shape for t in drawn] == [(3, *entry.shape) for entry in backbone.inputs]
    if not backbone.pictures:
        assert backbone.preprocessing() is None
        assert "images" not in names


@every
def test_what_passes_passes_once(name):
    """Modules, seats among them: what a branch joins is entered once, and has a known shape."""
    backbone = small(name)
    sites = measure(backbone)
    passed = {n for p, n in sites.calls.items() if p.side in ("input", "output")}
    assert passed == {1}
    paths = [*getattr(backbone.model, "hidden_states", ()), *backbone.classifiers]
    paths += [SEATS[name]] if name in SEATS else []
    assert {point.module for point in sites.shapes if point.side == "output"} >= set(paths)


@every
def test_the_classifier_is_not_part_of_it(name):
    bare, other = small(name, 0), small(name, 3)
    for path in bare.classifiers:
        assert isinstance(bare.model.get_submodule(path), nn.Identity)
    other.model.load_state_dict(bare.model.state_dict(), strict=False)
    names = {n for n in other.model.state_dict() if n not in bare.model.state_dict()}
    assert {f"{other.classifiers[0]}.weight", f"{other.classifiers[0]}.bias"} <= names
    assert all(other.is_classifier(n) for n in names)
    rewrapped = wrap(other.model, name, SMALL[name])
    assert rewrapped.identity.fingerprint == bare.identity.fingerprint


@every
@pytest.mark.parametrize("classes", [0, 6])
def test_from_a_folder(name, classes, tmp_path):
    backbone = small(name, classes)
    save(tmp_path / "folder", backbone)
    loaded = load(None, None, tmp_path / "folder")
    assert loaded.identity == backbone.identity
    assert torch.equal(answer(loaded), answer(backbone))
    named = load(name, SMALL[name], tmp_path / "folder" / "backbone.safetensors")
    assert named.identity == backbone.identity


@every
def test_every_weight_counts(name):
    backbone = small(name)
    tensors = {
        n: t for n, t in backbone.model.state_dict().items() if not backbone.is_classifier(n)
    }
    assert bool(tensors) == (name != "states")
    for changed in (min(tensors, default=None), max(tensors, default=None)):
        if changed is not None:
            other = {**tensors, changed: tensors[changed] + 1}
            assert fingerprint(other, *backbone.classifiers) != backbone.identity.fingerprint


@every
def test_it_says_how_pictures_are_prepared(name):
    backbone = small(name)
    settings = backbone.preprocessing()
    if settings is None:
        assert not backbone.pictures
        return
    assert settings.input_size == backbone.input_size == backbone.model.pretrained_cfg["input_size"]
    assert Preprocessing.from_json(settings.to_json(), where="here") == settings


def test_a_package_that_is_missing(monkeypatch):
    def missing(*_: str) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(architectures.importlib, "import_module", missing)
    with pytest.raises(MissingDependency, match="bert needs a package") as caught:
        find("bert")
    assert "transformers" in caught.value.details["do"]
    assert find("vit_base_patch16_224") is None
