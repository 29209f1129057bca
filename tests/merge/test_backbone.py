"""The frozen backbone: its fingerprint, and how it is read from a file or a folder."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from utune_deploy.merge.backbone import create, fingerprint, load, save, wrap
from utune_deploy.merge.backbone.folder import DESCRIPTION, WEIGHTS
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError, UtuneError
from utune_deploy.merge.preprocessing import Clip, Preprocessing
from utune_deploy.merge.tensor_files import read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from utune_deploy.merge.backbone import Backbone


STATES = {"shapes": [[6, 8], [6, 8]], "mask": True}
TINY_BERT = {
    "length": 5,
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
TINY_MDETR = {
    "d_model": 8,
    "nhead": 2,
    "text_layers": 1,
    "backbone_channels": 4,
    "map_size": [2, 3],
    "text_length": 4,
    "text_hidden": 8,
    "text_heads": 2,
    "text_intermediate": 8,
    "text_vocab_size": 12,
    "text_positions": 8,
    "dim_feedforward": 8,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_queries": 2,
}


@pytest.fixture
def weights(vit: Backbone, tmp_path: Path) -> Path:
    """The ViT's weights as a file with timm's keys."""
    path = tmp_path / "vit.safetensors"
    save_file(vit.model.state_dict(), path)
    return path


def refused(error: type[UtuneError], sentence: str, code: int, *args) -> UtuneError:
    with pytest.raises(error, match=sentence) as caught:
        load(*args)
    assert caught.value.exit_code == code
    return caught.value


# Fingerprint


def test_every_frozen_tensor_counts(vit):
    tensors = dict(vit.model.state_dict())
    known = fingerprint(tensors, "head")
    assert known == vit.identity.fingerprint
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
        same = fingerprint({**tensors, name: changed}, "head") == known
        assert same == name.startswith("head."), name


def test_names_types_and_shapes_count():
    tensors = {"a": torch.zeros(4), "head.weight": torch.ones(2)}
    known = fingerprint(tensors, "head")
    for other in (
        {"b": torch.zeros(4)},
        {"a": torch.zeros(4, dtype=torch.int32)},  # the same bytes
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4).half()},
        {"a": torch.zeros(2), "a2": torch.zeros(2)},
        {"a": torch.zeros(4), "header": torch.ones(2)},
        {"a": -torch.zeros(4)},  # another bit
        {},
    ):
        assert fingerprint(other, "head") != known


def test_order_layout_and_classifier_do_not_count():
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": table, "b": torch.ones(()), "c": torch.zeros(0, 3)}
    known = fingerprint(tensors, "head.fc")
    assert fingerprint(dict(reversed(tensors.items())), "head.fc") == known
    assert fingerprint({**tensors, "a": table.T.contiguous().T}, "head.fc") == known
    assert fingerprint({**tensors, "head.fc.weight": table}, "head.fc") == known
    assert fingerprint({**tensors, "head.norm.weight": table}, "head.fc") != known


def test_a_known_fingerprint():
    """The definition does not drift: deltas on disk hold it."""
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    assert (
        fingerprint(tensors, "head")
        == "b82ad9278eec978372fec768612e76421567e1b241496d16aada563079201443"
    )


def test_another_dtype_is_another_backbone(vit, vit64):
    assert vit.identity.fingerprint != vit64.identity.fingerprint
    assert vit.identity.arguments == vit64.identity.arguments


@pytest.mark.parametrize("classes", [0, 3])
def test_another_classifier_is_the_same_backbone(classes, vit):
    model = copy.deepcopy(vit.model)
    model.reset_classifier(classes)
    other = wrap(model, vit.identity.architecture, {**vit.identity.arguments, "num_classes": 3})
    assert other.identity == vit.identity


# In memory


def test_a_wrapped_model_is_frozen_and_uses_one_attention_call(swin):
    arguments = {**swin.identity.arguments, "num_classes": 6}
    model = timm.create_model(swin.identity.architecture, **arguments).train()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    backbone = wrap(model, swin.identity.architecture, arguments)
    assert backbone.model is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(m.fused_attn for m in model.modules() if hasattr(m, "fused_attn"))
    assert backbone.classifiers == ("head.fc",)
    assert "num_classes" not in backbone.identity.arguments


def test_a_model_without_a_classifier_is_refused():
    model = nn.Linear(2, 2)
    for config in ({}, {"classifier": ()}, None):
        model.pretrained_cfg = config
        with pytest.raises(UsageError, match="no classifier"):
            wrap(model, "linear", {})


def test_image_size_and_example(vit, swin):
    assert vit.image_size == (32, 32)
    assert swin.image_size == (64, 64)
    for backbone in (vit, swin):
        assert backbone.channels == 3
        example = backbone.example(2)
        assert example.shape == (2, 3, *backbone.image_size)
        assert example.dtype == torch.float32
        assert torch.equal(example, backbone.example(2))
    tiny = {"embed_dim": 24, "depth": 1, "num_heads": 2, "in_chans": 1}
    default = create("vit_base_patch16_224", tiny)
    assert default.image_size == (224, 224)
    assert default.example().shape == (1, 1, 224, 224)
    oblong = create("vit_base_patch16_224", {**tiny, "img_size": (32, 64)})
    assert oblong.image_size == (32, 64)


def test_a_backbone_of_clips():
    clips = {"clip_size": [4, 16, 24], "embed_dim": 8, "depths": [2], "num_heads": [2]}
    backbone = create("video_swin_base", clips)
    assert backbone.frames == 4
    assert backbone.image_size == (16, 24)
    assert backbone.input_size == (3, 4, 16, 24)
    assert backbone.example(2).shape == (2, 3, 4, 16, 24)
    assert create("video_swin_base", {**clips, "in_chans": 1}).input_size == (1, 4, 16, 24)
    settings = backbone.preprocessing()
    assert settings == Preprocessing(
        (16, 24), "linear", 1.0, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Clip(4, 2, 4)
    )


def test_a_backbone_of_pictures_has_no_frames(vit):
    assert vit.frames is None
    assert vit.input_size == (3, 32, 32)
    assert vit.preprocessing().clip is None


def test_an_unknown_architecture_names_close_ones():
    with pytest.raises(UsageError, match="no such architecture") as caught:
        create("video_swin_bass")
    assert "video_swin_base" in caught.value.details["do"]
    with pytest.raises(UsageError, match="no such architecture") as caught:
        create("vit_base_patch99")
    assert caught.value.details["found"] == "vit_base_patch99"
    assert "vit_" in caught.value.details["do"]
    with pytest.raises(UsageError, match="no such architecture") as caught:
        create("zzz")
    assert "list_models" in caught.value.details["do"]


@pytest.mark.parametrize("arguments", [{"wings": 2}, {"img_size": "big"}, {"num_heads": 5}])
def test_arguments_that_timm_refuses(arguments):
    with pytest.raises(UsageError, match="cannot create the backbone") as caught:
        create("vit_base_patch16_224", {"depth": 1, "embed_dim": 24, **arguments})
    assert caught.value.__cause__ is not None


# Files and folders


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_from_a_file(family, request, tmp_path, error):
    backbone = request.getfixturevalue(family)
    path = tmp_path / "weights.safetensors"
    save_file(backbone.model.state_dict(), path)
    loaded = load(backbone.identity.architecture, backbone.identity.arguments, path)
    assert loaded.identity == backbone.identity
    assert loaded.classifiers == backbone.classifiers
    images = backbone.example(2)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), backbone.model(images))


def test_the_classes_are_read_off_the_file(vit, weights, tmp_path):
    arguments = {**vit.identity.arguments, "num_classes": 1000}
    loaded = load(vit.identity.architecture, arguments, weights)
    assert loaded.model.head.out_features == 7
    headless = tmp_path / "headless"
    tensors = {n: t for n, t in vit.model.state_dict().items() if not n.startswith("head.")}
    save_file(tensors, headless)
    loaded = load(vit.identity.architecture, arguments, headless)
    assert isinstance(loaded.model.head, nn.Identity)
    assert loaded.identity == vit.identity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_dtype_is_the_files(family, dtype, request, tmp_path):
    backbone = request.getfixturevalue(family)
    path = tmp_path / "weights.safetensors"
    save_file({n: t.to(dtype) for n, t in backbone.model.state_dict().items()}, path)
    loaded = load(backbone.identity.architecture, backbone.identity.arguments, path)
    assert {t.dtype for t in loaded.model.state_dict().values()} == {dtype}
    assert loaded.identity.fingerprint != backbone.identity.fingerprint
    with torch.no_grad():
        assert loaded.model(loaded.example()).dtype == dtype


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_from_a_folder(family, request, tmp_path):
    backbone = request.getfixturevalue(family)
    folder = tmp_path / "deep" / "folder"
    for _ in range(2):  # new, then replaced
        save(folder, backbone)
    assert sorted(p.name for p in folder.iterdir()) == [DESCRIPTION, WEIGHTS]
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]
    loaded = load(None, None, folder)
    assert loaded.identity == backbone.identity
    same = load(backbone.identity.architecture, backbone.identity.arguments, folder)
    assert same.identity == backbone.identity
    tensors = loaded.model.state_dict()
    assert all(torch.equal(tensors[n], t) for n, t in backbone.model.state_dict().items())
    images = backbone.example(1)
    with torch.no_grad():  # a product's last bit may follow the address of its operands
        torch.testing.assert_close(loaded.model(images), backbone.model(images))


def test_a_folder_of_another_backbone(vit, tmp_path):
    save(tmp_path / "a", vit)
    for name, arguments in (("resnet18", None), (None, {"depth": 9}), (None, {"wings": 2})):
        error = refused(UsageError, "another backbone", 2, name, arguments, tmp_path / "a")
        assert "vit_base_patch16_224" in error.details["found"]


def test_folders_that_hold_no_backbone(vit, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(IncompatibleArtefact, "holds no backbone", 4, None, None, empty)
    save(tmp_path / "a", vit)
    for text in (
        "",
        "[]",
        "{}",
        '{"architecture": "resnet18"}',
        '{"architecture": 1, "arguments": 1}',
    ):
        (tmp_path / "a" / DESCRIPTION).write_text(text)
        refused(IncompatibleArtefact, "holds no backbone", 4, None, None, tmp_path / "a")
    save(tmp_path / "b", vit)
    (tmp_path / "b" / WEIGHTS).unlink()
    refused(UsageError, "no such file", 2, None, None, tmp_path / "b")


def test_files_that_cannot_be_read(vit, weights, tmp_path):
    named = (vit.identity.architecture, vit.identity.arguments)
    refused(UsageError, "no such file", 2, *named, tmp_path / "none")
    refused(UsageError, "not named", 2, None, None, weights)
    refused(UsageError, "no such architecture", 2, "vit_huge_leaf", {}, weights)
    whole = weights.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        refused(IncompatibleArtefact, "truncated or not safetensors", 4, *named, weights)
    with pytest.raises(UsageError, match="this is a folder"):
        read_tensors(tmp_path)


def test_tensors_that_are_not_the_architectures(vit, weights):
    named = (vit.identity.architecture, vit.identity.arguments)
    tensors = load_file(weights)

    def written(changed: dict[str, torch.Tensor]) -> Path:
        save_file(changed, weights)
        return weights

    def without(count: int) -> dict[str, torch.Tensor]:
        return {n: t for i, (n, t) in enumerate(sorted(tensors.items())) if i >= count}

    error = refused(IncompatibleArtefact, "lacks tensors", 4, *named, written(without(1)))
    assert error.details["found"] == min(tensors)
    error = refused(IncompatibleArtefact, "lacks tensors", 4, *named, written(without(8)))
    assert error.details["found"].endswith("and 3 more")
    surplus = {**tensors, "blocks.0.attn.lora.weight": torch.ones(1)}
    error = refused(IncompatibleArtefact, "architecture lacks", 4, *named, written(surplus))
    assert error.details["found"] == "blocks.0.attn.lora.weight"
    shape = {**tensors, "norm.weight": torch.ones(47)}
    error = refused(IncompatibleArtefact, "another shape", 4, *named, written(shape))
    assert error.details["where"].endswith(": norm.weight")
    assert (error.details["wanted"], error.details["found"]) == ("[48]", "[47]")
    short = (vit.identity.architecture, {**vit.identity.arguments, "depth": 2})
    refused(IncompatibleArtefact, "architecture lacks", 4, *short, written(tensors))
    refused(IncompatibleArtefact, "lacks tensors", 4, "resnet18", {}, weights)


def test_the_description_is_readable(vit, tmp_path):
    save(tmp_path / "a", vit)
    description = json.loads((tmp_path / "a" / DESCRIPTION).read_text())
    assert description == {
        "architecture": "vit_base_patch16_224",
        "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4},
    }


# Without weights, and of Hugging Face


def test_an_architecture_without_weights():
    loaded = load("states", {**STATES, "num_classes": 4}, None)
    assert loaded.identity == create("states", STATES).identity
    assert isinstance(loaded.model.head, nn.Identity)


def test_weights_that_are_missing():
    for name, arguments in (("vit_base_patch16_224", {}), ("bert", TINY_BERT)):
        error = refused(UsageError, "has weights, and none are given", 2, name, arguments, None)
        assert error.details["where"] == name
    refused(UsageError, "not named", 2, None, None, None)
    refused(UsageError, "no such architecture", 2, "zzz", None, None)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as transformers saves its models: `bert`, `clip`, `clip_image`, `clip_text`, `t5`."""
    root = tmp_path_factory.mktemp("published")
    sizes = {k: v for k, v in TINY_BERT.items() if k != "length"}
    tower = {**{k: v for k, v in sizes.items() if k != "vocab_size"}, "projection_dim": 6}
    words = {**tower, "vocab_size": 20, "eos_token_id": 19, "max_position_embeddings": 9}
    picture = {**tower, "image_size": 8, "patch_size": 4}
    clip = transformers.CLIPConfig(text_config=words, vision_config=picture, projection_dim=6)
    t5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    models = {
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**sizes)),
        "clip": transformers.CLIPModel(clip),
        "clip_image": transformers.CLIPVisionModelWithProjection(clip.vision_config),
        "clip_text": transformers.CLIPTextModelWithProjection(clip.text_config),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("folder", "name", "given"),
    [
        ("bert", "bert", {"length": 7}),
        ("clip", "clip_image", {}),
        ("clip", "clip_text", {"length": 4}),
        ("clip_image", "clip_image", {}),
        ("clip_text", "clip_text", {}),
        ("t5", "t5", {"length": 6, "answer_length": 3}),
    ],
)
def test_a_folder_of_hugging_face(folder, name, given, published, tmp_path):
    backbone = load(name, {**given, "num_classes": 3}, published / folder)
    assert backbone.identity.architecture == name
    arguments = dict(backbone.identity.arguments)
    assert json.loads(json.dumps(arguments)) == arguments
    assert "num_classes" not in arguments
    assert {k: arguments[k] for k in given} == given
    width = {"t5": "d_model"}.get(name, "hidden_size")
    assert arguments[width] == 8
    examples = backbone.draw(2)
    assert all(t.shape[1:] == e.shape for t, e in zip(examples, backbone.inputs, strict=True))
    if "length" in given:
        assert backbone.inputs[0].shape == (given["length"],)
    save(tmp_path / "saved", backbone)
    again = load(None, None, tmp_path / "saved")
    assert again.identity == backbone.identity
    with torch.no_grad():
        assert torch.equal(again.model(*examples), backbone.model(*examples))
    if folder != "clip":
        assert load(None, given, published / folder).identity == backbone.identity


def test_folders_of_hugging_face_that_are_refused(published, vit, tmp_path):
    both = refused(UsageError, "two backbones", 2, None, None, published / "clip")
    assert "--backbone clip_text" in both.details["do"]
    refused(IncompatibleArtefact, "another kind of model", 4, "t5", None, published / "bert")
    found = refused(
        UsageError, "another backbone", 2, vit.identity.architecture, {}, published / "t5"
    )
    assert found.details["found"] == "t5"
    refused(UsageError, "no such architecture", 2, "zzz", {}, published / "t5")
    wide = {"hidden_size": 16}
    refused(IncompatibleArtefact, "another shape", 4, "bert", wide, published / "bert")
    other = tmp_path / "other"
    other.mkdir()
    for text in ('{"model_type": "gpt2"}', '{"architecture": "resnet18"}', "{", "[]"):
        (other / "config.json").write_text(text)
        refused(IncompatibleArtefact, "no backbone that is written here", 4, None, None, other)
    refused(IncompatibleArtefact, "cannot be read", 4, "bert", None, other)


def test_the_folder_of_a_backbone_goes_before_a_configuration(vit, tmp_path):
    save(tmp_path / "a", vit)
    (tmp_path / "a" / "config.json").write_text('{"model_type": "bert"}')
    assert load(None, None, tmp_path / "a").identity == vit.identity


# Classifiers


def test_a_head_of_several_layers():
    """Of an architecture of ours, whose boxes come from three; timm's are one layer each."""
    backbone = create("mdetr", {**TINY_MDETR, "num_classes": 3})
    assert backbone.classifiers == ("class_embed", "bbox_embed")
    assert not isinstance(backbone.model.bbox_embed, nn.Linear | nn.Identity)
    model = timm.create_model("resnet18", num_classes=3)
    model.fc = nn.Sequential(nn.Linear(512, 3))
    with pytest.raises(UsageError, match="not one linear layer") as caught:
        wrap(model, "resnet18", {})
    assert caught.value.details["where"] == "resnet18: fc"


def test_the_classes_of_boxes_are_read_off_the_file(tmp_path):
    backbone = create("mdetr", {**TINY_MDETR, "num_classes": 3})
    path = tmp_path / "boxes.safetensors"
    save_file(backbone.model.state_dict(), path)
    loaded = load("mdetr", TINY_MDETR, path)
    assert loaded.identity == backbone.identity
    assert loaded.model.class_embed.out_features == 3 + 1  # no object
