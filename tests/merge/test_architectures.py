"""Every architecture of the table keeps the promises that `architectures/__init__` makes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from utune_deploy.merge.architectures import ARCHITECTURES, find
from utune_deploy.merge.backbone import create
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.merge.sites import measure

SMALL = {
    "video_swin_base": {
        "clip_size": [4, 16, 24],
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": [2, 3, 3],
    },
}
every = pytest.mark.parametrize("name", ARCHITECTURES)


def test_every_architecture_is_tested():
    assert set(SMALL) == set(ARCHITECTURES)


@every
def test_it_is_a_backbone(name):
    backbone = create(name, {**SMALL[name], "num_classes": 6})
    assert type(backbone.model) is find(name)
    assert backbone.identity.architecture == name
    assert backbone.identity.arguments == json.loads(json.dumps(SMALL[name]))
    assert backbone.input_size == backbone.model.pretrained_cfg["input_size"]
    with torch.no_grad():
        assert backbone.model(backbone.example(2)).shape == (2, 6)
    sites = measure(backbone)
    passed = {n for p, n in sites.calls.items() if p.side in ("input", "output")}
    assert passed == {1}


@every
def test_the_classifier_is_not_part_of_it(name):
    bare = create(name, {**SMALL[name], "num_classes": 0})
    classifier = bare.model.pretrained_cfg["classifier"]
    assert isinstance(bare.model.get_submodule(classifier), nn.Identity)
    other = create(name, {**SMALL[name], "num_classes": 3})
    other.model.load_state_dict(bare.model.state_dict(), strict=False)
    names = {n for n in other.model.state_dict() if n not in bare.model.state_dict()}
    assert names == {f"{classifier}.weight", f"{classifier}.bias"}


@every
def test_it_says_how_its_input_is_prepared(name):
    backbone = create(name, SMALL[name])
    settings = backbone.preprocessing()
    assert settings.input_size == backbone.input_size
    assert Preprocessing.from_json(settings.to_json(), where="here") == settings
