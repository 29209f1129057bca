"""The law `y = OP(x) + U(x)`, for every tuner type of the table at every kind of place.

A new tuner type is tested by being listed in `TUNERS`; its settings and places are listed in `POINTS` here,
and what becomes of them in each family of backbones in `OUTCOMES`.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from utune_deploy.merge.attach import restore
from utune_deploy.merge.bank import stack
from utune_deploy.merge.delta import Delta, load_delta, save_delta
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.fold import fold, refusals
from utune_deploy.merge.lower import lower
from utune_deploy.merge.methods import head_branch
from utune_deploy.merge.mixed import Mixed, Single
from utune_deploy.merge.parallel import joined
from utune_deploy.merge.preprocessing import Preprocessing
from utune_deploy.merge.tuner import Branch, Point, Tuner, bind
from utune_deploy.merge.tuners import TUNERS
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import ACTIVATIONS, Bottleneck
from utune_deploy.merge.tuners.bypass import Bypass
from utune_deploy.merge.tuners.class_and_mean import ClassAndMean
from utune_deploy.merge.tuners.difference import Difference
from utune_deploy.merge.tuners.embedding import Embedding
from utune_deploy.merge.tuners.gain import Gain
from utune_deploy.merge.tuners.gpo import Gpo
from utune_deploy.merge.tuners.head import Head
from utune_deploy.merge.tuners.kronecker import Kronecker
from utune_deploy.merge.tuners.ladder import Ladder
from utune_deploy.merge.tuners.norm import Norm
from utune_deploy.merge.tuners.perceptron import Perceptron
from utune_deploy.merge.tuners.prefix import Prefix
from utune_deploy.merge.tuners.prompt import Prompt
from utune_deploy.merge.tuners.rotation import Rotation
from utune_deploy.merge.tuners.side_network import SideNetwork
from utune_deploy.merge.tuners.unipt import UniPT
from utune_deploy.merge.tuners.unipt_pyramid import UniPTPyramid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from utune_deploy.merge.backbone import Backbone


class Op(NamedTuple):
    """The op that a branch is added to, the channels that it reads and gives, and the values that it taps."""

    module: nn.Module
    given: int
    taken: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def taps(self) -> int:
        return len(self.shapes)


class Row(NamedTuple):
    """A tuner at a place.

    Attributes:
        tuner: The settings, or what makes them of the op.
        tap: Points that it reads, apart by spaces; names in braces are those of `MODULES`.
        add: Where it joins.
    """

    tuner: Tuner | Callable[[Op], Tuner]
    tap: str
    add: str


SEQUENCE = {
    "block": ("blocks.0", "blocks.2"),
    "first": "blocks.0",
    "last": "blocks.2",
    "linear": "attn.qkv",
    "attention": "attn",
    "ffn": "mlp",
    "norm": "norm1",
    "patches": "patch_embed.proj",
    "ladder": "blocks.0:input blocks.0:output blocks.1:output blocks.2:output",
    "top": "norm:input",
    "pooled": "blocks.2:output",
    "root": "",
    "head": "head",
}
WINDOWS = {
    "block": ("layers.0.blocks.1", "layers.1.blocks.0"),  # one with shifted windows
    "first": "layers.0.blocks.0",
    "last": "layers.0.blocks.1",
    "linear": "attn.qkv",
    "attention": "attn",
    "ffn": "mlp",
    "norm": "norm1",
    "patches": "patch_embed.proj",
    "ladder": "layers.0.blocks.0:input layers.0.blocks.0:output layers.0.blocks.1:output",
    "top": "layers.1.downsample:input",
    "pooled": "norm:input",
    "stages": "patch_embed:output layers.0:output layers.1:output",
    "head": "head.fc",
}
MODULES: dict[str, dict[str, Any]] = {
    "vit": SEQUENCE,
    "dinov3": SEQUENCE,
    "eva": SEQUENCE,
    "beit": SEQUENCE,
    "deit": SEQUENCE,
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "convnext": {
        "block": ("stages.0.blocks.0", "stages.3.blocks.1"),
        "first": "stages.3.blocks.0",
        "last": "stages.3.blocks.1",
        "linear": "mlp.fc1",
        "ffn": "mlp",
        "norm": "norm",
        "patches": "stem.0",
        "ladder": "stages.3.blocks.0:input stages.3.blocks.0:output stages.3.blocks.1:output",
        "top": "head.norm:input",
        "pooled": "stages.3.blocks.1.mlp.fc2:output",
        "stages": "stages.0:output stages.1:output stages.2:output stages.3:output",
        "head": "head.fc",
    },
    "resnet": {
        "block": ("layer1.0", "layer4.1"),
        "first": "layer4.0",
        "last": "layer4.1",
        "linear": "conv2",  # a convolution: the nearest that there is
        "norm": "bn2",
        "patches": "conv1",
        "ladder": "layer4.1:input layer4.1:output",
        "top": "global_pool:input",
        "pooled": "global_pool:input",
        "stages": "layer1:output layer2:output layer4:output",
        "buffer": "bn1",
        "head": "fc",
    },
}
"""Where the places of `POINTS` are; a family has no place that is missing here."""

BESIDE = ("{block}.{linear}:input", "{block}.{linear}:output")
BEHIND = ("{block}.{linear}:output", "{block}.{linear}:output")
BEFORE = ("{block}.{linear}:input", "{block}.{linear}:input")
PLAIN = Bottleneck("identity", bias=True)


def side(norm: str, gives: str, **settings: Any) -> Callable[[Op], Tuner]:
    """A UniPT whose last tap is the anchor."""

    def side(op: Op) -> Tuner:
        widths = tuple(shape[-1] for shape in op.shapes)
        fields = {"norm": norm, "gives": gives, **settings}
        return UniPT(widths[:-1], widths[-1], 6, op.taken, **fields)

    return side


def pyramid(norm: str, *, images: bool = False) -> Callable[[Op], Tuner]:
    """The same on maps, the anchor's the smallest."""

    def pyramid(op: Op) -> Tuner:
        *maps, anchor = op.shapes
        last = anchor[1] == anchor[2] and not images  # [1, H, W, C], not [1, C, H, W]
        rows, channels = (1, 3) if last else (2, 1)
        return UniPTPyramid(
            widths=tuple(shape[channels] for shape in maps),
            anchor=anchor[channels],
            width=6,
            out=op.taken,
            norm=norm,
            gives="mean",
            cells=tuple(shape[rows] // anchor[rows] for shape in maps),
            channels_last=last,
        )

    return pyramid


def ladder(gives: str) -> Callable[[Op], Tuner]:
    return lambda op: Ladder(
        tuple(shape[-1] for shape in op.shapes), 6, 2, 9, op.taken, gives=gives
    )


def difference(parameter: str) -> Callable[[Op], Tuner]:
    return lambda op: Difference(parameter, tuple(getattr(op.module, parameter).shape))


POINTS: dict[str, dict[str, Row]] = {
    "bottleneck": {
        "lora": Row(Bottleneck("identity", bias=False), *BESIDE),
        "beside linear": Row(PLAIN, *BESIDE),
        "behind linear": Row(PLAIN, *BEHIND),
        "before linear": Row(PLAIN, *BEFORE),
        "beside attention": Row(
            Bottleneck("gelu", bias=True), "{block}.{attention}:input", "{block}.{attention}:output"
        ),
        "behind ffn": Row(
            Bottleneck("relu", bias=True), "{block}.{ffn}:output", "{block}.{ffn}:output"
        ),
        "beside ffn": Row(
            Bottleneck("silu", bias=False), "{block}.{ffn}:input", "{block}.{ffn}:output"
        ),
        "from attention to ffn": Row(
            Bottleneck("tanh", bias=True), "{block}.{attention}:input", "{block}.{ffn}:output"
        ),
        "behind block": Row(Bottleneck("tanh", bias=True), "{block}:output", "{block}:output"),
        "patches": Row(PLAIN, "{patches}:patches", "{patches}:output"),
        "patches, no bias": Row(
            Bottleneck("identity", bias=False), "{patches}:patches", "{patches}:output"
        ),
        "behind linear, no bias": Row(Bottleneck("identity", bias=False), *BEHIND),
        "norm in": Row(
            Bottleneck("gelu", bias=True, norm="in"), "{block}.{ffn}:input", "{block}.{ffn}:output"
        ),
        "norm out": Row(
            Bottleneck("identity", bias=False, norm="out", eps=1e-6),
            "{block}.{linear}:input",
            "{block}.{linear}:output",
        ),
    },
    "kronecker": {
        "beside linear": Row(Kronecker(2, 4), *BESIDE),
        "behind linear": Row(Kronecker(4, 2), *BEHIND),
    },
    "rotation": {
        "before linear": Row(lambda op: Rotation(op.given // 4, 4), *BEFORE),
        "before linear, level 1": Row(lambda op: Rotation(op.given // 4, 4, 1), *BEFORE),
        "behind linear": Row(lambda op: Rotation(op.given // 8, 8), *BEHIND),
    },
    "gain": {
        "behind linear": Row(Gain(shift=True), *BEHIND),
        "behind linear, no shift": Row(Gain(shift=False), *BEHIND),
        "before linear": Row(Gain(shift=True), *BEFORE),
        "before linear, no shift": Row(Gain(shift=False), *BEFORE),
        "behind norm": Row(Gain(shift=True), "{block}.{norm}:output", "{block}.{norm}:output"),
        "beside norm": Row(Gain(shift=True), "{block}.{norm}:input", "{block}.{norm}:output"),
        "behind patches": Row(Gain(shift=False), "{patches}:output", "{patches}:output"),
    },
    "bias": {
        "behind linear": Row(Bias(), *BEHIND),
        "before linear": Row(Bias(), *BEFORE),
        "behind patches": Row(Bias(), "{patches}:output", "{patches}:output"),
        "before block": Row(Bias(), "{block}:input", "{block}:input"),
    },
    "norm": {
        "beside norm": Row(
            lambda op: Norm(op.module.eps), "{block}.{norm}:input", "{block}.{norm}:output"
        ),
        "beside norm, another eps": Row(Norm(0.1), "{block}.{norm}:input", "{block}.{norm}:output"),
    },
    "prefix": {
        "joint": Row(Prefix(joint_softmax=True), *["{block}.{attention}:keys"] * 2),
        "apart": Row(Prefix(joint_softmax=False), *["{block}.{attention}:keys"] * 2),
    },
    "prompt": {
        "deep": Row(Prompt(), "{block}:tokens", "{block}:tokens"),
        "deep, apart": Row(Prompt(joint_softmax=False), "{block}:tokens", "{block}:tokens"),
        "shallow": Row(Prompt(), "{first}:tokens", "{last}:tokens"),
        "shallow, apart": Row(Prompt(joint_softmax=False), "{first}:tokens", "{last}:tokens"),
        "at attention": Row(Prompt(), *["{block}.{attention}:tokens"] * 2),
    },
    "side_network": {"image": Row(SideNetwork("fcn4"), "{patches}:input", "{head}:input")},
    "bypass": {
        "ladder": Row(lambda op: Bypass(op.taps - 1, "gelu"), "{ladder}", "{top}"),
        "into its last stem": Row(
            lambda op: Bypass(op.taps - 1, "gelu"), "{ladder}", "{last}:output"
        ),
    },
    "unipt": {
        "layer norms": Row(side("layer", "first"), "{ladder}", "{head}:input"),
        "batch norms": Row(
            side("batch", "mean", project="mlp", inner=5), "{ladder}", "{head}:input"
        ),
        "one vector": Row(
            side(
                "none",
                "tokens",
                relu_first=True,
                vector=True,
                own="first",
                guard="clamp",
                eps=1e-6,
                project="none",
                up="linear",
                onto="anchor",
            ),
            "{ladder} {head}:input",
            "{head}:input",
        ),
        "tokens": Row(side("none", "tokens", own="none"), "{ladder}", "{last}:output"),
    },
    "unipt_pyramid": {
        "stages": Row(pyramid("batch"), "{stages}", "{head}:input"),
        "images": Row(
            pyramid("layer", images=True),
            "{patches}:input {patches}:input {patches}:output",
            "{head}:input",
        ),
    },
    "ladder": {
        "mean": Row(ladder("mean"), "{ladder}", "{head}:input"),
        "first": Row(ladder("first"), "{ladder}", "{head}:input"),
    },
    "gpo": {
        "pooled": Row(
            lambda op: Gpo(math.prod(op.shapes[0][1:-1]), 6, 4), "{pooled}", "{head}:input"
        ),
    },
    "difference": {
        "weight": Row(difference("weight"), *["{block}.{linear}:weights"] * 2),
        "bias": Row(difference("bias"), *["{block}.{norm}:weights"] * 2),
        "token": Row(difference("cls_token"), *["{root}:weights"] * 2),
        "buffer": Row(difference("running_mean"), *["{block}.{buffer}:weights"] * 2),
    },
    "head": {"classifier": Row(Head(), "{head}:input", "{head}:output")},
    "class_and_mean": {
        "tokens": Row(ClassAndMean(), "{head}:input {pooled}", "{head}:output"),
    },
    "perceptron": {
        "one hidden": Row(Perceptron((7,)), "{head}:input", "{head}:output"),
        "norms": Row(Perceptron((7, 6), "gelu", 1e-12), "{head}:input", "{head}:output"),
    },
    "embedding": {
        "as it is": Row(lambda op: Embedding(op.given), "{head}:input", "{head}:output"),
        "unit": Row(lambda op: Embedding(op.given, unit=True), "{head}:input", "{head}:output"),
    },
}

FULL = ("vit", "swin")
"""Families on which every property is tried; the others run a shorter chain."""

OUTCOMES = """
                                   | vit      dinov3   eva      beit     deit     swin     swinv2   convnext resnet
bottleneck: lora                   | F        F        F        F        F        F        F        F        +
bottleneck: beside linear          | F        +        +        +        F        F        +        F        +
bottleneck: behind linear          | F        +        +        +        F        F        +        F        +
bottleneck: before linear          | F        +        +        +        F        F        +        F        +
bottleneck: beside attention       | +        +        +        +        +        +        +        -        -
bottleneck: behind ffn             | +        +        +        +        +        +        +        +        -
bottleneck: beside ffn             | +        +        +        +        +        +        +        +        -
bottleneck: from attention to ffn  | +        +        +        +        +        o        o        -        -
bottleneck: behind block           | +        +        +        +        +        +        +        u        u
bottleneck: patches                | F        F        F        F        F        F        F        F        +
bottleneck: patches, no bias       | F        F        F        F        F        F        F        F        F
bottleneck: behind linear, no bias | F        F        +        +        F        F        +        F        +
bottleneck: norm in                | +        +        +        +        +        +        +        +        -
bottleneck: norm out               | +        +        +        +        +        +        +        +        +
kronecker: beside linear           | F        F        F        F        F        F        F        F        +
kronecker: behind linear           | +        +        +        +        +        +        +        +        +
rotation: before linear            | F        F        F        F        F        F        F        F        +
rotation: before linear, level 1   | F        F        F        F        F        F        F        F        +
rotation: behind linear            | +        +        +        +        +        +        +        +        +
gain: behind linear                | F        +        +        +        F        F        +        F        +
gain: behind linear, no shift      | F        F        +        +        F        F        +        F        F
gain: before linear                | F        +        +        +        F        F        +        F        +
gain: before linear, no shift      | F        F        F        F        F        F        F        F        F
gain: behind norm                  | F        F        F        F        F        F        F        F        F
gain: beside norm                  | +        +        +        +        +        +        +        +        F
gain: behind patches               | F        F        F        F        F        F        F        F        F
bias: behind linear                | F        +        +        +        F        F        +        F        +
bias: before linear                | F        +        +        +        F        F        +        F        +
bias: behind patches               | F        F        F        F        F        F        F        F        +
bias: before block                 | +        +        +        +        +        +        +        u        u
norm: beside norm                  | F        F        F        F        F        F        F        F        +
norm: beside norm, another eps     | +        +        +        +        +        +        +        +        +
prefix: joint                      | +        +        +        +        +        +        k        -        -
prefix: apart                      | +        +        +        +        +        +        k        -        -
prompt: deep                       | +        r        r        r        +        s        s        u        u
prompt: deep, apart                | +        r        r        r        +        s        s        u        u
prompt: shallow                    | +        r        r        r        +        s        s        u        u
prompt: shallow, apart             | +        r        r        r        +        s        s        u        u
prompt: at attention               | +        r        r        r        +        r        r        -        -
side_network: image                | +        +        +        +        +        +        +        +        +
bypass: ladder                     | +        +        +        +        +        +        +        u        u
bypass: into its last stem         | +        +        +        +        +        +        +        u        u
unipt: layer norms                 | +        +        +        +        +        +        +        u        u
unipt: batch norms                 | +        +        +        +        +        +        +        u        u
unipt: one vector                  | +        +        +        +        +        +        +        u        u
unipt: tokens                      | +        +        +        +        +        +        +        u        u
unipt_pyramid: stages              | -        -        -        -        -        +        +        +        +
unipt_pyramid: images              | +        +        +        +        +        +        +        +        +
ladder: mean                       | +        +        +        +        +        +        +        u        u
ladder: first                      | +        +        +        +        +        +        +        u        u
gpo: pooled                        | +        +        +        +        +        +        +        +        u
difference: weight                 | F        F        F        F        F        F        F        F        F
difference: bias                   | F        F        F        F        F        F        F        F        F
difference: token                  | F        F        F        F        F        -        -        -        -
difference: buffer                 | -        -        -        -        -        -        -        -        F
head: classifier                   | F        F        F        F        F        F        F        F        F
class_and_mean: tokens             | +        +        +        +        +        +        +        +        u
perceptron: one hidden             | +        +        +        +        +        +        +        +        +
perceptron: norms                  | +        +        +        +        +        +        +        +        +
embedding: as it is                | +        +        +        +        +        +        +        +        +
embedding: unit                    | +        +        +        +        +        +        +        +        +
"""
"""`F` folds, `+` stays parallel, `-` no such place, and a small letter is refused with a sentence."""

SENTENCES = {
    "k": "no scaled dot product attention runs inside this module",
    "o": "another order of tokens",
    "r": "the backbone does not run with these branches",
    "s": "tokens can join a sequence",
    "u": "not clear which axis",
}


class Case(NamedTuple):
    """One row of `POINTS` in one family."""

    kind: str
    row: Row
    family: str
    outcome: str


def settings_of(kind: str, listed: dict[str, dict[str, Row]]) -> dict[str, Row]:
    if not listed.get(kind):
        pytest.fail(
            f"the tuner kind {kind!r} is in TUNERS and has no settings to be tested with: "
            "add a table of its points to POINTS in tests/merge/test_law.py"
        )
    return listed[kind]


def outcomes() -> dict[tuple[str, str], str]:
    """`OUTCOMES` by row and family."""
    lines = [line.partition("|") for line in OUTCOMES.strip("\n").splitlines()]
    families = lines[0][2].split()
    assert set(families) == set(MODULES)
    return {
        (name.strip(), family): code
        for name, _, codes in lines[1:]
        for family, code in zip(families, codes.split(), strict=True)
    }


def all_cases() -> list[Any]:
    listed, cases = outcomes(), []
    for kind in TUNERS:
        for name, row in POINTS.get(kind, {}).items():
            for family in MODULES:
                outcome = listed.get((f"{kind}: {name}", family), "?")
                case = Case(kind, row, family, outcome)
                cases.append(pytest.param(case, id=f"{kind}-{name}-{family}"))
    for activation in ACTIVATIONS:
        row = Row(Bottleneck(activation, bias=True), *["{block}.{ffn}:output"] * 2)
        case = Case("bottleneck", row, "vit", "+")
        cases.append(pytest.param(case, id=f"{activation}-vit"))
    return cases


def chosen(accept: Callable[[Case], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [c for c in all_cases() if accept(c.values[0])])


def works(case: Case) -> bool:
    return case.outcome in "F+"


def mixes(case: Case) -> bool:
    return not TUNERS[case.kind].no_bank


def fully(case: Case) -> bool:
    return works(case) and case.family in FULL


full = chosen(fully)
full_and_broad = chosen(lambda case: fully(case) and TUNERS[case.kind].broadcasts)
full_and_mixed = chosen(lambda case: fully(case) and mixes(case))
vit_only = chosen(lambda case: fully(case) and case.family == "vit")


@pytest.fixture
def backbone(case: Case, host) -> Backbone:
    return host(case.family)


def plant(case: Case, backbone: Backbone, sites) -> dict[str, tuple[Branch, dict[str, int]]]:
    """Branches and the sizes of their channels by name; none where the family has no such place."""
    modules = MODULES[case.family]
    blocks = modules["block"] if "{block}" in case.row.add else ("",)
    branches = {}
    for block in blocks:
        try:
            names = {**modules, "block": block}
            taps = [Point.parse(t) for t in case.row.tap.format(**names).split()]
            add = Point.parse(case.row.add.format(**names))
        except KeyError:
            return {}

        def channels(point: Point) -> int:
            passed = Point(point.module, "input") if point.side == "tokens" else point
            return sites.channels.get(passed, 8)

        module = backbone.model.get_submodule(add.module)
        shapes = tuple(sites.shapes.get(tap, ()) for tap in taps)
        op = Op(module, channels(taps[0]), channels(add), shapes)
        tuner = case.row.tuner if isinstance(case.row.tuner, Tuner) else case.row.tuner(op)
        sizes = {"in": op.given, "out": op.taken}
        branches[f"{add.module or 'root'}/{case.kind}"] = (
            Branch(tuner, taps[0], add, tuple(taps[1:])),
            sizes,
        )
    return branches


@pytest.fixture
def make(case: Case, backbone: Backbone, sites_of, random_weights):
    """A delta with the case's branches, and a head for each classifier."""

    def make(*, rank: int = 3, classes: int = 5, task: str = "a", seed: int = 0) -> Delta:
        sites = sites_of(backbone)
        planted = plant(case, backbone, sites)
        assert planted, "the family has no such place"
        answer: Tuner = Head()
        beside: tuple[Point, ...] = ()
        if TUNERS[case.kind].answers:
            ((branch, _),) = planted.values()
            answer, beside, planted = branch.tuner, branch.others, {}
        for classifier in backbone.classifiers:
            name, branch = head_branch(classifier)
            channels = sites.require(branch.tap)
            branch = replace(branch, tuner=answer, others=beside)
            planted[name] = branch, {"in": channels, "out": classes}
        dtype = next(backbone.model.parameters()).dtype
        tensors = {}
        for number, (name, (branch, sizes)) in enumerate(planted.items()):
            sizes["r"] = classes if branch.tuner.join == "replace" else rank
            tensors[name] = random_weights(branch.tuner, sizes, 100 * seed + number, dtype)
        return Delta(
            task,
            () if isinstance(answer, Embedding) else tuple(f"{task}{i}" for i in range(classes)),
            Preprocessing(backbone.image_size),
            backbone.identity,
            {name: branch for name, (branch, _) in planted.items()},
            tensors,
        )

    return make


def without(delta: Delta, task: str) -> Delta:
    """The task with nothing but its heads."""
    return replace(
        delta,
        task=task,
        branches={name: delta.branches[name] for name in delta.heads},
        tensors={name: delta.tensors[name] for name in delta.heads},
    )


def width(delta: Delta) -> int:
    """How many numbers the task answers with."""
    tuner = delta.branches[delta.head].tuner
    return tuner.answer_width(bind(tuner.shapes, delta.tensors[delta.head], where="head"))


def forward(backbone: Backbone, weighted, images: Tensor, rows: int | None = None) -> Tensor:
    with torch.no_grad(), joined(backbone.model, weighted, rows=rows):
        return backbone.model(images)


def merged(backbone: Backbone, delta: Delta, sites) -> nn.Module:
    """The checkpoint in a model without any branch."""
    tensors = fold(delta, backbone, sites=sites).tensors
    plain = copy.deepcopy(backbone.model)
    plain.reset_classifier(len(delta.labels))
    plain.load_state_dict(tensors, strict=True, assign=True)
    return plain.eval()


def inert(tuner: Tuner, tensor: str) -> bool:
    """A layer norm behind a scale takes it out again; see `test_inert_values`."""
    return isinstance(tuner, Bottleneck) and tuner.norm == "out" and tensor == "scale"


def require_refusal(backbone: Backbone, delta: Delta, kind: str, sites) -> None:
    refused = refusals(delta, backbone)
    assert [r.branch for r in refused] == [
        name for name, branch in delta.branches.items() if branch.tuner.kind == kind
    ]
    assert all(r.reason and r.alternative for r in refused)
    with pytest.raises(UsageError, match="nothing was merged") as caught:
        fold(delta, backbone, sites=sites)
    assert refused[0].reason in str(caught.value)


@pytest.mark.parametrize("kind", TUNERS)
def test_every_kind_of_the_table_has_settings(kind):
    for row in settings_of(kind, POINTS).values():
        if isinstance(row.tuner, Tuner):
            assert type(row.tuner) is TUNERS[kind]
    assert TUNERS[kind].kind == kind
    assert TUNERS[kind].source
    assert set(POINTS) <= set(TUNERS), "POINTS names a kind that is not in the table"


def test_a_kind_without_settings_fails_and_says_where_to_add_them():
    with pytest.raises(pytest.fail.Exception, match=r"'side'.*POINTS in tests/merge/test_law.py"):
        settings_of("side", POINTS)


def test_every_row_has_an_outcome_in_every_family():
    rows = {f"{kind}: {name}" for kind, listed in POINTS.items() for name in listed}
    assert {(row, family) for row in rows for family in MODULES} == set(outcomes())
    codes = set(outcomes().values()) - set("F+-")
    assert codes == set(SENTENCES), "a sentence for every letter, and a letter for every sentence"
    for kind in POINTS:
        assert any(works(c.values[0]) for c in all_cases() if c.values[0].kind == kind)


@chosen(lambda case: not works(case))
def test_what_does_not_work_is_refused_with_a_sentence(case, backbone, make, run, sites_of):
    if case.outcome == "-":
        assert plant(case, backbone, sites_of(backbone)) == {}
        return
    with pytest.raises((IncompatibleArtefact, UsageError)) as caught:
        run(backbone, make(), backbone.example(2))
    assert SENTENCES[case.outcome] in str(caught.value)
    assert caught.value.what
    assert "where" in caught.value.details
    assert set(caught.value.details) & {"wanted", "found"}


@chosen(lambda case: works(case) and not fully(case))
def test_the_law_in_other_families(case, backbone, make, run, sites_of, error):
    """Alone, in a mixed batch and as a single engine the same, alive, and folded or refused."""
    sites = sites_of(backbone)
    small = make(rank=2, classes=3, task="small", seed=1)
    large = make(rank=4, classes=6, task="large", seed=2)
    images = backbone.example(4)
    alone = run(backbone, small, images)
    with torch.no_grad():
        single = Single(backbone, stack([lower(backbone, small, sites)]))(images)
    assert error(single, alone) < 1e-12
    if mixes(case):
        tasks = [small, large, without(large, "none")]
        bank = stack([lower(backbone, d, sites) for d in tasks])
        order = [0, 1, 2, 0]
        with torch.no_grad():
            together = Mixed(backbone, bank)(images, torch.tensor(order))
        wanted = [alone, run(backbone, large, images), run(backbone, tasks[2], images)]
        for row, number in enumerate(order):
            logits = wanted[number][row : row + 1]
            assert error(together[row : row + 1, : logits.shape[1]], logits) < 1e-12
    for name, named in small.tensors.items():
        for key, tensor in named.items():
            if inert(small.branches[name].tuner, key):
                continue
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))
            changed = {**small.tensors, name: {**named, key: tensor + 0.1 * noise}}
            after = run(backbone, replace(small, tensors=changed), images[:1])
            assert (after - alone[:1]).abs().max() > 1e-6, f"{name}/{key} does nothing"
    if case.outcome == "F":
        with torch.no_grad():
            assert error(merged(backbone, small, sites)(images), alone) < 1e-11
    else:
        require_refusal(backbone, small, case.kind, sites)


FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_their_formulas(activation):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert activation in FORMULAS, "add the formula of the activation to FORMULAS"
    wanted = torch.tensor([FORMULAS[activation](float(v)) for v in x], dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[activation](x), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_bottleneck_is_its_formula(activation, bias, random_weights):
    """`scale * (up act(down x + down_bias) + up_bias)`, number by number."""
    tuner = Bottleneck(activation, bias=bias)
    w = random_weights(tuner, {"in": 4, "out": 3, "r": 2}, 1, torch.float64)
    x = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    act = FORMULAS[tuner.activation]
    hidden = [
        act(float(w["down"][j] @ x[0, 0]) + (float(w["down_bias"][j]) if tuner.bias else 0.0))
        for j in range(2)
    ]
    for i, found in enumerate(tuner.branch(x, w)[0, 0].tolist()):
        y = sum(float(w["up"][i, j]) * hidden[j] for j in range(2))
        y += float(w["up_bias"][i]) if tuner.bias else 0.0
        assert found == pytest.approx(float(w["scale"]) * y, rel=1e-13)


@vit_only
def test_settings_survive_json(case, make):
    for branch in make().branches.values():
        tuner = branch.tuner
        values = json.loads(json.dumps(tuner.settings()))
        assert type(tuner).from_settings(values, where="here") == tuner
        assert hash(tuner) == hash(type(tuner).from_settings(values, where="here"))


@vit_only
def test_settings_with_defaults_are_written_only_where_they_differ(case, make):
    for branch in make().branches.values():
        tuner = branch.tuner
        plain = {f.name: f.default for f in fields(tuner) if f.default is not MISSING}
        for name, value in tuner.settings().items():
            assert name not in plain or value != plain[name]
        bare = {f.name for f in fields(tuner) if f.default is MISSING}
        assert bare <= set(tuner.settings())


@vit_only
def test_initial_weights_have_the_declared_shapes(case, make):
    """They are the backbone, where that is how the method starts."""
    for branch in make().branches.values():
        tuner = branch.tuner
        sizes = {"in": 48, "out": 48 if case.kind == "gain" else 144, "r": 4}
        first, again = (tuner.init(sizes, torch.Generator().manual_seed(3)) for _ in range(2))
        assert set(first) == set(tuner.shapes)
        found = bind(tuner.shapes, first, where="init")
        assert all(found[axis] == sizes[axis] for axis in found if axis in sizes)
        for name, tensor in first.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, again[name])
        assert set(tuner.fill) <= set(tuner.served)


@full_and_mixed
def test_a_batch_axis_on_the_weights_is_a_run_per_row(case, backbone, make, error):
    """Stored and served weights may both carry `[B, ...]`."""
    deltas = [make(seed=seed) for seed in range(3)]
    images = backbone.example(3)
    alone = torch.cat(
        [forward(backbone, d.weighted(), images[i : i + 1]) for i, d in enumerate(deltas)]
    )
    for served in (False, True):
        weighted = []
        for name, branch in deltas[0].branches.items():
            settle = branch.tuner.settle if served else dict
            of_tasks = [settle(d.tensors[name]) for d in deltas]
            stacked = {key: torch.stack([w[key] for w in of_tasks]) for key in of_tasks[0]}
            weighted.append((branch, stacked))
        together = forward(backbone, weighted, images, rows=3)
        assert error(together, alone) < 1e-12


@full_and_broad
def test_a_task_axis_beside_the_examples_is_every_pair(case, backbone, make, sites_of, error):
    """`branch(x[:, None], w [T, ...])` is `[B, T, ...]`: every example for every task, one by one."""
    deltas = [make(seed=seed) for seed in range(3)]
    sites = sites_of(backbone)
    noise = torch.Generator().manual_seed(5)

    def drawn(tuner: Tuner, point: Point) -> Tensor:
        if tuner.reads_map:
            shape = (2, *sites.shapes[point][1:])
        elif len(sites.shapes.get(point, (1, 1, 1))) == 2:
            shape = (2, 1, sites.channels[point])
        else:
            shape = (2, getattr(tuner, "tokens", 5), sites.channels[point])
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    seen = 0
    for name, branch in deltas[0].branches.items():
        tuner = branch.tuner
        if tuner.kind != case.kind:
            continue
        seen += 1
        x = tuple(drawn(tuner, point) for point in branch.taps)
        for served in (False, True):
            of_tasks = [(tuner.settle if served else dict)(d.tensors[name]) for d in deltas]
            stacked = {key: torch.stack([w[key] for w in of_tasks]) for key in of_tasks[0]}
            broad = [value[:, None] for value in x]
            found = tuner.branch(tuple(broad) if branch.others else broad[0], stacked)
            alone = [tuner.branch(x if branch.others else x[0], w) for w in of_tasks]
            wanted = torch.stack(alone, dim=1)  # [B, T, ...]
            assert found.shape[0] == 2
            assert found.shape[1] in (1, 3)
            assert error(found.expand_as(wanted), wanted) < 1e-12
    assert seen


@full
def test_neutral_weights_are_the_frozen_op(case, backbone, make, error):
    """What a bank holds for a task without the branch: exactly the untuned backbone.

    Attention with a mask may run in another order of summation, so keys and tokens are exact to
    rounding. A difference is in no bank: of zeros it is the backbone.
    """
    delta = make(classes=6)
    images = backbone.example(2)
    rows = 2 if mixes(case) else None
    neutral = []
    for name, branch in delta.branches.items():
        tuner = branch.tuner
        if tuner.answers and case.kind != "head":
            continue  # another answer stands there
        sizes = bind(tuner.shapes, delta.tensors[name], where=name)
        weights = {
            key: torch.full(
                [*([rows] if rows else []), *(a if isinstance(a, int) else sizes[a] for a in axes)],
                tuner.fill.get(key, 0.0),
                dtype=torch.float64,
            )
            for key, axes in tuner.served.items()
        }
        neutral.append((branch, weights))
    found = forward(backbone, neutral, images, rows=rows)
    frozen = forward(backbone, [], images)
    if case.kind == "head":  # a class that a task does not have
        assert found.shape == (2, 6)
        assert (found == Head.fill["bias"]).all()
    elif TUNERS[case.kind].join in ("extend", "tokens"):
        assert error(found, frozen) < 1e-14
    else:
        assert torch.equal(found, frozen)


@full
def test_fold_is_the_branch_or_is_refused_with_a_reason(
    case, backbone, make, host, moved, run, sites_of, error
):
    delta = make()
    if case.outcome != "F":
        require_refusal(backbone, delta, case.kind, sites_of(backbone))
        return
    assert refusals(delta, backbone) == []
    for double, tolerance in ((True, 1e-11), (False, 1e-5)):
        own = host(case.family, double=double)
        task = moved(delta, own)
        images = own.example(2)
        with torch.no_grad():
            found = merged(own, task, sites_of(own))(images)
        assert error(found, run(own, task, images)) < tolerance


@full
def test_padded_is_the_same_as_alone(case, backbone, make, run, sites_of, error):
    """In one bank with a larger rank and a task that has no such branch."""
    small = make(rank=2, classes=3, task="small", seed=1)
    large = make(rank=6, classes=9, task="large", seed=2)
    tasks = [small, large, without(large, "none")]
    images = backbone.example(5)
    with torch.no_grad():
        single = Single(backbone, stack([lower(backbone, small, sites_of(backbone))]))(images)
    assert error(single, run(backbone, small, images)) < 1e-12
    if not mixes(case):
        with pytest.raises(UsageError, match="cannot share a batch") as caught:
            stack([lower(backbone, d, sites_of(backbone)) for d in tasks])
        assert TUNERS[case.kind].no_bank in caught.value.details["found"]
        return
    order = [0, 1, 2, 0, 1]
    bank = stack([lower(backbone, d, sites_of(backbone)) for d in tasks])
    with torch.no_grad():
        mixed = Mixed(backbone, bank)(images, torch.tensor(order))
    assert mixed.shape == (5, max(width(task) for task in tasks))
    for row, number in enumerate(order):
        task = tasks[number]
        alone = run(backbone, task, images[row : row + 1])
        assert error(mixed[row : row + 1, : width(task)], alone) < 1e-12
        assert (mixed[row, width(task) :] == Head.fill["bias"]).all()


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 3, 4, 0, 2)])
def test_tasks_that_answer_by_unlike_heads_share_a_batch(
    order, vit64, random_delta, random_weights, run, sites_of, error
):
    """Classes, layers of unlike sizes, two taps, and a vector; none answers for another, nor with its classes."""
    probe = random_delta(vit64, classes=3, task="probe")
    at = probe.branches[probe.head]
    tasks = [probe]
    for name, tuner, classes in (
        ("layers", Perceptron((7,)), 5),
        ("norms", Perceptron((4, 6), "gelu", 1e-12), 2),
        ("vector", Embedding(48), 0),
        ("beside", ClassAndMean(), 4),
    ):
        w = random_weights(tuner, {"in": 48, "r": classes}, 1, torch.float64)
        labels = tuple(f"{name}{number}" for number in range(classes))
        others = (Point("norm", "output"),) if tuner.reads == 2 else ()
        branch = replace(at, tuner=tuner, others=others)
        tasks.append(
            replace(probe, task=name, labels=labels, branches={name: branch}, tensors={name: w})
        )
    tasks = [tasks[number] for number in order]
    bank = stack([lower(vit64, task, sites_of(vit64)) for task in tasks], torch.float64)
    images = vit64.example(5)
    with torch.no_grad():
        mixed = Mixed(vit64, bank)(images, torch.arange(5))
    assert mixed.shape == (5, 48)
    for row, task in enumerate(tasks):
        alone = run(vit64, task, images[row : row + 1])
        assert error(mixed[row : row + 1, : width(task)], alone) < 1e-12
        assert (mixed[row, width(task) :] == Head.fill["bias"]).all()


@full
def test_every_stored_tensor_is_alive(case, backbone, make, run):
    """Perturbing any stored tensor changes the logits; nothing is inert at these places.

    `test_inert_values` lists what is inert elsewhere.
    """
    delta = make()
    images = backbone.example(2)
    before = run(backbone, delta, images)
    for name, named in delta.tensors.items():
        for key, tensor in named.items():
            if inert(delta.branches[name].tuner, key):
                continue
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))
            changed = {**delta.tensors, name: {**named, key: tensor + 0.1 * noise}}
            after = run(backbone, replace(delta, tensors=changed), images)
            assert (after - before).abs().max() > 1e-6, f"{name}/{key} does nothing"


@pytest.mark.parametrize(
    "what", ["key_bias", "lone_key", "scale_before_a_norm", "lone_query_of_the_last_block"]
)
def test_inert_values(what, vit64, random_delta, random_weights, run, error):
    """What mathematically does nothing, and what brings it to life.

    - A shift of the keys adds the same number to all scores of a query, and softmax drops it; a
      prefix, which is not shifted, sees the difference.
    - A prefix of one key with a softmax of its own has the weight 1 whatever the key is.
    - A layer norm takes out the scale in front of it, but for its eps.
    - The head reads the class token, so in the last block the queries of the patches do nothing.
    """
    from utune_deploy.merge.methods import bitfit, lora, prefix

    images = vit64.example(2)
    if what == "key_bias":
        for methods, alive in (([bitfit()], False), ([bitfit(), prefix(2)], True)):
            delta = random_delta(vit64, *methods)
            name = "blocks.1.attn.qkv/bias"
            shift = delta.tensors[name]["shift"].clone()
            shift[48:96] += 1.0
            changed = replace(delta, tensors={**delta.tensors, name: {"shift": shift}})
            difference = error(run(vit64, changed, images), run(vit64, delta, images))
            assert difference > 1e-6 if alive else difference < 1e-13
    elif what == "lone_key":
        for methods, alive in (
            ([prefix(1, joint_softmax=False)], False),
            ([prefix(2, joint_softmax=False)], True),
            ([prefix(1, joint_softmax=True)], True),
        ):
            delta = random_delta(vit64, *methods)
            name = "blocks.1.attn/prefix"
            key = delta.tensors[name]["key"].clone()
            key[0] += 1.0
            changed = {**delta.tensors, name: {**delta.tensors[name], "key": key}}
            difference = error(
                run(vit64, replace(delta, tensors=changed), images), run(vit64, delta, images)
            )
            assert difference > 1e-6 if alive else difference < 1e-13
    elif what == "scale_before_a_norm":
        for norm, alive in (("out", False), ("in", True), ("none", True)):
            tuner = Bottleneck("tanh", bias=True, norm=norm, eps=1e-12)
            w = random_weights(tuner, {"in": 48, "out": 48, "r": 3}, 1, torch.float64)
            x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2)).double()
            twice = tuner.branch(x, {**w, "scale": 2 * w["scale"]})
            difference = error(twice, tuner.branch(x, w))
            assert difference > 0.5 if alive else difference < 1e-9
    else:
        delta = random_delta(vit64, lora(2, blocks=(2,)))
        full = run(vit64, delta, images)
        attn = vit64.model.get_submodule("blocks.2.attn")
        length = vit64.model.get_submodule("blocks.2.attn.qkv").out_features // 3

        def clobber(_, args, value):
            value = value.clone()
            value[:, 1:, :length] = 7.0  # the patches' queries
            return value

        handle = attn.qkv.register_forward_hook(clobber)
        try:
            assert error(run(vit64, delta, images), full) < 1e-13
        finally:
            handle.remove()


@vit_only
def test_gradients_reach_every_tensor(case, backbone, make, sites_of):
    """And none reaches the backbone."""
    tuned = restore(backbone, make(), sites_of(backbone)).train()
    if not list(tuned.trainable()):
        assert case.kind == "embedding"
        return
    tuned(backbone.example(2)).square().sum().backward()
    for name, _, weights in tuned.parts():
        for key, parameter in weights.items():
            if not tuned.branches[name].tuner.constant(key):
                assert parameter.grad is not None, f"{name}/{key}"
                assert parameter.grad.abs().max() > 0, f"{name}/{key}"
    assert all(p.grad is None for p in backbone.model.parameters())


@full
def test_settle_keeps_the_numbers(case, backbone, make, error):
    delta = make()
    images = backbone.example(2)
    settled = [(b, b.tuner.settle(w)) for b, w in delta.weighted()]
    for branch, weights in settled:
        assert set(weights) == set(branch.tuner.served)
        bind(branch.tuner.served, weights, where="served")
    stored = forward(backbone, delta.weighted(), images)
    assert error(forward(backbone, settled, images), stored) < 1e-14


@full
def test_round_trip_through_a_file(case, backbone, make, run, tmp_path: Path):
    delta = make()
    save_delta(tmp_path / "a.safetensors", delta)
    loaded = load_delta(tmp_path / "a.safetensors")
    assert loaded.branches == delta.branches
    assert list(loaded.branches) == list(delta.branches)
    images = backbone.example(2)
    assert torch.equal(run(backbone, loaded, images), run(backbone, delta, images))
