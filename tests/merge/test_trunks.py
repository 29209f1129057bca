"""Frozen trunks of other libraries: transformers' own runs, their seats, their files, and ONNX Runtime."""

from __future__ import annotations

import copy
import json
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from utune_deploy.export.graph import OPSET, clean, serialise
from utune_deploy.merge.architectures.bert import Bert
from utune_deploy.merge.architectures.caffe_resnet import CaffeResNet
from utune_deploy.merge.architectures.clip import ClipImage, ClipText, from_openai
from utune_deploy.merge.architectures.huggingface import architecture_of, read_folder
from utune_deploy.merge.architectures.states import States
from utune_deploy.merge.architectures.t5 import T5
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FLOAT64, FLOAT32 = 1e-12, 2e-5  # largest difference over largest value
LAYERS = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}
WORDS = {"vocab_size": 40, "max_position_embeddings": 16}
T5_SIZES = {
    "vocab_size": 40,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
}
SMALL: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "bert": (Bert, {"length": 7, **WORDS, **LAYERS}),
    "roberta": (Bert, {"family": "roberta", "length": 7, **WORDS, **LAYERS}),
    "clip_image": (ClipImage, {"image_size": 12, "patch_size": 4, "projection_dim": 10, **LAYERS}),
    "clip_text": (ClipText, {"length": 9, "projection_dim": 10, **WORDS, **LAYERS}),
    "t5": (T5, {"length": 9, "answer_length": 4, **T5_SIZES}),
    "t5_v1_1": (
        T5,
        {
            **T5_SIZES,
            "length": 9,
            "answer_length": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "scale_decoder_outputs": False,
        },
    ),
    "tokens": (States, {"shapes": [[6, 5], [6, 8]], "mask": True, "end": True}),
    "maps": (States, {"shapes": [[1, 8, 8], [3, 4, 4]], "anchor": 5}),
}
every = pytest.mark.parametrize("name", SMALL)
trunks = pytest.mark.parametrize("name", [n for n in SMALL if n not in ("tokens", "maps")])


def filled(model: nn.Module, seed: int = 0) -> Any:
    """Random values everywhere, norms about one, in eval mode."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 and "embed" not in name else 0.5
            one = "norm" in name.lower() and name.endswith("weight")
            p.copy_(one + scale * torch.randn(p.shape, generator=noise))
    return frozen(model)


def frozen(model: nn.Module) -> Any:
    return model.eval().requires_grad_(requires_grad=False)


def small(name: str, **arguments: Any) -> Any:
    make, given = SMALL[name]
    return filled(make(**{**given, **arguments}))


def rows(model: Any, batch: int = 3, seed: int = 1) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [own.draw(batch, noise) for own in model.inputs]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


@contextmanager
def watched(model: nn.Module, *paths: str) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """By path, what a module was called with and what it gave."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> None:
            assert path not in seen, "a seat is called once"
            seen[path] = args[0], value  # branches join the first argument by position

        return hook

    handles = [model.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    yield seen
    for handle in handles:
        handle.remove()


# transformers' own runs


@dataclass
class Published:
    """transformers' model, in float64 and eval mode.

    Attributes:
        model: Random values everywhere.
        kind: What `read_folder` calls it.
        lengths: Arguments that a folder does not say.
    """

    model: Any
    kind: str
    lengths: dict[str, int]

    def save(self, folder: Path, **options: Any) -> None:
        copy.deepcopy(self.model).float().save_pretrained(folder, **options)

    @torch.no_grad()
    def run(self, *tensors: Tensor) -> tuple[list[tuple[Tensor, ...]], Tensor]:
        """Hidden states, for T5 of encoder and decoder, and the pooled output or the logits."""
        model, asked = self.model, {"output_hidden_states": True}
        if self.kind == "bert":
            ids, mask = tensors
            trunk = getattr(model, model.base_model_prefix, model)
            found = trunk(ids, attention_mask=mask, **asked)
            mean = [x[m == 1].mean(0) for x, m in zip(found.last_hidden_state, mask, strict=True)]
            return [found.hidden_states], torch.stack(mean)
        if self.kind == "clip_image":
            found = model.vision_model(tensors[0], **asked)
            return [found.hidden_states], model.visual_projection(found.pooler_output)
        if self.kind == "clip_text":
            found = model.text_model(tensors[0], **asked)
            return [found.hidden_states], model.text_projection(found.pooler_output)
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        found = model(**dict(zip(names, tensors, strict=True)), use_cache=False, **asked)
        return [found.encoder_hidden_states, found.decoder_hidden_states], found.logits


def published(name: str) -> Published:
    if name in ("bert", "roberta"):
        sizes = {**WORDS, **LAYERS}
        model = {
            "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes)),
            "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes)),
        }[name]()
        return Published(filled(model).double(), "bert", {"length": 7})
    if name.startswith("clip"):
        tower = {**LAYERS, "projection_dim": 10}
        config = transformers.CLIPConfig(
            text_config={**tower, **WORDS, "eos_token_id": 39, "bos_token_id": 38},
            vision_config={**tower, "image_size": 12, "patch_size": 4, "num_attention_heads": 2},
            projection_dim=10,
        )
        lengths = {} if name == "clip_image" else {"length": 9}
        return Published(filled(transformers.CLIPModel(config)).double(), name, lengths)
    old = name == "t5"
    activation = "relu" if old else "gated-gelu"
    config = transformers.T5Config(
        **T5_SIZES, feed_forward_proj=activation, tie_word_embeddings=old
    )
    model = transformers.T5ForConditionalGeneration(config)
    if not old:
        model.lm_head.weight = nn.Parameter(torch.zeros(40, 12))  # transformers ties it
    return Published(filled(model).double(), "t5", {"length": 9, "answer_length": 4})


def read(source: Published, folder: Path, **arguments: Any) -> Any:
    """Our model of a folder, in float64."""
    given, tensors = read_folder(folder, source.kind)
    make = {"bert": Bert, "clip_image": ClipImage, "clip_text": ClipText, "t5": T5}[source.kind]
    given = json.loads(json.dumps({**given, **source.lengths, **arguments}))
    model = make(**given)
    model.load_state_dict(tensors, strict=not arguments.get("num_classes"))
    return frozen(model).double()


def asked(model: Any, batch: int = 3) -> list[Tensor]:
    """Rows in float64; a text of CLIP has one end."""
    tensors = doubled(rows(model, batch))
    if isinstance(model, ClipText):
        tensors[0] = tensors[0].clamp(max=38)
        tensors[0][range(batch), torch.arange(batch) + 3] = 39
    return tensors


@trunks
def test_a_folder_answers_as_in_transformers(name, tmp_path, error):
    source = published(name)
    source.save(tmp_path)
    source.model = source.model.float().double()  # what the file holds
    model = read(source, tmp_path)
    tensors = asked(model)
    wanted, output = source.run(*tensors)
    sets = [model.hidden_states] + ([model.decoder_hidden_states] if source.kind == "t5" else [])
    with watched(model, *(path for paths in sets for path in paths)) as seen, torch.no_grad():
        found = model(*tensors)
    assert error(found, output) < FLOAT64
    for paths, states in zip(sets, wanted, strict=True):
        assert len(paths) == len(states)
        for path, state in zip(paths, states, strict=True):
            assert error(seen[path][1], state) < FLOAT64, path


@trunks
def test_a_folder_in_shards_is_the_same(name, tmp_path):
    source = published(name)
    source.save(tmp_path / "one")
    source.save(tmp_path / "many", max_shard_size="4KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    (arguments, tensors), (given, found) = (
        read_folder(tmp_path / n, source.kind) for n in ("one", "many")
    )
    assert arguments == given
    assert set(tensors) == set(found)
    assert all(torch.equal(tensors[n], found[n]) for n in tensors)


def test_a_folder_says_what_it_holds(tmp_path):
    kinds = {"bert": "bert", "roberta": "bert", "clip_text": "clip", "t5": "t5"}
    for name, kind in kinds.items():
        published(name).model.config.save_pretrained(tmp_path / name)
        assert architecture_of(tmp_path / name) == kind
    for tower in ("vision", "text"):
        config = published("clip_text").model.config
        getattr(config, f"{tower}_config").save_pretrained(tmp_path / tower)
    assert architecture_of(tmp_path / "vision") == "clip_image"
    assert architecture_of(tmp_path / "text") == "clip_text"
    assert architecture_of(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert architecture_of(tmp_path) is None


def test_one_tower_of_clip_alone(tmp_path, error):
    both = published("clip_image")
    config = both.model.config.vision_config
    alone = filled(transformers.CLIPVisionModelWithProjection(config), seed=2)
    alone.save_pretrained(tmp_path)
    both.model = alone.double()
    model = read(both, tmp_path)
    images = asked(model)
    assert error(model(*images), both.run(*images)[1]) < FLOAT64


def test_old_files_of_bert(tmp_path):
    """Google's first files name norms otherwise, and hold the numbers of positions."""
    source = published("bert")
    source.save(tmp_path)
    _, wanted = read_folder(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in tensors.items()
    }
    old |= {"bert.embeddings.position_ids": torch.arange(16)[None]}
    old |= {"bert.pooler.dense.weight": torch.zeros(12, 12)}
    save_file(old, path)
    _, found = read_folder(tmp_path, "bert")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    bare = {n.removeprefix("bert."): t for n, t in old.items() if n.startswith("bert.")}
    save_file(bare, path)
    assert set(read_folder(tmp_path, "bert")[1]) == set(wanted)


def test_old_files_of_t5(tmp_path):
    """They hold the table of words under all of its names, or under another one."""
    source = published("t5")
    source.save(tmp_path)
    path = tmp_path / "model.safetensors"
    arguments, wanted = read_folder(tmp_path, "t5")
    assert arguments["tie_word_embeddings"]
    assert "lm_head.weight" not in wanted
    table = wanted["shared.weight"]
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    stale = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file({**wanted, **{n: table.clone() for n in names}, stale: torch.zeros(8, 3)}, path)
    assert set(read_folder(tmp_path, "t5")[1]) == set(wanted)
    other = {n: t for n, t in wanted.items() if n != "shared.weight"}
    save_file({**other, names[1]: table}, path)
    assert torch.equal(read_folder(tmp_path, "t5")[1]["shared.weight"], table)
    save_file({**wanted, names[0]: table + 1}, path)
    with pytest.raises(IncompatibleArtefact, match="do not share one table of words"):
        read_folder(tmp_path, "t5")


def test_a_folder_keeps_its_dtype(tmp_path):
    source = published("bert")
    copy.deepcopy(source.model).half().save_pretrained(tmp_path)
    _, tensors = read_folder(tmp_path, "bert")
    assert {t.dtype for t in tensors.values()} == {torch.float16}


# timm's own run


def test_caffe_s_resnet_is_timm_s_with_its_strides_moved(error):
    theirs = timm.create_model("resnet50", layers=(1, 2, 1, 1), num_classes=3)
    model = CaffeResNet(image_size=45, num_classes=3, layers=(1, 2, 1, 1))
    noise = torch.Generator().manual_seed(0)
    tensors = {
        n: t if t.dim() == 0 else t + 0.1 * torch.rand(t.shape, generator=noise)
        for n, t in theirs.state_dict().items()
    }
    theirs.load_state_dict(tensors)
    model.load_state_dict(tensors)  # strict
    images = torch.randn(2, 3, 45, 45, generator=noise).double()
    frozen(theirs).double()
    frozen(model).double()
    with watched(model, *model.hidden_states) as seen:
        answered = model(images)
    assert error(answered, theirs(images)) > 1e-3  # the same file, and other answers
    theirs.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    for number in (2, 3, 4):
        block = theirs.get_submodule(f"layer{number}.0")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    with watched(theirs, *model.hidden_states) as wanted:
        assert error(answered, theirs(images)) < FLOAT64
    for path in model.hidden_states:
        assert error(seen[path][1], wanted[path][1]) < FLOAT64


def test_arguments_of_caffe_s_resnet_that_are_refused():
    for arguments, sentence in (
        ({"layers": [1, 1, 1]}, "not those of four stages"),
        ({"layers": [1, 1, 1, 0]}, r"layers\[3\] is not a whole number"),
        ({"stem_width": 0}, "stem_width is not a whole number"),
        ({"num_classes": -1}, "num_classes is not a number from 0"),
    ):
        with pytest.raises(UsageError, match=sentence):
            CaffeResNet(**{"stem_width": 4, "layers": [1, 1, 1, 1], **arguments})
    model = CaffeResNet(image_size=40, stem_width=4)
    with pytest.raises(UsageError, match="does not have the shape"):
        model(torch.zeros(1, 3, 41, 40))


# Seats


@every
def test_it_is_a_backbone(name):
    bare, model = small(name), small(name, num_classes=6)
    assert isinstance(bare.head, nn.Identity)
    assert model.pretrained_cfg["classifier"] == "head"
    added = set(model.state_dict()) - set(bare.state_dict())
    assert added == {"head.weight", "head.bias"}
    with watched(model, "head") as seen:
        logits = model(*rows(model))
    assert logits.shape == ((3, 4, 6) if name.startswith("t5") else (3, 6))
    assert seen["head"][0].shape[-1] == model.num_features
    assert all(model.get_submodule(path) is not None for path in model.hidden_states)


@every
def test_it_can_be_saved(name, tmp_path):
    model = small(name)
    tensors = model.state_dict()
    assert not any(n.endswith(("_ids", "causal", "buckets", "unit")) for n in tensors)
    save_file(
        tensors or {"none": torch.zeros(1)}, tmp_path / "w.safetensors"
    )  # refuses shared ones
    prefixes = {
        "bert": {"bert"},
        "roberta": {"bert"},
        "clip_image": {"vision_model", "visual_projection"},
        "clip_text": {"text_model", "text_projection"},
        "t5": {"shared", "encoder", "decoder"},
        "t5_v1_1": {"shared", "encoder", "decoder", "lm_head"},
    }
    assert {n.partition(".")[0] for n in tensors} == prefixes.get(name, set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_seats_of_bert(dtype, error):
    model = small("bert").to(dtype)
    ids, mask = rows(model)
    paths = ("mask", "features", "pooled", model.hidden_states[-1])
    with watched(model, *paths) as seen:
        found = model(ids, mask)
    assert torch.equal(seen["mask"][0], mask.to(dtype))
    assert seen["mask"][0].dtype == dtype
    assert torch.equal(seen["features"][0], seen[model.hidden_states[-1]][1])
    wanted = [x[m == 1].mean(0) for x, m in zip(seen["features"][1], mask, strict=True)]
    assert error(seen["pooled"][0], torch.stack(wanted)) < (
        1e-6 if dtype == torch.float32 else 1e-14
    )
    assert torch.equal(found, seen["pooled"][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_seats_of_clip(dtype):
    model = small("clip_image").to(dtype)
    images = rows(model)[0].to(dtype)
    with watched(model, "mask", "features", "pooled", model.hidden_states[-1]) as seen:
        found = model(images)
    assert torch.equal(seen["mask"][0], torch.ones(3, 10, dtype=dtype))
    assert torch.equal(seen["features"][0], seen[model.hidden_states[-1]][1])
    assert torch.equal(found, seen["pooled"][0])

    model = small("clip_text").to(dtype)
    ids = torch.tensor([[5, 39, 7, 39, 0, 0, 0, 0, 0], [38, 1, 2, 3, 4, 5, 6, 0, 7]])
    with watched(model, "mask", "end", "features", "pooled") as seen:
        found = model(ids)
    assert torch.equal(seen["mask"][0], (ids != 0).to(dtype))
    assert torch.equal(seen["end"][0], torch.eye(9, dtype=dtype)[[1, 0]])
    last = model.text_projection(seen["features"][1][[0, 1], [1, 0]])
    assert torch.equal(seen["pooled"][0], last)
    assert torch.equal(found, last)


def test_seats_of_t5(error):
    model = small("t5").double()
    tensors = rows(model)
    paths = ("memory_mask", "side_memory", "features", *model.decoder_hidden_states)
    paths += model.hidden_states
    with watched(model, *paths) as seen:
        found = model(*tensors)
    assert torch.equal(seen["memory_mask"][0], tensors[1].double())
    assert torch.equal(seen["side_memory"][0], seen["encoder.final_layer_norm"][1])
    assert torch.equal(seen["features"][0], seen["decoder.final_layer_norm"][1])
    words = model.shared.weight
    assert error(found, seen["features"][1] * 12**-0.5 @ words.T) < FLOAT64
    assert torch.equal(seen["decoder.embed_tokens"][0], words[tensors[2]])
    handle = model.side_memory.register_forward_hook(lambda *_: torch.zeros(()))
    assert torch.equal(model(*tensors), found)  # the decoder reads what the encoder gave
    handle.remove()


def test_seats_of_states(error):
    model = small("tokens", num_classes=4)
    first, last, mask, end = rows(model)
    assert [own.name for own in model.inputs] == ["hidden.0", "hidden.1", "mask", "end"]
    with watched(model, "states.0", "states.1", "mask", "end", "features", "pooled") as seen:
        model(first, last, mask, end)
    assert torch.equal(seen["states.0"][0], first)
    assert torch.equal(seen["features"][0], last)
    assert torch.equal(seen["mask"][0], mask.float())
    assert torch.equal(seen["end"][0], torch.eye(6)[end[:, 0]])
    wanted = [x[m == 1].mean(0) for x, m in zip(last, mask, strict=True)]
    assert error(seen["pooled"][0], torch.stack(wanted)) < 1e-6
    model.double()
    with watched(model, "mask", "end") as seen:
        model(*doubled([first, last, mask, end]))
    assert {seen["mask"][0].dtype, seen["end"][0].dtype} == {torch.float64}

    model = small("maps")
    first, last, vector = rows(model)
    with watched(model, "features", "pooled", "embedding") as seen:
        assert torch.equal(model(first, last, vector), vector)
    assert torch.equal(seen["features"][0], last)
    assert torch.equal(seen["embedding"][0], vector)
    model = States([[1, 8, 8], [3, 4, 4]], names=["low", "high"])
    assert [own.name for own in model.inputs] == ["low", "high"]
    assert torch.equal(model(first, last), last.mean((2, 3)))
    model = States([[6, 5]])
    tokens = torch.randn(2, 6, 5)
    assert torch.equal(model(tokens), tokens.mean(1))


@every
def test_what_a_seat_gives_goes_on(name):
    """A hook that stands in the place of the trunk's value is what the head reads."""
    model = small(name, num_classes=3)
    tensors = rows(model)
    answers = "features" if name.startswith("t5") else "pooled"
    seat = model.get_submodule(answers)
    handle = seat.register_forward_hook(lambda _, args, value: torch.ones_like(value))
    wanted = model.head(torch.ones(model.num_features)).expand(model(*tensors).shape)
    assert torch.allclose(model(*tensors), wanted, atol=1e-6)
    handle.remove()


# Padding


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "t5_v1_1"])
def test_padding_is_not_read(name, error):
    model = small(name).double()
    ids, mask, *rest = rows(model)
    other = torch.where(mask == 1, ids, (ids + 11) % 40)
    assert not torch.equal(ids, other)
    seats = ("features",) if name in ("bert", "roberta") else ("side_memory", "features")
    with watched(model, *seats) as seen:
        wanted = model(ids, mask, *rest)
    with watched(model, *seats) as again:
        assert torch.equal(model(other, mask, *rest), wanted)
    assert torch.equal(seen[seats[0]][0][mask == 1], again[seats[0]][0][mask == 1])
    shorter = small(name, length=5).double()
    few = mask[:, :5].clone()
    assert (
        error(shorter(ids[:, :5], few, *rest), model(ids, F.pad(few, (0, len(ids[0]) - 5)), *rest))
        < 1e-14
    )


def test_what_follows_is_not_read():
    """Causal towers: the end of a text and the answer so far do not see what is behind them."""
    text = small("clip_text").double()
    ids = torch.randint(1, 39, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 4] = 39
    other = ids.clone()
    other[:, 5:] = 0
    assert torch.equal(text(ids), text(other))
    model = small("t5").double()
    question, mask, answer = rows(model)
    other = answer.clone()
    other[:, 2:] = 3
    found, wanted = (model(question, mask, a)[:, :2] for a in (answer, other))
    assert torch.equal(found, wanted)


# ONNX


@every
def test_onnx_answers_alike(name, error):
    model = small(name, **({"num_classes": 3} if name in ("tokens", "maps", "bert") else {}))
    names = [own.name for own in model.inputs]
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    shapes = tuple({0: batch} for _ in names)
    graph = clean(_exported(model, names, (shapes,) if isinstance(model, States) else shapes).model)
    kinds = [node.op_type for node in graph.graph]
    blocks = {"bert": 2, "roberta": 2, "clip_image": 2, "clip_text": 2, "t5": 7, "t5_v1_1": 7}
    assert kinds.count("Attention") == blocks.get(name, 0)  # one node each, nothing beside it
    assert "Softmax" not in kinds
    assert kinds.count("Where") <= 2  # masks are made once, not once per block
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        serialise(graph, {}), options, providers=["CPUExecutionProvider"]
    )
    for size in (1, 5):
        tensors = rows(model, size, seed=size)
        feeds = dict(zip(names, (t.numpy() for t in tensors), strict=True))
        read = {value.name: feeds[value.name] for value in graph.graph.inputs}
        found = np.asarray(session.run(["logits"], read)[0])
        assert error(torch.from_numpy(found), model(*tensors)) < FLOAT32


def _exported(model: Any, names: list[str], shapes: Any) -> Any:
    """As `export.graph.trace` does it, with several inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            model,
            tuple(rows(model, 2)),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=shapes,
            optimize=False,
            verbose=False,
        )


# OpenAI's names


def openai(noise: torch.Generator, depth: int = 2) -> dict[str, Tensor]:
    """A random CLIP with OpenAI's names: pictures 12 / 4, width 12; 16 tokens, width 8; embeddings 10."""

    def draw(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        return scale * torch.randn(shape, generator=noise)

    found = {
        "visual.class_embedding": draw(12),
        "visual.positional_embedding": draw(10, 12),
        "visual.conv1.weight": draw(12, 3, 4, 4),
        "visual.proj": draw(12, 10),
        "token_embedding.weight": draw(40, 8),
        "positional_embedding": draw(16, 8),
        "text_projection": draw(8, 10),
        "logit_scale": torch.ones(()),
        "input_resolution": torch.tensor(12),
    }
    norms = [("visual.ln_pre", 12), ("visual.ln_post", 12), ("ln_final", 8)]
    for tower, width in (("visual.", 12), ("", 8)):
        for number in range(depth):
            path = f"{tower}transformer.resblocks.{number}"
            norms += [(f"{path}.ln_1", width), (f"{path}.ln_2", width)]
            found |= {
                f"{path}.attn.in_proj_weight": draw(3 * width, width),
                f"{path}.attn.in_proj_bias": draw(3 * width),
                f"{path}.attn.out_proj.weight": draw(width, width),
                f"{path}.attn.out_proj.bias": draw(width),
                f"{path}.mlp.c_fc.weight": draw(4 * width, width),
                f"{path}.mlp.c_fc.bias": draw(4 * width),
                f"{path}.mlp.c_proj.weight": draw(width, 4 * width),
                f"{path}.mlp.c_proj.bias": draw(width),
            }
    for path, width in norms:
        found |= {f"{path}.weight": 1 + draw(width), f"{path}.bias": draw(width)}
    return found


class Release:
    """OpenAI's model.py in a few lines, on tensors by its names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.t = {n: t.double() for n, t in tensors.items()}

    def norm(self, path: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.t[f"{path}.weight"], self.t[f"{path}.bias"])

    def block(self, path: str, x: Tensor, mask: Tensor | None) -> Tensor:
        attention = nn.MultiheadAttention(x.shape[-1], 2, batch_first=True).double()
        attention.load_state_dict({n: self.t[f"{path}.attn.{n}"] for n in attention.state_dict()})
        y = self.norm(f"{path}.ln_1", x)
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        hidden = F.linear(
            self.norm(f"{path}.ln_2", x),
            self.t[f"{path}.mlp.c_fc.weight"],
            self.t[f"{path}.mlp.c_fc.bias"],
        )
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        return x + F.linear(
            hidden, self.t[f"{path}.mlp.c_proj.weight"], self.t[f"{path}.mlp.c_proj.bias"]
        )

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        x = F.conv2d(images, self.t["visual.conv1.weight"], stride=4).flatten(2).mT
        first = self.t["visual.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.t["visual.positional_embedding"]
        x = self.norm("visual.ln_pre", x)
        for number in range(2):
            x = self.block(f"visual.transformer.resblocks.{number}", x, None)
        return self.norm("visual.ln_post", x[:, 0]) @ self.t["visual.proj"]

    @torch.no_grad()
    def encode_text(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.t["token_embedding.weight"][ids] + self.t["positional_embedding"][:length]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        for number in range(2):
            x = self.block(f"transformer.resblocks.{number}", x, mask)
        x = self.norm("ln_final", x)
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.t["text_projection"]


@pytest.mark.parametrize("prefix", ["", "clip.", "module.clip."])
def test_openai_names(prefix, error):
    tensors = openai(torch.Generator().manual_seed(0))
    tensors = {n: t.half() if t.dim() > 1 else t for n, t in tensors.items()}  # as in its files
    release = Release(tensors)
    given = {f"{prefix}{n}": t for n, t in tensors.items()} | {"sim.weight": torch.zeros(3)}
    arguments, found = from_openai(given, "clip_image", heads=2)
    assert json.loads(json.dumps(arguments))["image_size"] == 12
    image = ClipImage(**arguments)
    image.load_state_dict(found)
    images = asked(frozen(image).double())[0]
    assert error(image(images), release.encode_image(images)) < FLOAT64
    arguments, found = from_openai(given, "clip_text", heads=2)
    text = ClipText(**{**arguments, "length": 9})
    text.load_state_dict(found)
    ids = rows(frozen(text).double(), 6)[0]
    assert error(text(ids), release.encode_text(ids)) < FLOAT64
    save_file(found, "/dev/null")  # no tensor is a view of another


def test_other_files_are_not_openai_names():
    tensors = openai(torch.Generator().manual_seed(0))
    for broken, sentence in (
        ({}, "not one CLIP"),
        ({n: t for n, t in tensors.items() if "ln_2.bias" not in n}, "lacks the tensors"),
        ({**tensors, "visual.conv2.weight": torch.zeros(1)}, "has more than the tensors"),
        ({"a.visual.conv1.weight": torch.zeros(1), **tensors}, "not one CLIP"),
        (
            {"visual.conv1.weight": torch.zeros(1), "visual.layer1.0.conv1.weight": torch.zeros(1)},
            "lacks the tensors",
        ),
    ):
        with pytest.raises(IncompatibleArtefact, match=sentence):
            from_openai(broken, "clip_image", heads=2)
    with pytest.raises(UsageError, match="no such tower"):
        from_openai(tensors, "clip")


# What is refused


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("bert", {"family": "albert"}, "no such family"),
        ("bert", {"hidden_size": 13}, "divided among the attention heads"),
        ("bert", {"length": 17}, "table of positions is shorter"),
        ("roberta", {"length": 15}, "table of positions is shorter"),
        ("bert", {"hidden_act": "cosh"}, "no such activation"),
        ("bert", {"vocab_size": 0}, "vocab_size is not a whole number"),
        ("bert", {"num_hidden_layers": True}, "num_hidden_layers is not a whole number"),
        ("bert", {"pad_token_id": 40}, "no word of the table"),
        ("bert", {"num_classes": -1}, "num_classes is not a number from 0"),
        ("clip_image", {"patch_size": 13}, "larger than the picture"),
        ("clip_image", {"projection_dim": 1.5}, "projection_dim is not a whole number"),
        ("clip_text", {"length": 17}, "table of positions is shorter"),
        ("clip_text", {"hidden_act": "gated-gelu"}, "no such activation"),
        ("t5", {"feed_forward_proj": "gated-cosh"}, "no such activation"),
        ("t5", {"answer_length": 0}, "answer_length is not a whole number"),
        ("t5", {"relative_attention_num_buckets": 2}, "cannot be divided"),
        ("tokens", {"shapes": []}, "not those of hidden states"),
        ("tokens", {"shapes": [[6]]}, "not those of hidden states"),
        ("tokens", {"shapes": [[6, 5], [7, 5]]}, "one number of tokens"),
        ("tokens", {"shapes": [[6, 5], [3, 4, 4]]}, "one number of tokens"),
        ("tokens", {"names": ["a", "a"]}, "a name of its own"),
        ("tokens", {"names": ["mask", "a"]}, "a name of its own"),
        ("maps", {"anchor": 0}, "anchor is not a whole number"),
    ],
)
def test_arguments_that_are_refused(name, arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        small(name, **arguments)


@every
def test_rows_of_another_shape_are_refused(name):
    model = small(name)
    tensors = rows(model)
    with pytest.raises(UsageError, match="does not have the shape"):
        model(*(t[:, :1] if t.dim() > 1 else t for t in tensors))
    if isinstance(model, States):
        with pytest.raises(UsageError, match="another number of inputs"):
            model(tensors[0])


def test_folders_that_are_refused(tmp_path):
    source = published("bert")
    with pytest.raises(UsageError, match="no such trunk"):
        read_folder(tmp_path, "gpt2")
    with pytest.raises(UsageError, match="holds no model"):
        read_folder(tmp_path, "bert")
    source.save(tmp_path)
    with pytest.raises(IncompatibleArtefact, match="another kind of model"):
        read_folder(tmp_path, "t5")
    weights = tmp_path / "model.safetensors"
    save_file({"transformer.wte.weight": torch.zeros(2)}, weights)
    with pytest.raises(IncompatibleArtefact, match="holds no tensors of bert"):
        read_folder(tmp_path, "bert")
    weights.write_bytes(b"\0" * 7)
    with pytest.raises(IncompatibleArtefact, match="damaged"):
        read_folder(tmp_path, "bert")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"bert.x": "gone.safetensors"}}))
    with pytest.raises(IncompatibleArtefact, match="a shard of them is missing"):
        read_folder(tmp_path, "bert")
    index.unlink()
    weights.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UsageError, match="no weights as safetensors"):
        read_folder(tmp_path, "bert")


@pytest.mark.parametrize(
    ("name", "said", "sentence"),
    [
        ("bert", {"is_decoder": True}, "not written here"),
        ("bert", {"position_embedding_type": "relative_key"}, "not written here"),
        ("bert", {"hidden_size": "wide"}, "transformers refuses"),
        ("bert", {"model_type": None}, "another kind of model"),
        ("clip_text", {"text_config": {"vocab_size": 40, "eos_token_id": 7}}, "largest id"),
        ("clip_image", {"vision_config": {"num_channels": 1}}, "not written here"),
    ],
)
def test_configurations_that_are_refused(name, said, sentence, tmp_path):
    source = published(name)
    source.save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read_folder(tmp_path, source.kind)
    path.write_text("{")
    with pytest.raises(IncompatibleArtefact, match="cannot be read"):
        read_folder(tmp_path, source.kind)
