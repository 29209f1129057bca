"""CLIP-ViL's and MDETR's trunks: stored states of the release's own code, its seats, and its padding."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from utune_deploy.export.graph import OPSET, clean, serialise
from utune_deploy.export.passes import rewrite
from utune_deploy.merge.architectures.bert_layers import BertLayer
from utune_deploy.merge.architectures.clip_vil import BERT, ClipVil
from utune_deploy.merge.architectures.mdetr import Mdetr, MultiHead, hold_back, sine_positions
from utune_deploy.merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    Trunk = ClipVil | Mdetr

GOLDEN = Path(
    os.environ.get("UTUNE_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")
)
CLIP_VIL, MDETR = "unipt_clipvil_side", "unipt_mdetr_side"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}  # largest difference over largest value
SMALL_CLIP_VIL = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "l_layers": 3,
    "visual_feat_dim": 20,
    "vocab_size": 40,
    "max_position_embeddings": 24,
    "length": 7,
    "visual_tokens": 6,
    "num_classes": 9,
}
BOXES = {"visual": "boxes", "visual_mask": True, "token_types": True}
MAP = {"visual": "map", "map_size": [2, 3], "map_positions": 5}
SMALL_MDETR = {
    "d_model": 12,
    "nhead": 2,
    "dim_feedforward": 16,
    "num_encoder_layers": 3,
    "num_decoder_layers": 3,
    "num_queries": 5,
    "num_classes": 7,
    "backbone_channels": 6,
    "map_size": [4, 5],
    "text_length": 6,
    "text_hidden": 8,
    "text_layers": 1,
    "text_heads": 2,
    "text_intermediate": 8,
    "text_vocab_size": 12,
    "text_positions": 16,
    "text_types": 2,
}
SIX_LAYERS = {"num_encoder_layers": 6, "num_decoder_layers": 6}

golden = pytest.mark.skipif(
    not (GOLDEN / "README.md").is_file(),
    reason=f"no golden data at {GOLDEN}; set UTUNE_GOLDEN to their folder",
)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
trunks = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda **more: filled(ClipVil(**{**SMALL_CLIP_VIL, **more})), id="clip_vil"),
        pytest.param(
            lambda **more: filled(ClipVil(**{**SMALL_CLIP_VIL, **BOXES, **more})),
            id="clip_vil_boxes",
        ),
        pytest.param(
            lambda **more: filled(ClipVil(**{**SMALL_CLIP_VIL, **MAP, **more})), id="clip_vil_map"
        ),
        pytest.param(lambda **more: filled(Mdetr(**{**SMALL_MDETR, **more})), id="mdetr"),
        pytest.param(
            lambda **more: filled(Mdetr(**{**SMALL_MDETR, "text": "ids", **more})), id="mdetr_ids"
        ),
    ],
)


def filled(model: Trunk) -> Trunk:
    """The model with random values everywhere, in eval mode."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            scale = 0.3 if p.dim() > 1 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=noise))
            if p.dim() == 1 and name.lower().endswith("norm.weight"):
                p.add_(1.0)
    return model.eval()


def examples(model: Trunk, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Random values of every input."""
    noise = torch.Generator().manual_seed(1)
    drawn = (given.draw(batch, noise) for given in model.inputs)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in drawn)


def seen(model: nn.Module, paths: tuple[str, ...], *tensors: Tensor) -> dict[str, Tensor]:
    """What the modules at these paths gave in one pass, each called once; `""` is the answer."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> None:
            assert path not in found
            assert isinstance(value, torch.Tensor)
            found[path] = value

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        found[""] = model(*tensors)
    for handle in handles:
        handle.remove()
    return found


def give(value: Tensor) -> Callable[..., Tensor]:
    """A hook that puts a value in the place of what its module gave."""
    return lambda *_: value


class Stored:
    """A stored run of the release: the trunk with its weights, inputs and states."""

    def __init__(self, case: str, dtype: torch.dtype) -> None:
        folder = GOLDEN / case
        self.dtype = dtype
        self.config = json.loads((folder / "config.json").read_text())
        self.io = load_file(folder / "io.safetensors")
        self.weights = load_file(folder / "backbone.safetensors")
        saved = torch.load(folder / "checkpoint.pth", weights_only=True)
        self.saved = {k: v.to(dtype) for k, v in saved.get("model_ema", saved).items()}
        self.model = self.make().to(dtype).eval()

    def make(self) -> Trunk:
        settings = self.config["original_config"]
        if "d_model" in settings:
            more = {k: v for k, v in SMALL_MDETR.items() if k.startswith(("text", "map"))}
            model: Trunk = Mdetr(**{**more, **settings, "num_classes": 0})
        else:
            unused = ("reduction_factor", "num_answers", "mode")
            settings = {k: v for k, v in settings.items() if k not in unused}
            model = ClipVil(**{**SMALL_CLIP_VIL, **settings, "num_classes": 0})
        model.load_state_dict(self.weights)  # strict
        return model

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        def real(name: str) -> Tensor:
            return self.io[f"input.{name}"].to(self.dtype)

        if isinstance(self.model, ClipVil):
            ids, mask = self.io["input.input_ids"], self.io["input.attention_mask"]
            return ids, mask, real("visual_feats")
        masks = [(~self.io[f"input.{name}"]).long() for name in ("feature_mask", "text_padding")]
        return real("features"), masks[0], real("text_hidden"), masks[1]

    def close(self, found: Tensor, name: str) -> None:
        """Hold a value to the stored one."""
        wanted = self.io[name]
        assert found.dtype == self.dtype
        assert found.shape == wanted.shape
        difference = float((found.double() - wanted.double()).abs().max())
        assert difference <= TOLERANCE[self.dtype] * float(wanted.abs().max()), name


@golden
@pytest.mark.parametrize("case", [CLIP_VIL, MDETR])
def test_the_names_are_the_release_s(case):
    stored = Stored(case, torch.float32)
    own = {name: tuple(t.shape) for name, t in stored.model.state_dict().items()}
    assert own == {name: tuple(t.shape) for name, t in stored.weights.items()}


@golden
@dtypes
def test_clip_vil_s_states(dtype):
    stored = Stored(CLIP_VIL, dtype)
    model = stored.model
    biases: list[Tensor] = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_pre_hook(lambda _, args: biases.append(args[1]))
    found = seen(model, (*model.hidden_states, "mask", "features"), *stored.inputs)
    for number, path in enumerate(model.hidden_states):
        stored.close(found[path], f"hidden64.hidden.{number}")
    stored.close(found["features"], f"hidden64.hidden.{len(model.bert.encoder.layer)}")
    assert torch.equal(found["mask"], (stored.io["hidden64.additive_mask"] == 0)[:, 0, 0].to(dtype))
    assert len(biases) == len(model.bert.encoder.layer)
    for bias in biases:
        assert torch.equal(bias, stored.io["hidden64.additive_mask"].to(dtype))


@golden
@dtypes
def test_clip_vil_s_pooler_reads_the_seat(dtype):
    stored = Stored(CLIP_VIL, dtype)
    side = stored.io["hidden64.side_output"].to(dtype)
    stored.model.features.register_forward_hook(give(side))
    with torch.no_grad():
        stored.close(stored.model(*stored.inputs), "expected64.pooled")


@golden
@dtypes
def test_mdetr_s_states(dtype):
    stored = Stored(MDETR, dtype)
    model = stored.model
    positions: list[Tensor] = []
    for layer in model.transformer.encoder.layers:
        layer.register_forward_pre_hook(lambda _, args: positions.append(args[2]))
    seats = ("encoder_mask", "side_memory", "features")
    paths = (*model.hidden_states, *model.decoder_hidden_states, *seats)
    found = seen(model, paths, *stored.inputs)
    for side, states in (
        ("encoder", model.hidden_states),
        ("decoder", model.decoder_hidden_states),
    ):
        assert len(states) == 7
        for number, path in enumerate(states):
            stored.close(found[path].transpose(0, 1), f"hidden64.{side}.hidden.{number}")
    stored.close(found["side_memory"].transpose(0, 1), "hidden64.encoder.hidden.6")
    stored.close(found["features"].transpose(0, 1), "hidden64.decoder.hidden.6")
    padding = stored.io["hidden64.encoder.key_padding_mask"]
    assert torch.equal(found["encoder_mask"], (~padding).to(dtype))
    assert len(positions) == 6
    for position in positions:
        stored.close(position.transpose(0, 1), "hidden64.pos_embed")


@golden
@dtypes
def test_mdetr_s_heads_read_the_seat(dtype):
    stored = Stored(MDETR, dtype)
    model = Mdetr(**{**SMALL_MDETR, **SIX_LAYERS}).to(dtype).eval()
    heads = {k: v for k, v in stored.saved.items() if k.startswith(("class_embed", "bbox_embed"))}
    model.load_state_dict({**stored.weights, **heads})  # strict
    model.features.register_forward_hook(give(stored.io["expected64.side_output"][-1].to(dtype)))
    with torch.no_grad():
        classes, boxes = model(*stored.inputs).split([8, 4], dim=-1)
    stored.close(classes, "expected64.pred_logits")
    stored.close(boxes, "expected64.pred_boxes")


@dtypes
@trunks
def test_an_answer_s_shape(make, dtype):
    model = make().to(dtype)
    with torch.no_grad():
        answer = model(*examples(model, 3, dtype))
    assert answer.shape == ((3, 9) if isinstance(model, ClipVil) else (3, 5, 7 + 1 + 4))
    assert answer.dtype == dtype
    assert answer.isfinite().all()
    if isinstance(model, Mdetr):
        assert ((answer[..., -4:] > 0) & (answer[..., -4:] < 1)).all()


@trunks
def test_the_inputs_say_what_forward_takes(make):
    model = make()
    kinds = {
        "input_ids": "ids",
        "attention_mask": "mask",
        "feature_mask": "mask",
        "text_mask": "mask",
        "visual_mask": "mask",
        "token_type_ids": "ids",
    }
    assert [given.values for given in model.inputs] == [
        kinds.get(given.name, "normal") for given in model.inputs
    ]
    json.dumps([given.shape for given in model.inputs])
    for given in model.inputs:
        if given.values == "ids":
            assert int(given.draw(64, torch.Generator().manual_seed(0)).max()) < (given.high or 0)


@trunks
def test_without_classes_the_heads_are_the_identity(make):
    bare, whole = make(num_classes=0), make()
    named = bare.pretrained_cfg["classifier"]
    classifiers = (named,) if isinstance(named, str) else named
    assert all(isinstance(bare.get_submodule(path), nn.Identity) for path in classifiers)
    more = set(whole.state_dict()) - set(bare.state_dict())
    assert {name.partition(".")[0] for name in more} == set(classifiers)
    assert set(bare.state_dict()) <= set(whole.state_dict())
    found = seen(bare, ("features",), *examples(bare, 2))
    x = found["features"]
    if isinstance(bare, ClipVil):
        assert torch.equal(found[""], bare.bert.pooler(x))
    else:
        assert torch.equal(found[""], torch.cat([x, x.sigmoid()], dim=-1))


@trunks
def test_a_head_in_the_place_of_a_classifier(make):
    bare, whole = make(num_classes=0), make()
    bare.load_state_dict(whole.state_dict(), strict=False)
    named = bare.pretrained_cfg["classifier"]
    for path in (named,) if isinstance(named, str) else named:
        head = whole.get_submodule(path)
        bare.get_submodule(path).register_forward_hook(lambda _, args, __, head=head: head(args[0]))
    tensors = examples(bare, 2)
    with torch.no_grad():
        assert torch.equal(bare(*tensors), whole(*tensors))


def test_clip_vil_s_seats():
    model = filled(ClipVil(**SMALL_CLIP_VIL))
    tensors = examples(model, 3)
    layers = tuple(f"{BERT}.encoder.layer.{n}" for n in range(3))
    assert model.hidden_states == ("joint", *layers)
    found = seen(model, (*model.hidden_states, "mask", "features"), *tensors)
    assert all(found[path].shape == (3, 13, 24) for path in model.hidden_states)
    assert torch.equal(found["mask"][:, :7], tensors[1].float())
    assert (found["mask"][:, 7:] == 1).all()
    assert torch.equal(found["features"], found[layers[-1]])


def test_a_map_is_its_cells_with_two_positions(error):
    model = filled(ClipVil(**{**SMALL_CLIP_VIL, **MAP})).double()
    plain = ClipVil(**SMALL_CLIP_VIL).double().eval()
    own = {n: t for n, t in model.state_dict().items() if "visual_pos" not in n}
    plain.load_state_dict(own)
    ids, mask, cells = examples(model, 2, torch.float64)
    first, second = (table.weight for table in model.bert.encoder.visual_pos.children())
    assert first.shape == (5, 20)
    tokens = [cells[:, :, x, y] + first[x] + second[y] for x in range(2) for y in range(3)]
    with torch.no_grad():
        wanted = plain(ids, mask, torch.stack(tokens, dim=1))
        assert error(model(ids, mask, cells), wanted) < 1e-14


def test_boxes_masks_and_types(error):
    model = filled(ClipVil(**{**SMALL_CLIP_VIL, **BOXES})).double()
    ids, mask, feats, boxes, visible, types = examples(model, 3, torch.float64)
    visible[:, 0], visible[:, 3], types[:, 1] = 0, 0, 1  # holes
    bert = model.bert
    embed = bert.encoder.visn_fc
    with torch.no_grad():
        found = seen(model, ("joint", "mask"), ids, mask, feats, boxes, visible, types)
        feature = embed.visn_layer_norm(embed.visn_fc(feats))
        box = embed.box_layer_norm(embed.box_fc(boxes))
        assert error(found["joint"][:, 7:], (feature + box) / 2) < 1e-14
        words = bert.embeddings(ids, torch.arange(7), types)
        assert torch.equal(found["joint"][:, :7], words)
        assert not torch.allclose(words, bert.embeddings(ids, torch.arange(7)))
        assert torch.equal(found["mask"], torch.cat([mask, visible], dim=1).double())
        junk = torch.where(visible[..., None] == 0, feats + 9, feats)
        assert error(model(ids, mask, junk, boxes, visible, types), found[""]) < 1e-14


def test_mdetr_s_seats():
    model = filled(Mdetr(**SMALL_MDETR))
    tensors = examples(model, 3)
    encoder = tuple(f"transformer.encoder.layers.{n}" for n in range(3))
    decoder = tuple(f"transformer.decoder.layers.{n}" for n in range(2))
    assert model.hidden_states == ("encoder_input", *encoder)
    assert model.decoder_hidden_states == ("decoder_input", *decoder, "transformer.decoder.norm")
    seats = ("encoder_mask", "side_memory", "features", "transformer.decoder.layers.2")
    paths = (*model.hidden_states, *model.decoder_hidden_states, *seats)
    found = seen(model, paths, *tensors)
    assert all(found[path].shape == (3, 26, 12) for path in model.hidden_states)
    assert all(found[path].shape == (3, 5, 12) for path in model.decoder_hidden_states)
    assert torch.equal(
        found["encoder_mask"], torch.cat([tensors[1].flatten(1), tensors[3]], dim=1).float()
    )
    assert torch.equal(found["side_memory"], found[encoder[-1]])
    assert (found["decoder_input"] == 0).all()
    normed = model.transformer.decoder.norm(found["transformer.decoder.layers.2"])
    assert torch.equal(found["transformer.decoder.norm"], normed)
    assert torch.equal(found["features"], normed)


@trunks
def test_what_a_seat_gives_goes_on(make):
    model = make()
    tensors = examples(model, 2)
    with torch.no_grad():
        wanted = model(*tensors)
    mask, first = (
        ("mask", "joint") if isinstance(model, ClipVil) else ("encoder_mask", "encoder_input")
    )
    for path in (mask, first, "features", *({"decoder_input"} & set(dict(model.named_children())))):
        changed = model.get_submodule(path).register_forward_hook(
            lambda _, __, value, path=path: (
                torch.ones_like(value) if "mask" in path else value + 0.5
            )
        )
        with torch.no_grad():
            assert not torch.allclose(model(*tensors), wanted), path
        changed.remove()
    if isinstance(model, Mdetr):
        model.side_memory.register_forward_hook(lambda _, __, value: value + 0.5)
        with torch.no_grad():
            assert torch.equal(model(*tensors), wanted)


@trunks
def test_padding_does_not_matter(make, error):
    """Neither what stands in it, nor how much of it there is."""
    model = make().double()
    drawn = examples(model, 4, torch.float64)
    names = [given.name for given in model.inputs]
    noise = torch.Generator().manual_seed(2)
    tensors = dict(zip(names, drawn, strict=True))
    other = dict(tensors)
    if isinstance(model, ClipVil):
        padded = tensors["attention_mask"] == 0
        assert padded.any()
        other["input_ids"] = torch.where(padded, 3, tensors["input_ids"])
        longer = make(length=11, visual_tokens=6).double()
    else:
        picture, text = tensors["feature_mask"] == 0, tensors["text_mask"] == 0
        assert picture.any()
        assert text.any()
        junk = torch.randn(tensors["features"].shape, generator=noise, dtype=torch.float64)
        other["features"] = torch.where(picture[:, None], 9 * junk, tensors["features"])
        if "text_hidden" in other:
            junk = torch.randn(tensors["text_hidden"].shape, generator=noise, dtype=torch.float64)
            other["text_hidden"] = torch.where(text[..., None], 9 * junk, tensors["text_hidden"])
        else:
            other["input_ids"] = torch.where(text, 1, tensors["input_ids"])
        longer = make(text_length=9, map_size=[6, 7]).double()
    longer.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = model(*drawn)
        assert error(model(*other.values()), wanted) < 1e-13
        room = [grown(t, g.shape) for t, g in zip(other.values(), longer.inputs, strict=True)]
        assert error(longer(*room), wanted) < 1e-13


def grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor with zeros behind it on every axis but the first."""
    wide = tensor.new_zeros(len(tensor), *shape)
    wide[tuple(slice(length) for length in tensor.shape)] = tensor
    return wide


@trunks
def test_rows_do_not_see_each_other(make, error):
    model = make().double()
    tensors = examples(model, 3, torch.float64)
    with torch.no_grad():
        alone = torch.cat([model(*(t[row : row + 1] for t in tensors)) for row in range(3)])
        assert error(model(*tensors), alone) < 1e-13


def test_a_row_of_nothing_but_padding_is_still_a_number():
    model = filled(Mdetr(**SMALL_MDETR))
    features, picture, hidden, text = examples(model, 2)
    picture[0], text[0] = 0, 0
    with torch.no_grad():
        assert model(features, picture, hidden, text).isfinite().all()


@pytest.mark.parametrize("kind", ["long", "bool", "float"])
@trunks
def test_masks_of_any_dtype(make, kind):
    model = make()
    tensors = examples(model, 2)
    masks = [given.values == "mask" for given in model.inputs]
    other = [
        getattr(t, kind)() if is_mask else t for t, is_mask in zip(tensors, masks, strict=True)
    ]
    with torch.no_grad():
        assert torch.equal(model(*other), model(*tensors))


@pytest.mark.filterwarnings("ignore")  # of the exporter
@trunks
def test_onnx(make, error):
    model = make()
    attentions = 3 if isinstance(model, ClipVil) else 3 + 2 * 3 + (model.text == "ids")
    graph = traced(model)
    ran = [run_onnx(graph, model, error)]
    rewrite(graph)
    ran.append(run_onnx(clean(graph), model, error))
    assert ran == [attentions, attentions]


@pytest.mark.filterwarnings("ignore")  # of the exporter
@trunks
def test_onnx_with_hooks_at_the_seats(make, error):
    """As a side network: it reads the mask and every state, and gives the features."""
    model = make()
    mask = "mask" if isinstance(model, ClipVil) else "encoder_mask"
    states = [*model.hidden_states[:-1], *([] if isinstance(model, ClipVil) else ["side_memory"])]
    taken: dict[str, Tensor] = {}
    for path in (mask, *states):
        model.get_submodule(path).register_forward_hook(
            lambda _, __, value, path=path: taken.update({path: value})
        )

    def features(_: nn.Module, __: object, value: Tensor) -> Tensor:
        weight = taken[mask][..., None] / taken[mask].sum(dim=1)[:, None, None]
        return value + torch.stack([(taken[path] * weight).sum(1) for path in states], 1).sum(
            1, keepdim=True
        )

    plain = examples(model, 2)
    with torch.no_grad():
        frozen = model(*plain)
        model.features.register_forward_hook(features)
        assert not torch.allclose(model(*plain), frozen)
    run_onnx(traced(model), model, error)


def traced(model: Trunk) -> ir.Model:
    """The graph of a model, its inputs named, with a free batch axis."""
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    names = [given.name for given in model.inputs]
    shapes = tuple({0: batch} for _ in names)
    program = torch.onnx.export(
        model,
        examples(model, 2),
        dynamo=True,
        opset_version=OPSET,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=(shapes,) if isinstance(model, ClipVil) else shapes,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    assert isinstance(program.model, ir.Model)
    return clean(program.model)


def run_onnx(graph: ir.Model, model: Trunk, error: Callable[[Tensor, Tensor], float]) -> int:
    """Hold a graph to its model at several batch sizes; how many attentions it has."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        serialise(graph, {}), options, providers=["CPUExecutionProvider"]
    )
    for batch in (1, 2, 5):
        tensors = examples(model, batch)
        feed = {g.name: t.numpy() for g, t in zip(model.inputs, tensors, strict=True)}
        with torch.no_grad():
            answer = np.asarray(session.run(None, feed)[0])
            assert error(torch.from_numpy(answer), model(*tensors)) < TOLERANCE[torch.float32]
    return sum(node.op_type == "Attention" for node in graph.graph)


REFUSED: list[tuple[type[nn.Module], Mapping[str, object], str]] = [
    (ClipVil, {"l_layers": 0}, "l_layers"),
    (ClipVil, {"num_attention_heads": 5}, "num_attention_heads"),
    (ClipVil, {"length": 25}, "length"),
    (ClipVil, {"visual_tokens": True}, "visual_tokens"),
    (ClipVil, {"visual": "pixels"}, "visual"),
    (ClipVil, {"visual": "map", "map_size": [26, 2]}, "map_size"),
    (ClipVil, {"visual": "map", "map_size": 6}, "map_size"),
    (Mdetr, {"d_model": 14, "nhead": 2}, "d_model"),
    (Mdetr, {"nhead": 5}, "nhead"),
    (Mdetr, {"nhead": 0}, "nhead"),
    (Mdetr, {"map_size": [4]}, "map_size"),
    (Mdetr, {"map_size": 4}, "map_size"),
    (Mdetr, {"map_size": [4, 0]}, "map_size, second"),
    (Mdetr, {"text": "words"}, "words"),
    (Mdetr, {"text": "ids", "text_length": 15}, "text_length"),
    (Mdetr, {"num_queries": 2.5}, "num_queries"),
    (Mdetr, {"normalize_before": True}, "normalize_before"),
    (Mdetr, {"pass_pos_and_query": False}, "pass_pos_and_query"),
]


@pytest.mark.parametrize(("kind", "arguments", "named"), REFUSED)
def test_arguments_that_are_refused(kind, arguments, named):
    small = SMALL_CLIP_VIL if kind is ClipVil else SMALL_MDETR
    with pytest.raises(UsageError, match=named):
        kind(**{**small, **arguments})


@trunks
def test_shapes_that_are_refused(make):
    model = make()
    tensors = examples(model, 2)
    for place, given in enumerate(model.inputs):
        for wrong in (tensors[place][..., 1:], tensors[place][0], tensors[place][None]):
            changed = [wrong if n == place else t for n, t in enumerate(tensors)]
            with pytest.raises(UsageError, match=given.name):
                model(*changed)


def test_positions_are_the_formula():
    height, width, channels = 4, 5, 12
    mask = torch.zeros(1, height, width, dtype=torch.int64)
    rows, columns = 3, 4
    mask[0, :rows, :columns] = 1
    wanted = torch.zeros(height, width, channels, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            # Padding behind the picture keeps the last place; a line of padding alone has place 0.
            places = (
                min(y + 1, rows) / (rows + 1e-6) if x < columns else 0.0,
                min(x + 1, columns) / (columns + 1e-6) if y < rows else 0.0,
            )
            for side, place in enumerate(places):
                for i in range(channels // 4):
                    angle = 2 * math.pi * place / 10000 ** (2 * i / (channels // 2))
                    at = side * channels // 2 + 2 * i
                    wanted[y, x, at], wanted[y, x, at + 1] = math.sin(angle), math.cos(angle)
    found = sine_positions(mask, channels)
    assert found.dtype == torch.float32
    assert torch.allclose(found[0].double(), wanted.flatten(0, 1), rtol=0, atol=1e-6)


def test_attention_is_torch_s(error):
    torch.manual_seed(0)
    own, theirs = MultiHead(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(theirs.in_proj_bias)
    own.load_state_dict(theirs.state_dict())  # strict
    query, key, value = (torch.randn(2, n, 12, dtype=torch.float64) for n in (4, 6, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0]]).double()
    with torch.no_grad():
        wanted, _ = theirs(query, key, value, key_padding_mask=mask == 0)
        assert error(own(query, key, value, hold_back(mask)), wanted) < 1e-14


def test_a_bert_layer_is_transformers_s(error):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.bert.modeling_bert")
    config = transformers.BertConfig(
        hidden_size=12, num_attention_heads=3, intermediate_size=20, attn_implementation="eager"
    )
    torch.manual_seed(0)
    theirs = modeling.BertLayer(config).double().eval()
    own = BertLayer(12, 3, 20, 1e-12).double()
    own.load_state_dict(theirs.state_dict())  # strict
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    bias = torch.tensor([[0, 0, 0, 0, 0], [0, 0, -10000, -10000, 0]]).double()[:, None, None]
    with torch.no_grad():
        wanted = theirs(x, attention_mask=bias)
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
        assert error(own(x, bias), wanted) < 1e-14


def test_the_text_encoder_is_transformers_s(error):
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    theirs = transformers.RobertaModel(config).double().eval()
    model = Mdetr(**{**SMALL_MDETR, "text": "ids", "text_layers": 2, "text_types": 1}).double()
    own = model.transformer.text_encoder
    own.load_state_dict(theirs.state_dict())  # strict
    ids = torch.tensor([[0, 5, 7, 3, 2, 1], [0, 4, 2, 1, 1, 1], [0, 9, 8, 7, 6, 2]])
    mask = (ids != 1).long()
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask).last_hidden_state
        assert error(own(ids, mask) * mask[..., None], wanted * mask[..., None]) < 1e-13


def test_the_defaults_are_the_published_sizes():
    with torch.device("meta"):
        vil, mdetr = ClipVil(), Mdetr()
    assert [given.shape for given in vil.inputs] == [(20,), (20,), (240, 2560)]
    assert vil.state_dict()["logit_fc.weight"].shape == (3129, 768)
    assert len(vil.hidden_states) == 13
    assert [given.shape for given in mdetr.inputs] == [(2048, 25, 42), (25, 42), (40, 768), (40,)]
    assert mdetr.state_dict()["class_embed.weight"].shape == (256, 256)
    assert len(mdetr.hidden_states) == len(mdetr.decoder_hidden_states) == 7
