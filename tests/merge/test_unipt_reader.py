"""What the readers of UniPT's checkpoints refuse, and which form of a file they read; tiny files, made here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from utune_deploy.merge.architectures.clip import from_openai
from utune_deploy.merge.backbone import create, wrap
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.importers import read

from .test_trunks import SMALL, openai
from .test_unipt_trunks import SMALL_CLIP_VIL, SMALL_MDETR

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from utune_deploy.merge.backbone import Backbone
    from utune_deploy.merge.importers.foreign import Foreign

    State = dict[str, Tensor]

WIDTH, OUT = 4, 6  # inside the side network, and of what it gives
BERT = SMALL["bert"][1]
VIL = "lxrt_encoder.model.bert.encoder.side_"


# Files


class Layers(dict[str, torch.Tensor]):
    """A state dict that grows by layers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(seed)

    def add(self, path: str, *shape: int) -> None:
        self[path] = torch.randn(shape, generator=self.noise)

    def linear(self, path: str, out: int, given: int, *pixel: int) -> None:
        self.add(f"{path}.weight", out, given, *pixel)
        self.add(f"{path}.bias", out)

    def norm(self, path: str, width: int, *, statistics: bool = False) -> None:
        self.add(f"{path}.weight", width)
        self.add(f"{path}.bias", width)
        if statistics:
            self[f"{path}.running_mean"] = torch.zeros(width)
            self[f"{path}.running_var"] = torch.ones(width)
            self[f"{path}.num_batches_tracked"] = torch.tensor(3)

    def gpo(self, pool: str, hidden: int = 3, positions: int = 4) -> None:
        for end in ("", "_reverse"):
            self.add(f"{pool}.gru.weight_ih_l0{end}", 3 * hidden, positions)
            self.add(f"{pool}.gru.weight_hh_l0{end}", 3 * hidden, hidden)
            self.add(f"{pool}.gru.bias_ih_l0{end}", 3 * hidden)
            self.add(f"{pool}.gru.bias_hh_l0{end}", 3 * hidden)
        self.add(f"{pool}.linear.weight", 1, hidden)


def vse_text(widths: tuple[int, ...] = (12, 12, 12)) -> State:
    state = Layers()
    side = "side_tuning_module."
    for number, width in enumerate(widths):
        state.linear(f"{side}downsample_layers.{number}.0", WIDTH, width)
        state.norm(f"{side}downsample_layers.{number}.1", WIDTH)
    state.linear(f"{side}projection_layer.0", WIDTH, WIDTH)
    state.norm(f"{side}projection_layer.1", WIDTH)
    state.linear(f"{side}upsample_layer.1", OUT, WIDTH)
    state.linear(f"{side}gate_layer", 1, WIDTH)
    state.gpo("gpool")
    return state


def vse_image(channels: tuple[int, ...] = (5, 3)) -> State:
    state = Layers()
    side = "side_tuning_module."
    for number, width in enumerate(channels):
        state.linear(f"{side}downsample_layers.{number}.0", WIDTH, width, 1, 1)
        state.norm(f"{side}downsample_layers.{number}.1", WIDTH, statistics=True)
    for number in range(len(channels) - 1):
        state.linear(f"{side}identity_layers.{number}.0", channels[number], channels[-1])
    state.linear(f"{side}projection_layer.0", WIDTH, WIDTH)
    state.norm(f"{side}projection_layer.1", WIDTH, statistics=True)
    state.linear(f"{side}upsample_layer.1", OUT, WIDTH)
    state.linear(f"{side}gate_layer", 1, WIDTH)
    state.gpo("image_encoder")
    return state


def clip4clip(*sides: str, depth: int = 3) -> State:
    state = Layers()
    for side in sides or ("image", "text"):
        adapter = f"{side}_adapter."
        for number in range(depth):
            state.linear(f"{adapter}downsample_layers.{number}.1", WIDTH, 8)
        state.linear(f"{adapter}downsample_layer.1", WIDTH, 10)
        state.linear(f"{adapter}upsample_layer.1", 10, WIDTH)
        state.linear(f"{adapter}gate_layer", 1, WIDTH)
    state["clip.logit_scale"] = torch.tensor(2.5)
    return state


def clip_vil() -> State:
    state = Layers()
    for part in ("first_downsample_l", *(f"downsamples_l.{n}" for n in range(3))):
        state.linear(f"{VIL}{part}.0", WIDTH, 24)
        state.norm(f"{VIL}{part}.1", WIDTH)
    state.linear(f"{VIL}projection_l.0", 5, WIDTH)
    state.linear(f"{VIL}projection_l.2", WIDTH, 5)
    state.norm(f"{VIL}projection_l.3", WIDTH)
    state.linear(f"{VIL}final_upsample_l.0", 24, WIDTH)
    state.linear(f"{VIL}gate_layer_l", 1, WIDTH)
    state.linear("logit_fc.0", 48, 24)
    state.norm("logit_fc.2", 48)
    state.linear("logit_fc.3", 9, 48)
    return state


def mdetr() -> State:
    state = Layers()
    side = "transformer.side_"
    for half in ("encoder", "decoder"):
        for part in (f"downsample0_{half}", *(f"downsamples_{half}.{n}" for n in range(3))):
            state.linear(f"{side}{part}.0", WIDTH, 12)
            state.norm(f"{side}{part}.1", WIDTH)
        state.linear(f"{side}projection_{half}.0", 5, WIDTH)
        state.linear(f"{side}projection_{half}.2", WIDTH, 5)
        state.norm(f"{side}projection_{half}.3", WIDTH)
        state.linear(f"{side}gate_layer_{half}", 1, WIDTH)
    for number in range(3):
        state.linear(f"{side}projection_crosser.{number}.0", WIDTH, WIDTH)
        state.norm(f"{side}projection_crosser.{number}.1", WIDTH)
    state.linear(f"{side}final_upsample.1", 12, WIDTH)
    state.norm(f"{side}final_upsample.2", 12)
    state.linear("class_embed", 8, 12)
    for number, (out, given) in enumerate(((12, 12), (12, 12), (4, 12))):
        state.linear(f"bbox_embed.layers.{number}", out, given)
    return state


# Backbones


def tokens(**more: Any) -> Backbone:
    return create("states", {"shapes": [[5, 12]] * 3, "mask": True, **more})


def maps() -> Backbone:
    return create("states", {"shapes": [[5, 4, 4], [3, 2, 2]]})


def vectors(**more: Any) -> Backbone:
    return create("states", {"shapes": [[5, 8]] * 3, "anchor": 10, **more})


def trunk(name: str, arguments: dict[str, Any]) -> Backbone:
    torch.manual_seed(0)
    return create(name, {**arguments, "num_classes": 0})


def vil() -> Backbone:
    return trunk("clip_vil", SMALL_CLIP_VIL)


def boxes() -> Backbone:
    return trunk("mdetr", SMALL_MDETR)


KINDS: dict[str, tuple[Callable[[], State], Callable[[], Backbone]]] = {
    "vse_text": (vse_text, tokens),
    "vse_image": (vse_image, maps),
    "clip4clip_image": (clip4clip, vectors),
    "clip4clip_text": (clip4clip, lambda: vectors(mask=True, end=True)),
    "clip_vil": (clip_vil, vil),
    "mdetr": (mdetr, boxes),
}
TRUNKS: dict[str, tuple[Callable[[], State], Callable[[], Backbone]]] = {
    "vse_text": (vse_text, lambda: trunk("bert", BERT)),
    "clip_vil": KINDS["clip_vil"],
    "mdetr": KINDS["mdetr"],
}
every = pytest.mark.parametrize("kind", KINDS)
frozen = pytest.mark.parametrize("kind", TRUNKS)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], Path]:
    """A torch file of something: `file(saved)`."""

    def file(saved: Any) -> Path:
        path = tmp_path / "checkpoint.pth"
        torch.save(dict(saved) if isinstance(saved, Layers) else saved, path)
        return path

    return file


def same(found: Foreign, wanted: Foreign) -> bool:
    """Two readings are one."""
    return found.branches == wanted.branches and all(
        torch.equal(tensor, found.tensors[branch][name])
        for branch, named in wanted.tensors.items()
        for name, tensor in named.items()
    )


def refused(path: Path, backbone: Backbone, sentence: str, **details: str) -> IncompatibleArtefact:
    """The error of a file, which says one sentence, the file, and what was wanted and found."""
    with pytest.raises(IncompatibleArtefact, match=sentence) as caught:
        read("unipt", path, backbone)
    error = caught.value
    assert "\n" not in error.what
    assert not error.what.endswith(".")
    assert str(path) in error.details["where"]
    for key, text in details.items():
        assert text in error.details[key], error
    assert {"wanted", "found"} <= set(error.details) or "damaged" in sentence
    return error


# Files that are read


@every
def test_a_file(kind, file):
    state, backbone = (make() for make in KINDS[kind])
    found = read("unipt", file(state), backbone)
    assert found.source.startswith("UniPT")
    delta = found.delta("task", backbone)
    numbered = tuple(f"class_{n}" for n in range(9)) if kind == "clip_vil" else ()
    assert delta.labels == numbered
    assert delta.provenance["imported from"] == found.source
    assert ("logit_scale" in delta.provenance) == kind.startswith("clip4clip")


@every
def test_where_the_state_stands(kind, file):
    """Alone, in a dictionary, under the prefixes of distributed training, with averages or without."""
    state, backbone = (make() for make in KINDS[kind])
    wanted = read("unipt", file(state), backbone)
    other = {name: tensor + 1 for name, tensor in state.items()}
    inside = {
        name.replace("lxrt_encoder.model.bert", "lxrt_encoder.model.module.bert"): tensor
        for name, tensor in state.items()
    }
    for saved in (
        {"model": dict(state), "epoch": 3, "args": {"lr": 0.1}},
        {"model": other, "model_ema": dict(state), "optimizer": {}},
        {"model": dict(state), "model_ema": None},
        {"state_dict": dict(state)},
        {"model": [{}, dict(state)], "best_rsum": 1.0},
        {f"module.{name}": tensor for name, tensor in state.items()},
        inside,
    ):
        assert same(read("unipt", file(saved), backbone), wanted)


def test_best_checkpoint_of_mdetr(file):
    """It holds the trained weights, though its name is given for the averaged ones."""
    state, averaged = mdetr(), {name: tensor + 1 for name, tensor in mdetr().items()}
    best = read("unipt", file({"model": dict(state), "epoch": 3}), boxes())
    last = read("unipt", file({"model": dict(state), "model_ema": averaged}), boxes())
    assert torch.equal(best.tensors["class_embed/head"]["weight"], state["class_embed.weight"])
    assert torch.equal(last.tensors["class_embed/head"]["weight"], averaged["class_embed.weight"])


def test_both_sides_in_one_file(file):
    """The backbone decides which is read."""
    path = file({"model": [dict(vse_image()), dict(vse_text())]})
    assert read("unipt", path, tokens()).source == "UniPT VSE-infinity (text)"
    assert read("unipt", path, maps()).source == "UniPT VSE-infinity (image)"
    path = file(clip4clip())
    assert read("unipt", path, vectors()).source == "UniPT CLIP4Clip (image)"
    ends = vectors(mask=True, end=True)
    assert read("unipt", path, ends).source == "UniPT CLIP4Clip (text)"


def test_the_inner_part_of_clip_vil_alone(file):
    state = clip_vil()
    inner = {name.removeprefix("lxrt_encoder.model."): t for name, t in state.items()}
    assert same(read("unipt", file(inner), vil()), read("unipt", file(state), vil()))


def test_pooling_alone(file):
    state = Layers()
    state.gpo("gpool")
    found = read("unipt", file(state), tokens(), {"no_norm": "true"})
    assert list(found.branches) == ["head/gpo", "head/embedding"]


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_the_options_of_the_run_are_read(said, kind, file):
    """`model_best.pth` holds them as argparse made them."""
    options = kind(no_txtnorm=said, no_imgnorm=True, lr=1e-4)
    path = file({"model": [dict(vse_text())], "opt": options, "best_rsum": np.float64(500)})
    for given, unit in (({}, not said), ({"no_norm": "true"}, False), ({"no_norm": "false"}, True)):
        found = read("unipt", path, tokens(), given)
        (head,) = (b.tuner for b in found.branches.values() if b.tuner.answers)
        assert head.unit == unit


def test_settings_that_nothing_asks_for(file):
    with pytest.raises(UsageError, match="no_norm"):
        read("unipt", file(mdetr()), boxes(), {"no_norm": "true"})


# Frozen tensors


@frozen
def test_a_file_with_its_trunk(kind, file):
    make, backbone = TRUNKS[kind]
    state, own = make(), backbone()
    assert "trunk" in read("unipt", file(state), own).notes
    whole = {**own.model.state_dict(), **state}
    if kind == "vse_text":
        whole |= {"bert.pooler.dense.weight": torch.zeros(12, 12)}
        whole |= {"bert.embeddings.position_ids": torch.arange(16)[None]}
    found = read("unipt", file(whole), own)
    assert "trunk" not in found.notes
    assert same(found, read("unipt", file(state), own))


@frozen
def test_another_trunk(kind, file):
    make, backbone = TRUNKS[kind]
    own = backbone()
    whole = {**own.model.state_dict(), **make()}
    name = max(n for n in own.model.state_dict() if "weight" in n and "side" not in n)
    print_of = own.identity.fingerprint[:16]
    changed = {**whole, name: whole[name] + 1e-3}
    refused(file(changed), own, "not the backbone's", found=name, wanted=print_of)
    fewer = {n: t for n, t in whole.items() if n != name}
    refused(file(fewer), own, "lacks frozen tensors of the backbone", found=f"no {name}")
    layer = name.rpartition(".")[0] + "_2.weight"
    refused(file({**whole, layer: whole[name]}), own, "not the backbone's", found=layer)


def test_a_trunk_in_half_precision(file):
    """CLIP4Clip's files hold CLIP's weights as OpenAI has them: most of them float16."""
    tensors = openai(torch.Generator().manual_seed(0))
    tensors = {n: t.half() if t.dim() > 1 else t for n, t in tensors.items()}
    tensors.pop("input_resolution")
    for side, width in (("image", 12), ("text", 8)):
        arguments, own = from_openai(tensors, f"clip_{side}", heads=2)
        model = create(f"clip_{side}", arguments).model
        model.load_state_dict(own)
        backbone = wrap(model, f"clip_{side}", arguments)
        state = Layers()
        for number in range(3):
            state.linear(f"{side}_adapter.downsample_layers.{number}.1", WIDTH, width)
        state.linear(f"{side}_adapter.downsample_layer.1", WIDTH, 10)
        state.linear(f"{side}_adapter.upsample_layer.1", 10, WIDTH)
        state.linear(f"{side}_adapter.gate_layer", 1, WIDTH)
        whole = {**{f"clip.{n}": t for n, t in tensors.items()}, **state}
        assert "trunk" not in read("unipt", file(whole), backbone).notes
        name = "clip.visual.conv1.weight" if side == "image" else "clip.token_embedding.weight"
        whole[name] = whole[name] * 2
        refused(file(whole), backbone, "not the backbone's")


def test_parts_that_are_no_part_of_the_trunk(file):
    """The picture's own trunk, and positions that the features already hold."""
    own = vil()
    inner = "lxrt_encoder.model.bert.encoder."
    whole = {**own.model.state_dict(), **clip_vil()}
    whole[f"{inner}visual_model.visual.conv1.weight"] = torch.zeros(2)
    assert "pictures" not in read("unipt", file(whole), own).notes
    for axis in "xy":
        whole[f"{inner}visual_pos.{axis}_position_embedding.weight"] = torch.zeros(5, 20)
    assert "positions" in read("unipt", file(whole), own).notes["pictures"]
    own = trunk(
        "clip_vil", {**SMALL_CLIP_VIL, "visual": "map", "map_size": [2, 3], "map_positions": 5}
    )
    whole = {**whole, **own.model.state_dict()}
    assert "pictures" not in read("unipt", file(whole), own).notes
    state = mdetr()
    own = boxes()
    whole = {**own.model.state_dict(), **state}
    whole["backbone.0.body.conv1.weight"] = torch.zeros(2)
    whole["contrastive_align_projection_text.weight"] = torch.zeros(2)
    assert same(read("unipt", file(whole), own), read("unipt", file(state), own))


# Files that are refused


@every
def test_files_that_are_damaged(kind, file):
    state, backbone = (make() for make in KINDS[kind])
    path = file(state)
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, backbone, "the checkpoint is damaged")


def test_files_of_other_projects(file):
    own = tokens()
    refused(file({}), own, "holds no tensors", found="")
    refused(file({"epoch": 3, "lr": 0.1}), own, "holds no tensors", found="epoch, lr")
    refused(file([1, 2]), own, "holds no tensors", found="list")
    other = {"blocks.0.attn.qkv.weight": torch.zeros(2)}
    error = refused(file(other), own, "no checkpoint of UniPT", found="blocks.0.attn")
    assert "side_tuning_module." in error.details["wanted"]
    with pytest.raises(UsageError, match="no such file"):
        read("unipt", file({}).with_name("none"), own)


@pytest.mark.parametrize("part", ["query.lora_As.vqa", "output.adapter.adapters.vqa.gate"])
def test_tuners_inside_the_trunk_of_clip_vil(part, file):
    key = f"lxrt_encoder.model.bert.encoder.layer.0.attention.{part}"
    refused(file({key: torch.zeros(2)}), vil(), "stand inside CLIP-ViL's BERT", found=key)


def test_the_wrong_side(file):
    refused(file(vse_text()), maps(), "no image side", found="text")
    refused(file(vse_image()), tokens(), "no text side", found="image")
    ends = vectors(mask=True, end=True)
    refused(file(clip4clip("image")), ends, "no text side", found="image_adapter")
    refused(file(clip4clip("text")), vectors(), "no image side", found="text_adapter")
    refused(file(mdetr()), tokens(), "an encoder and a decoder", found="states", wanted="mdetr")


@pytest.mark.parametrize(
    ("state", "backbone"),
    [
        (vse_text, lambda: tokens(shapes=[[5, 12]] * 4)),
        (vse_image, lambda: create("states", {"shapes": [[5, 8, 8], [5, 4, 4], [3, 2, 2]]})),
        (clip4clip, lambda: vectors(shapes=[[5, 8]] * 4)),
        (clip_vil, lambda: trunk("clip_vil", {**SMALL_CLIP_VIL, "l_layers": 2})),
    ],
)
def test_another_number_of_hidden_states(state, backbone, file):
    refused(file(state()), backbone(), "another number of hidden states", wanted="in the file")


def test_a_backbone_without_the_layers_that_are_read(file):
    own = trunk("mdetr", {**SMALL_MDETR, "num_encoder_layers": 1})
    refused(file(mdetr()), own, "no layer whose input", wanted="at least 2", found="1")


@every
def test_every_tensor_is_wanted(kind, file):
    state, backbone = (make() for make in KINDS[kind])
    path = file(state)
    wanted = set(state)
    if kind.startswith("clip4clip"):
        wanted = {n for n in state if n.startswith(kind.removeprefix("clip4clip_"))}
    for name in sorted(wanted):
        if not name.endswith("num_batches_tracked") and not ("gate" in name and "bias" in name):
            path = file({n: t for n, t in state.items() if n != name})
            error = refused(path, backbone, "lacks a tensor", wanted=name)
            assert name not in error.details["found"].split(", ")


@every
def test_tensors_that_nothing_reads(kind, file):
    state, backbone = (make() for make in KINDS[kind])
    inside = next(n for n in state if "side_" in n or "_adapter" in n).rpartition(".")[0]
    if kind == "clip4clip_text":
        inside = inside.replace("image_", "text_")
    for name in (f"{inside}.lora.weight", "lora.weight"):
        path = file({**state, name: torch.zeros(2)})
        refused(path, backbone, "tensors of no known tuner", found=name)


@every
def test_layers_of_another_shape(kind, file):
    state, backbone = (make() for make in KINDS[kind])
    own = "text" if kind == "clip4clip_text" else ""
    name = next(n for n in state if n.startswith(own) and "gate" in n and "weight" in n)
    for wrong in (torch.zeros(2, WIDTH), torch.zeros(WIDTH)):
        path = file({**state, name: wrong})
        error = refused(path, backbone, "another shape than its layer", wanted="[1, any]")
        assert error.details["where"].endswith(f": {name}")
    name = next(n for n in state if n.startswith(own) and n.endswith(".bias"))
    refused(file({**state, name: torch.zeros(99)}), backbone, "another shape", found="[99]")


@pytest.mark.parametrize(
    ("make", "backbone", "changes"),
    [
        (lambda: vse_text((12,)), lambda: tokens(shapes=[[5, 12]]), {}),
        (vse_text, tokens, {"gpool.gru.weight_ih_l0": torch.zeros(9, 3)}),
        (clip4clip, vectors, {"image_adapter.upsample_layer.1.weight": torch.zeros(9, WIDTH),
                              "image_adapter.upsample_layer.1.bias": torch.zeros(9)}),
    ],
    ids=["no target", "odd positions", "not the anchor's width"],
)  # fmt: skip
def test_layers_that_do_not_fit_each_other(make, backbone, changes, file):
    refused(file({**make(), **changes}), backbone(), "do not fit each other")


def test_a_scale_that_is_no_number(file):
    path = file({**clip4clip(), "clip.logit_scale": torch.zeros(2)})
    with pytest.raises(IncompatibleArtefact, match="no number"):
        read("unipt", path, vectors())


def test_answers_to_questions(file):
    state = mdetr()
    state |= {"qa_embed.weight": torch.zeros(4, 12), "answer_type_head.weight": torch.zeros(3, 12)}
    refused(file(state), boxes(), "answers questions", found="answer_type_head.weight")


FORMS = {
    "pass_pos_and_query": (False, None),
    "pre_norm": (True, "transformer.encoder.norm.weight"),
    "contrastive_loss": (True, "transformer.CLS.weight"),
    "position_embedding": ("learned", "backbone.1.row_embed.weight"),
    "masks": (True, "mask_head.lay1.weight"),
    "predict_final": (True, "isfinal_embed.weight"),
}


@pytest.mark.parametrize("option", FORMS)
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_forms_of_mdetr_that_are_not_carried(option, kind, file):
    """By the arguments of the run, and by the tensors of a file without them."""
    state, backbone = mdetr(), boxes()
    value, key = FORMS[option]
    saved = {"model": dict(state), "args": kind(**{option: value, "nheads": 2})}
    refused(file(saved), backbone, "form of MDETR cannot be carried", found=f"{option}={value!r}")
    if key is not None:
        refused(file({**state, key: torch.zeros(2)}), backbone, "cannot be carried", found=key)
    prefixed = {f"detr.{name}": tensor for name, tensor in state.items()}
    prefixed["bbox_attention.q_linear.weight"] = torch.zeros(2)
    refused(file(prefixed), backbone, "answers with masks", found="bbox_attention")


@pytest.mark.parametrize("option", ["nheads", "enc_layers", "dec_layers"])
def test_another_transformer_than_the_run_had(option, file):
    """The number of heads stands in no tensor."""
    state, backbone = mdetr(), boxes()
    transformer = backbone.model.transformer
    own = {
        "nheads": transformer.encoder.layers[0].self_attn.heads,
        "enc_layers": len(transformer.encoder.layers),
        "dec_layers": len(transformer.decoder.layers),
        "pass_pos_and_query": True,
        "position_embedding": "sine",
    }
    read("unipt", file({"model": dict(state), "args": own}), backbone)
    other = {**own, option: own[option] + 1}
    path = file({"model": dict(state), "args": other})
    refused(path, backbone, "another transformer", wanted=f"{option}={own[option] + 1}")


LAYERS_OVER_FRAMES = {
    "seqTransf": "transformerClip.resblocks.0.ln_1.weight",
    "seqLSTM": "lstm_visual.weight_ih_l0",
}


@pytest.mark.parametrize("header", LAYERS_OVER_FRAMES)
def test_layers_over_the_frames_of_a_video(header, file):
    state = clip4clip()
    frames = {"frame_position_embeddings.weight": torch.zeros(2, 10)}
    path = file({**state, **frames, LAYERS_OVER_FRAMES[header]: torch.zeros(2)})
    with pytest.raises(IncompatibleArtefact, match=f"layers over the frames.*{header}") as caught:
        read("unipt", path, vectors())
    assert LAYERS_OVER_FRAMES[header] in caught.value.details["found"]
    assert "--set frames_alone=true" in caught.value.details["do"]
    plain = file(state).with_name("plain.pth")
    torch.save(dict(state), plain)
    path = file({**state, **frames, LAYERS_OVER_FRAMES[header]: torch.zeros(2)})
    for backbone, given in (
        (vectors(), {"frames_alone": "true"}),
        (vectors(mask=True, end=True), {}),
    ):
        found = read("unipt", path, backbone, given)
        assert same(found, read("unipt", plain, backbone))
        assert header in found.notes["frames"]


def test_a_transformer_over_caption_and_video(file):
    state = {**clip4clip(), "similarity_dense.weight": torch.zeros(1, 10)}
    for backbone in (vectors(), vectors(mask=True, end=True)):
        with pytest.raises(IncompatibleArtefact, match="by a transformer over both"):
            read("unipt", file(state), backbone)


def test_captions_on_states_without_a_mask(tmp_path):
    """Padding would be read as words."""
    golden = tmp_path / "model_best.pth"
    state = {
        "side_tuning_module.gate_layer.weight": torch.zeros(1, 4),
        "side_tuning_module.gate_layer.bias": torch.zeros(1),
        **{
            f"side_tuning_module.downsample_layers.{n}.{part}": torch.zeros(shape)
            for n in range(2)
            for part, shape in {"0.weight": (4, 6), "0.bias": 4, "1.weight": 4, "1.bias": 4}.items()
        },
    }
    torch.save({"model": [{}, state]}, golden)
    backbone = create("states", {"shapes": [[5, 6], [5, 6]]})
    with pytest.raises(IncompatibleArtefact, match="the backbone has no mask") as refused:
        read("unipt", golden, backbone)
    assert "mask=true" in str(refused.value.details["do"])


@pytest.mark.parametrize("arguments", [{"mask": "banana"}, {"mask": 7}, {"end": "false"}])
def test_flags_of_states_are_true_or_false(arguments):
    with pytest.raises(UsageError, match="neither true nor false"):
        create("states", {"shapes": [[5, 6], [5, 6]], **arguments})


@pytest.mark.parametrize("shapes", [[9, 24], "abc"])
def test_shapes_of_states_are_lists(shapes):
    with pytest.raises(UsageError, match="not those of hidden states"):
        create("states", {"shapes": shapes})
