"""What cannot be carried is refused with a sentence, and a backbone is given back whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from utune_deploy.merge.attach import restore
from utune_deploy.merge.backbone import fingerprint
from utune_deploy.merge.delta import validate
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.parallel import joined
from utune_deploy.merge.tuner import Branch, Point, Tuner
from utune_deploy.merge.tuners.bias import Bias
from utune_deploy.merge.tuners.bottleneck import Bottleneck
from utune_deploy.merge.tuners.bypass import Bypass
from utune_deploy.merge.tuners.difference import Difference
from utune_deploy.merge.tuners.gain import Gain
from utune_deploy.merge.tuners.gpo import Gpo
from utune_deploy.merge.tuners.kronecker import Kronecker
from utune_deploy.merge.tuners.ladder import Ladder
from utune_deploy.merge.tuners.norm import Norm
from utune_deploy.merge.tuners.prefix import Prefix
from utune_deploy.merge.tuners.prompt import Prompt
from utune_deploy.merge.tuners.rotation import Rotation
from utune_deploy.merge.tuners.side_network import SideNetwork
from utune_deploy.merge.tuners.unipt import UniPT
from utune_deploy.merge.tuners.unipt_pyramid import UniPTPyramid

PLAIN = Bottleneck("relu", bias=True)


def point(text: str) -> Point:
    return Point.parse(text)


def at(tuner: Tuner, taps: str, add: str) -> Branch:
    tap, *others = (point(text) for text in taps.split())
    return Branch(tuner, tap, point(add), tuple(others))


@pytest.fixture
def planted(vit64, random_delta, random_weights):
    """The ViT's plain task with one more branch: `(branch, **sizes) -> Delta`."""

    def planted(branch: Branch, **sizes: int):
        plain = random_delta(vit64)
        sizes = {"in": 48, "out": 48, "r": 2, **sizes}
        w = random_weights(branch.tuner, sizes, 3, torch.float64)
        return replace(
            plain, branches={"x": branch, **plain.branches}, tensors={"x": w, **plain.tensors}
        )

    return planted


UNREADABLE = ["", ":", "blocks.0", "blocks.0:", "blocks.0:side", "blocks.0:Input", "a b:input"]
UNREADABLE += ["a/b:input", "a:input:output", "a-b:keys", "a:input ", "a\n:input", "a[0]:input", 3]


@pytest.mark.parametrize("text", [*UNREADABLE, None, "*:output"])
def test_points_that_cannot_be_read(text):
    with pytest.raises(IncompatibleArtefact, match="a point of the backbone cannot") as caught:
        Point.parse(text, where="here")
    assert caught.value.details["where"] == "here"
    assert "patches" in caught.value.details["wanted"]


@pytest.mark.parametrize("side", ["input", "output", "patches", "keys", "tokens", "weights"])
@pytest.mark.parametrize("module", ["", "a", "blocks.0.attn", "layers.1.blocks.0"])
def test_points_survive_their_text(module, side):
    assert point(str(Point(module, side))) == Point(module, side)


MLP = ("blocks.1.mlp:input", "blocks.1.mlp:output")
TOP, SEAT = "norm:input", "head:input"
STATES = "blocks.0:output blocks.1:output"
IMAGES = "patch_embed.proj:input patch_embed.proj:output"
WRONG = [
    (PLAIN, *MLP, {"in": 40}, "in=48"),
    (PLAIN, *MLP, {"out": 40}, "out=48"),
    (PLAIN, "patch_embed.proj:patches", "patch_embed.proj:output", {"in": 3}, "in=192"),
    (Kronecker(2, 2), *MLP, {"in": 40}, "in=48"),
    (Kronecker(2, 2), *MLP, {"out": 40}, "out=48"),
    (Rotation(5, 8), "blocks.1.mlp:input", "blocks.1.mlp:input", {}, "in=48"),
    (Gain(shift=True), *[MLP[1]] * 2, {"in": 40, "out": 40}, "in=48"),
    (Gain(shift=False), "blocks.1.attn.qkv:input", "blocks.1.attn.qkv:output", {}, "out=144"),
    (Bias(), *[MLP[1]] * 2, {"out": 40}, "out=48"),
    (Norm(1e-6), "blocks.1.norm1:input", "blocks.1.norm1:output", {"out": 40}, "in=48"),
    (Prefix(joint_softmax=True), *["blocks.1.attn:keys"] * 2, {"out": 40}, "out=48"),
    (Prompt(), *["blocks.1:tokens"] * 2, {"out": 40}, "out=48"),
    (SideNetwork("fcn4"), "patch_embed.proj:input", "head:input", {"out": 40}, "out=48"),
    (SideNetwork("fcn4"), "blocks.1:input", "head:input", {}, "in=48"),
    (Bypass(1, "relu"), "blocks.2:input blocks.2:output", "norm:input", {"in": 40}, "in=48"),
    (Bypass(1, "relu"), "blocks.2:input blocks.1.attn.qkv:output", "norm:input", {}, "in=144"),
    (UniPT((40, 48), 48, 8, 48), f"{STATES} blocks.2:output", SEAT, {}, "in=48 at blocks.0:output"),
    (UniPT((48, 48), 40, 8, 48), f"{STATES} blocks.2:output", SEAT, {}, "in=48 at blocks.2:output"),
    (Ladder((48, 40), 8, 2, 8, 48), STATES, SEAT, {}, "in=48 at blocks.1:output"),
    (UniPTPyramid((4,), 48, 8, 48, cells=(8,)), IMAGES, SEAT, {}, "in=3 at patch_embed.proj:input"),
]


@pytest.mark.parametrize(("tuner", "taps", "add", "sizes", "wanted"), WRONG)
def test_wrong_channels(tuner, taps, add, sizes, wanted, planted, vit64, sites_of):
    delta = planted(at(tuner, taps, add), **sizes)
    with pytest.raises(IncompatibleArtefact, match="not have the channels of its place") as caught:
        restore(vit64, delta, sites_of(vit64))
    assert wanted in caught.value.details["wanted"]
    assert "x" in caught.value.details["where"]


@pytest.mark.parametrize(
    ("tuner", "taps", "add"),
    [
        (PLAIN, "blocks.1.mlp:output", "blocks.1.mlp:input"),
        (PLAIN, "blocks.2:output", "blocks.0:output"),
        (Bypass(2, "relu"), "blocks.0:input blocks.0:output blocks.2:output", "blocks.1:output"),
        (PLAIN, "blocks.1:output", "patch_embed.proj:output"),
        (UniPT((48,), 48, 8, 48), STATES, "blocks.0:output"),
        (Ladder((48, 48), 8, 2, 8, 48), STATES, "blocks.1:input"),
        (Prompt(), "blocks.2:tokens", "blocks.0:tokens"),
    ],
)
def test_a_tap_behind_its_add_point(tuner, taps, add, planted, vit64, sites_of):
    with pytest.raises(IncompatibleArtefact, match="joins before the value that it reads"):
        restore(vit64, planted(at(tuner, taps, add)), sites_of(vit64))


@pytest.mark.parametrize(
    ("parameter", "shape", "module", "found"),
    [
        ("weight", (144, 47), "blocks.1.attn.qkv", "[144, 48]"),
        ("weight", (48, 144), "blocks.1.attn.qkv", "[144, 48]"),
        ("gamma", (48,), "blocks.1.norm1", "none"),
        ("weight", (48,), "blocks.1", "none"),
        ("weight", (48,), "blocks.9.norm1", "none"),
        ("running_mean", (48,), "blocks.1.norm1", "none"),
        ("pos_embed", (1, 16, 48), "", "[1, 17, 48]"),
    ],
)
def test_a_difference_of_what_is_not_there(
    parameter, shape, module, found, planted, vit64, sites_of
):
    delta = planted(at(Difference(parameter, shape), *[f"{module}:weights"] * 2))
    with pytest.raises(IncompatibleArtefact, match="no such parameter") as caught:
        restore(vit64, delta, sites_of(vit64))
    assert caught.value.details["found"] == found
    assert str(list(shape)) in caught.value.details["wanted"]


STRANGE = {
    "fewer taps than levels": (at(Bypass(3, "relu"), "blocks.0:input blocks.0:output", TOP), {}),
    "more taps than levels": (
        at(Bypass(1, "relu"), "blocks.0:input blocks.0:output blocks.1:output", TOP),
        {},
    ),
    "fewer taps than targets": (at(UniPT((48, 48), 48, 8, 48), STATES, SEAT), {}),
    "a mask that is no tap": (at(UniPT((48,), 48, 8, 48, masked=True), STATES, SEAT), {}),
    "a map of another size": (
        at(UniPTPyramid((3,), 48, 8, 48, gives="mean", cells=(4,)), IMAGES, SEAT),
        {},
    ),
    "tokens that are more than gpo knows": (at(Gpo(9, 4, 2), "blocks.2:output", SEAT), {}),
    "channels that the head does not read": (
        at(UniPT((48,), 48, 8, 40, gives="first"), STATES, SEAT),
        {},
    ),
    "a ladder of one tap": (at(Bypass(1, "relu"), "blocks.0:input", TOP), {}),
    "two taps for one": (at(PLAIN, "blocks.0:input blocks.0:output", MLP[1]), {}),
    "a shift of other channels": (at(Gain(shift=True), *[MLP[1]] * 2), {"out": 40}),
    "prompts that leave in another scope": (
        at(Prompt(), "blocks.0:tokens", "blocks.1.attn:tokens"),
        {},
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_no_formula_allows(name, planted, vit64, sites_of):
    """Refused when it is read or met with the backbone, not by torch in the middle of a pass."""
    branch, sizes = STRANGE[name]
    delta = planted(branch, **sizes)

    def meet() -> None:
        validate(delta, where="a file")
        restore(vit64, delta, sites_of(vit64))(vit64.example())

    with pytest.raises((IncompatibleArtefact, UsageError)) as caught:
        meet()
    assert caught.value.what
    assert "where" in caught.value.details


class Skips(nn.Module):
    """Calls its first layer only when told, its second never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = True

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) if self.calls else x)


def shift_at(place: Point) -> tuple[Branch, dict[str, Tensor]]:
    if place.side == "tokens":
        return Branch(Prompt(), place, place), {"token": torch.ones(1, 4)}
    return Branch(Bias(), place, place), {"shift": torch.ones(4)}


@pytest.mark.parametrize("side", ["input", "output", "tokens"])
@pytest.mark.parametrize("module", ["first", "second"])
def test_a_branch_that_never_acted_is_an_error(module, side):
    model = Skips()
    model.calls = module == "second"
    place = Point(module, side)
    with torch.no_grad(), joined(model, [shift_at(place)]):
        with pytest.raises(UsageError, match="a branch never acted") as caught:
            model(torch.zeros(1, 3, 4))
        assert str(place) in caught.value.details["found"]
    assert not model._forward_hooks


def test_a_branch_that_acts_in_the_first_of_two_passes_only():
    model, x = Skips(), torch.zeros(1, 3, 4)
    with torch.no_grad(), joined(model, [shift_at(Point("first", "output"))]):
        model(x)
        model.calls = False
        with pytest.raises(UsageError, match="a branch never acted"):
            model(x)


def test_a_prefix_that_met_no_attention():
    place, model = Point("first", "keys"), Skips()
    w = {"key": torch.ones(1, 4), "value": torch.ones(1, 4)}
    branch = Branch(Prefix(joint_softmax=True), place, place)
    with (
        torch.no_grad(),
        joined(model, [(branch, w)]),
        pytest.raises(UsageError, match="a branch never acted"),
    ):
        model(torch.zeros(1, 3, 4))


# Given back


def state(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Every parameter and buffer as the object it is and the values it has, in order."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(tensor), tensor.clone()) for name, tensor in named}


def require_same(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, (number, tensor) in before.items():
        assert after[name][0] == number, name
        assert torch.equal(after[name][1], tensor), name
    for module in model.modules():
        assert not {*module._parameters, *module._buffers} & set(vars(module))
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch._C._len_torch_function_stack() == 0


def differences(model: nn.Module, names: list[str]) -> list[tuple[Branch, dict[str, Tensor]]]:
    found = []
    for name in names:
        module, _, parameter = name.rpartition(".")
        tensor = getattr(model.get_submodule(module), parameter)
        point = Point(module, "weights")
        branch = Branch(Difference(parameter, tuple(tensor.shape)), point, point)
        found.append((branch, {"shift": 0.1 * torch.ones_like(tensor)}))
    return found


VIT = ["cls_token", "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias", "blocks.2.norm1.bias"]
RESNET = ["conv1.weight", "layer4.0.bn1.running_mean", "layer4.0.bn1.running_var", "bn1.weight"]
NAMES = {"vit": VIT, "resnet": RESNET}


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "ends", ["well", "in the forward", "in the block", "with a branch missing"]
)
def test_a_difference_gives_the_backbone_back(family, ends, host, monkeypatch):
    backbone = host(family)
    model = backbone.model
    images = backbone.example(2)
    before = state(model)
    weighted = differences(model, NAMES[family])
    with torch.no_grad():
        plain = model(images)

    def stop(*_, **__):
        raise RuntimeError("stopped on purpose")

    if ends == "with a branch missing":
        point = Point(NAMES[family][1].rpartition(".")[0], "weights")
        missing = (Branch(Difference("nothing", (3,)), point, point), {"shift": torch.ones(3)})
        with pytest.raises((UsageError, AttributeError)), joined(model, [*weighted, missing]):
            pass
    elif ends == "in the block":
        with pytest.raises(RuntimeError, match="on purpose"), joined(model, weighted):
            stop()
    else:
        with monkeypatch.context() as patch, torch.no_grad():
            if ends == "in the forward":
                inside = "blocks.1.attn.proj" if family == "vit" else "layer4.0.bn2"
                patch.setattr(model.get_submodule(inside), "forward", stop)
                with pytest.raises(RuntimeError, match="on purpose"), joined(model, weighted):
                    model(images)
            else:
                with joined(model, weighted):
                    assert not torch.equal(model(images), plain)
    require_same(model, before)
    tensors = dict(model.state_dict())
    assert fingerprint(tensors, *backbone.classifiers) == backbone.identity.fingerprint
    with torch.no_grad():
        assert torch.equal(model(images), plain)


def test_the_order_of_the_parameters_is_kept():
    """A state dict, or an optimizer over all parameters, goes by their order."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    names = list(model.state_dict())
    with joined(model, differences(model, ["0.weight", "1.running_mean"])):
        pass
    assert list(model.state_dict()) == names


def test_two_differences_of_one_parameter_add_up(vit64, error):
    model = vit64.model
    before = state(model)
    (branch, w), *_ = differences(model, VIT[1:2])
    images = vit64.example(2)
    with torch.no_grad():
        with joined(model, [(branch, w), (branch, {"shift": 2 * w["shift"]})]):
            twice = model(images)
        with joined(model, [(branch, {"shift": 3 * w["shift"]})]):
            assert error(model(images), twice) < 1e-13
    require_same(model, before)


@pytest.mark.parametrize("family", ["eva", "beit", "swinv2"])
@pytest.mark.parametrize("inside", ["attn.proj", "mlp", "attn"])
def test_layers_that_are_read_are_given_back_when_the_forward_raises(
    family, inside, host, monkeypatch
):
    backbone = host(family)
    model = backbone.model
    before = state(model)
    block = "layers.0.blocks.1" if family == "swinv2" else "blocks.1"
    width = 16 if family == "swinv2" else 48
    qkv = Point(f"{block}.attn.qkv", "output")
    weighted = [
        (Branch(Bias(), qkv, qkv), {"shift": torch.ones(3 * width).double()}),
        *differences(model, [f"{block}.attn.qkv.weight"]),
    ]

    def stop(*_, **__):
        raise RuntimeError("stopped on purpose")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.get_submodule(f"{block}.{inside}"), "forward", stop)
        with pytest.raises(RuntimeError, match="on purpose"), joined(model, weighted):
            model(backbone.example(2))
    require_same(model, before)


@pytest.mark.parametrize(
    "span", ["blocks.1 blocks.1", "blocks.0 blocks.2", "blocks.1.attn blocks.1.attn"]
)
@pytest.mark.parametrize("inside", ["blocks.1.attn.proj", "blocks.1.mlp", "norm"])
def test_prompts_are_gone_when_the_forward_raises(span, inside, vit64, monkeypatch):
    model = vit64.model
    before = state(model)
    tap, add = (Point(module, "tokens") for module in span.split())
    branch = Branch(Prompt(joint_softmax=False), tap, add)
    w = {"token": torch.ones(2, 3, 48).double(), "mask": torch.zeros(2, 3).double()}

    def stop(*_, **__):
        raise RuntimeError("stopped on purpose")

    images = vit64.example(2)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.get_submodule(inside), "forward", stop)
        with pytest.raises(RuntimeError, match="on purpose"), joined(model, [(branch, w)], rows=2):
            model(images)
    require_same(model, before)
