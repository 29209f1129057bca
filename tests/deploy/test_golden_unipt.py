"""From UniPT's own checkpoints to the answers that its own code gave: reader, delta, torch, ONNX.

The data stand beside the repository, or where UTUNE_GOLDEN points; their README says how they were made.
Every case that lies there is run, and a table of all errors is printed at the end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from utune_deploy.export.graph import Inputs, clean, serialise, trace
from utune_deploy.export.passes import rewrite
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge.architectures.clip import from_openai
from utune_deploy.merge.attach import Tuned
from utune_deploy.merge.backbone import Backbone, create, wrap
from utune_deploy.merge.bank import stack
from utune_deploy.merge.delta import load_delta, require_backbone, save_delta
from utune_deploy.merge.errors import UtuneError
from utune_deploy.merge.importers import read
from utune_deploy.merge.mixed import Single
from utune_deploy.merge.retrieval import similarity
from utune_deploy.merge.sites import measure

from .test_golden import FLOAT32, FLOAT64, GOLDEN, needs_golden

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A stored run of one side network.

    Attributes:
        name: Its folder, and the side of it where there are two.
        file: What is read.
        backbone: What it is read on.
        inputs: Of the backbone, in order.
        expected: What the original code answered, float64.
        settings: What the file does not say of itself.
    """

    name: str
    file: Path
    backbone: Backbone
    inputs: tuple[Tensor, ...]
    expected: Tensor
    settings: dict[str, str] = field(default_factory=dict)


def _checkpoint(folder: Path) -> Path:
    (file,) = (p for p in folder.iterdir() if p.suffix in (".pth", ".bin") or ".bin." in p.name)
    return file


def _mask(lengths: Tensor, tokens: int) -> Tensor:
    return (torch.arange(tokens) < lengths[:, None]).long()


def _states(io: dict[str, Tensor], prefix: str) -> list[Tensor]:
    count = sum(key.startswith(prefix) for key in io)
    return [io[f"{prefix}{number}"] for number in range(count)]


def _given(shapes: list[Tensor], **arguments: Any) -> Backbone:
    return create("states", {"shapes": [list(t.shape[1:]) for t in shapes], **arguments})


def _gpo(folder: Path, config: dict[str, Any], io: dict[str, Tensor]) -> list[Case]:
    features = io["input.features"]
    mask = _mask(io["input.lengths"], features.shape[1])
    backbone = _given([features], mask=True)
    settings = {"no_norm": "true"}
    expected = io["expected64.pooled"]
    return [Case(folder.name, _checkpoint(folder), backbone, (features, mask), expected, settings)]


def _vse_text(folder: Path, config: dict[str, Any], io: dict[str, Tensor]) -> list[Case]:
    options = config["original_config"]
    settings = {"no_norm": "true"} if options.get("no_txtnorm") else {}
    if (folder / "backbone.safetensors").is_file():
        ids = io["input.input_ids"]
        bert = {
            k: v for k, v in options["bert"].items() if k not in ("hidden_act", "layer_norm_eps")
        }
        backbone = create("bert", {**bert, "length": ids.shape[1]})
        tensors = load_file(folder / "backbone.safetensors")
        kept = {k: v for k, v in tensors.items() if k in backbone.model.state_dict()}
        backbone.model.load_state_dict(kept)
        backbone = wrap(backbone.model, "bert", backbone.identity.arguments)
        inputs: tuple[Tensor, ...] = (ids, (ids != 0).long())
    else:
        states = _states(io, "input.hidden.")
        inputs = (*states, _mask(io["input.lengths"], states[0].shape[1]))
        backbone = _given(states, mask=True)
    expected = io["expected64.embedding"]
    return [Case(folder.name, _checkpoint(folder), backbone, inputs, expected, settings)]


def _vse_image(folder: Path, config: dict[str, Any], io: dict[str, Tensor]) -> list[Case]:
    expected = io["expected64.embedding"]
    if "input.images" in io:
        resnet, images = config["original_config"]["resnet"], io["input.images"]
        arguments = {
            "image_size": images.shape[-1],
            "layers": resnet["layers"],
            "stem_width": resnet["stem"],
        }
        backbone = create("caffe_resnet", arguments)
        saved = torch.load(_checkpoint(folder), weights_only=True)["model"][0]
        prefix = "module.backbone.resnet."
        tensors = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        own = backbone.model.state_dict()
        backbone.model.load_state_dict({name: tensors[name] for name in own})
        backbone = wrap(backbone.model, "caffe_resnet", arguments)
        return [Case(folder.name, _checkpoint(folder), backbone, (images,), expected)]
    maps = _states(io, "input.feature_map.")
    return [Case(folder.name, _checkpoint(folder), _given(maps), tuple(maps), expected)]


def _vse_both(folder: Path, config: dict[str, Any], io: dict[str, Tensor]) -> list[Case]:
    found = []
    for side, read_side in (("image", "feature_map."), ("text", "hidden.")):
        keys = sorted(k for k in io if k.startswith("input.") and read_side in k)
        states = [io[k] for k in sorted(keys, key=lambda k: int(k.rpartition(".")[2]))]
        expected = next(
            v
            for k, v in io.items()
            if k.startswith("expected64.") and side in k and "embedding" in k
        )
        inputs = tuple(states)
        if side == "text":
            lengths = next(v for k, v in io.items() if k.startswith("input.") and "lengths" in k)
            inputs = (*inputs, _mask(lengths, states[0].shape[1]))
        backbone = _given(states, mask=side == "text")
        found.append(Case(f"{folder.name}/{side}", _checkpoint(folder), backbone, inputs, expected))
    return found


def _clip4clip(folder: Path, config: dict[str, Any], io: dict[str, Tensor]) -> list[Case]:
    file = _checkpoint(folder)
    expected = {
        "image": io["expected64.visual_output"].flatten(0, 1),
        "text": io["expected64.sequence_output"][:, 0],
    }
    found = []
    for side in ("image", "text"):
        if (folder / "backbone.safetensors").is_file():
            kind, heads = f"clip_{side}", config["original_config"]["clip"]
            number = heads["vision_heads" if side == "image" else "transformer_heads"]
            arguments, tensors = from_openai(
                load_file(folder / "backbone.safetensors"), kind, heads=number
            )
            backbone = create(kind, arguments)
            backbone.model.load_state_dict(tensors)
            backbone = wrap(backbone.model, kind, arguments)
            name = "input.frames" if side == "image" else "input.input_ids"
            inputs: tuple[Tensor, ...] = (io[name],)
        else:
            states = _states(io, f"input.{side}.hidden.")
            embedding = io[f"input.{side}.embedding"]
            inputs = (*states, embedding)
            if side == "text":
                ids = io["input.text.input_ids"]
                inputs = (*inputs, (ids != 0).long(), ids.argmax(-1, keepdim=True))
            backbone = _given(
                states, anchor=embedding.shape[1], mask=side == "text", end=side == "text"
            )
        found.append(Case(f"{folder.name}/{side}", file, backbone, inputs, expected[side]))
    return found


def _trunk(folder: Path, name: str, arguments: dict[str, Any]) -> Backbone:
    backbone = create(name, arguments)
    backbone.model.load_state_dict(load_file(folder / "backbone.safetensors"))
    return wrap(backbone.model, name, arguments)


def _clipvil(folder: Path, config: dict[str, Any], io: dict[str, Tensor]) -> list[Case]:
    options = config["original_config"]
    bert = load_file(folder / "backbone.safetensors")
    inner = "lxrt_encoder.model.bert."
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "l_layers")
    words = f"{inner}embeddings.word_embeddings.weight"
    arguments = {key: options[key] for key in (*sizes, "visual_feat_dim")} | {
        "vocab_size": bert[words].shape[0],
        "max_position_embeddings": bert[words.replace("word", "position")].shape[0],
        "length": io["input.input_ids"].shape[1],
        "visual_mask": "input.visual_attention_mask" in io,
        "token_types": "input.token_type_ids" in io,
    }
    picture = io.get("input.clip_feature_map")
    if picture is not None:
        positions = bert[f"{inner}encoder.visual_pos.x_position_embedding.weight"]
        arguments |= {"visual": "map", "map_size": list(picture.shape[2:])}
        arguments["map_positions"] = positions.shape[0]
    else:
        picture = io["input.visual_feats"]
        arguments |= {"visual_tokens": picture.shape[1]}
        arguments["visual"] = "boxes" if "input.boxes" in io else "tokens"
    more = ("boxes", "visual_attention_mask", "token_type_ids")
    given = (io[f"input.{name}"] for name in more if f"input.{name}" in io)
    inputs = (io["input.input_ids"], io["input.attention_mask"], picture, *given)
    backbone = _trunk(folder, "clip_vil", {**arguments, "num_classes": 0})
    return [Case(folder.name, _checkpoint(folder), backbone, inputs, io["expected64.logits"])]


def _mdetr(folder: Path, config: dict[str, Any], io: dict[str, Tensor]) -> list[Case]:
    options = config["original_config"]
    tensors = load_file(folder / "backbone.safetensors")
    text = "transformer.text_encoder."
    features, words = io["input.features"], io.get("input.text_hidden")
    sizes = ("d_model", "nhead", "dim_feedforward", "num_encoder_layers", "num_decoder_layers")
    table = tensors[f"{text}embeddings.word_embeddings.weight"]
    arguments = {key: options[key] for key in (*sizes, "num_queries")} | {
        "num_classes": 0,
        "backbone_channels": features.shape[1],
        "map_size": list(features.shape[2:]),
        "text": "ids" if words is None else "hidden",
        "text_length": (io["input.input_ids"] if words is None else words).shape[1],
        "text_hidden": table.shape[1],
        "text_layers": len(
            {k.split(".")[4] for k in tensors if k.startswith(f"{text}encoder.layer")}
        ),
        "text_heads": 2,
        "text_intermediate": tensors[f"{text}encoder.layer.0.intermediate.dense.weight"].shape[0],
        "text_vocab_size": table.shape[0],
        "text_positions": tensors[f"{text}embeddings.position_embeddings.weight"].shape[0],
        "text_types": tensors[f"{text}embeddings.token_type_embeddings.weight"].shape[0],
    }
    if words is None:
        arguments["text_layer_norm_eps"] = options["roberta"]["layer_norm_eps"]
        said = (io["input.input_ids"], io["input.attention_mask"])
    else:
        said = (words, (~io["input.text_padding"]).long())
    backbone = _trunk(folder, "mdetr", arguments)
    inputs = (features, (~io["input.feature_mask"]).long(), *said)
    expected = torch.cat([io["expected64.pred_logits"], io["expected64.pred_boxes"]], dim=-1)
    return [Case(folder.name, _checkpoint(folder), backbone, inputs, expected)]


KINDS = {
    "unipt_gpo": _gpo,
    "unipt_vse_text": _vse_text,
    "unipt_vse_image": _vse_image,
    "unipt_vse_both": _vse_both,
    "unipt_clip4clip": _clip4clip,
    "unipt_clipvil": _clipvil,
    "unipt_mdetr": _mdetr,
}
REFUSED = {  # on purpose
    "unipt_mdetr_side_qa_clevr": "the checkpoint answers questions, by queries inside the frozen decoder",
}
FOLDERS = [f for f in sorted(GOLDEN.glob("unipt_*")) if (f / "config.json").is_file()]
every = pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if f.name not in REFUSED], ids=lambda folder: folder.name
)


def cases(folder: Path) -> list[Case]:
    config = json.loads((folder / "config.json").read_text())
    make = next(make for prefix, make in KINDS.items() if folder.name.startswith(prefix))
    return make(folder, config, load_file(folder / "io.safetensors"))


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def table(request):
    """Rows that are printed when the last case is through."""
    rows: list[str] = []
    yield rows
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        terminal.ensure_newline()
        for line in (f"{'case':48} {'fp64':>8} {'fp32':>8} {'ONNX':>8}", *rows):
            terminal.write_line(line)


@needs_golden
@every
def test_the_originals_answers(folder, table, tmp_path):
    for case in cases(folder):
        foreign = read("unipt", case.file, case.backbone, case.settings)
        path = tmp_path / f"{case.name.replace('/', '_')}.safetensors"
        save_delta(path, foreign.delta("task", case.backbone))
        delta = load_delta(path)
        require_backbone(delta, case.backbone, measure(case.backbone))
        with torch.no_grad():
            single = Tuned(case.backbone, delta.branches, delta.tensors)(*case.inputs)
        names = [entry.name for entry in case.backbone.inputs]
        rows = {
            n: t[:1].repeat(2, *[1] * (t.dim() - 1))
            for n, t in zip(names, case.inputs, strict=True)
        }
        model = trace(Single(case.backbone, stack([delta], torch.float32)).eval(), Inputs(rows))
        rewrite(model)
        session = OnnxRuntimeSession(serialise(clean(model), {}))
        given = {n: t.numpy() for n, t in zip(names, case.inputs, strict=True)}
        answered = torch.from_numpy(session.run(given))
        case.backbone.model.double()
        exact = [t.double() if t.is_floating_point() else t for t in case.inputs]
        with torch.no_grad():
            double = Tuned(case.backbone, delta.branches, delta.tensors)(*exact)
        errors = [apart(found, case.expected) for found in (double, single, answered)]
        table.append(f"{case.name:48} " + " ".join(f"{error:8.1e}" for error in errors))
        assert errors[0] <= FLOAT64
        assert errors[1] <= FLOAT32
        assert errors[2] <= FLOAT32


@needs_golden
@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if f.name in REFUSED], ids=lambda folder: folder.name
)
def test_what_is_refused_on_purpose(folder):
    for case in cases(folder):
        with pytest.raises(UtuneError, match=REFUSED[folder.name]):
            read("unipt", case.file, case.backbone, case.settings)


@needs_golden
@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if "clip4clip" in f.name], ids=lambda folder: folder.name
)
def test_similarity_of_captions_and_videos(folder):
    io = load_file(folder / "io.safetensors")
    state = torch.load(_checkpoint(folder), weights_only=True)
    found = similarity(
        io["expected64.sequence_output"][:, 0],
        io["expected64.visual_output"],
        io["input.video_mask"],
        float(state["clip.logit_scale"].double()),
    )
    assert apart(found, io["expected64.similarity"]) <= FLOAT64
