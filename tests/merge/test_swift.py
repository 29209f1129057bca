"""ms-swift folders, written here in its two layouts, against its formulas written out in float64."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from utune_deploy.merge.attach import Tuned
from utune_deploy.merge.backbone import create, wrap
from utune_deploy.merge.delta import load_delta, require_backbone, save_delta
from utune_deploy.merge.errors import IncompatibleArtefact, UsageError
from utune_deploy.merge.importers import read

WIDTH, DEPTH, HEADS, CLASSES = 48, 3, 4, 5
LORA = {"swift_type": "LORA", "peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}
ADAPTER = {"swift_type": "ADAPTER", "hidden_pos": 0, "method_name": "forward", "act_layer": "gelu"}
PROMPT = {
    "swift_type": "PROMPT",
    "embedding_pos": 0,
    "attention_mask_pos": None,
    "attach_front": False,
    "extract_embedding": False,
}
BYPASS = {
    "swift_type": "RESTUNING",
    "dims": WIDTH,
    "root_modules": r".*blocks\.0$",
    "root_modules_hook": "input",
    "stem_modules": r".*blocks\.\d+$",
    "stem_modules_hook": "output",
    "target_modules": "norm",
    "target_modules_hook": "input",
    "target_hidden_pos": 0,
    "tuner_cfg": "res_adapter",
    "use_upsample": False,
}
SIDE = {"swift_type": "SIDE", "dim": WIDTH, "side_module_name": "fcn4", "source_hidden_pos": 0}


def random(seed: int, *shape: int, scale: float | None = None) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise * (shape[-1] ** -0.5 if scale is None else scale)


HEAD = {"weight": random(1, CLASSES, WIDTH), "bias": random(2, CLASSES, scale=0.3)}


def named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def save(folder, tensors, *, safe: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if safe:
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")


def write(folder, tuners, extra=None, *, layout: str = "2.4"):
    """A folder as `save_pretrained` writes it: `tuners` is name -> (configuration, tensors)."""
    for name, (config, tensors) in tuners.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        if tensors:
            save(folder / name, tensors, safe=layout == "1.2")
    if extra is not None:
        place = folder / "extra_states" if layout == "2.4" else folder
        save(place, extra, safe=layout == "1.2")
        (place / "adapter_config.json").write_text(json.dumps({"extra_state_keys": ["head.*"]}))
    return folder


@dataclass
class Formula:
    """What a ViT computes with tuners, in float64, from plain functions.

    `beside` adds a matrix to a weight; `behind` maps what a module gives; `prompts` are tokens by block;
    `bypass` gives the final norm's input from the first block's input and all outputs; `side` mixes.
    """

    beside: dict = field(default_factory=dict)
    behind: dict = field(default_factory=dict)
    prompts: dict = field(default_factory=dict)
    leave: bool = False
    bypass: object = None
    side: object = None
    head: dict = field(default_factory=lambda: HEAD)

    def __call__(self, backbone, images):
        w = {name: tensor.double() for name, tensor in backbone.model.state_dict().items()}
        images = images.double()

        def linear(x, name):
            weight = w[f"{name}.weight"] + self.beside.get(name, 0.0)
            return F.linear(x, weight, w[f"{name}.bias"])

        def norm(x, name):
            return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

        def tuned(x, name):
            for function in self.behind.get(name, ()):
                x = function(x)
            return x

        kernel = w["patch_embed.proj.weight"] + self.beside.get("patch_embed.proj", 0.0)
        x = F.conv2d(images, kernel, w["patch_embed.proj.bias"], stride=8)
        x = x.flatten(2).mT
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
        states = [x]
        for block in range(DEPTH):
            if (token := self.prompts.get(block)) is not None:
                kept = x if block == 0 else x[:, : -len(token)]
                x = torch.cat([kept, token.double().expand(len(x), -1, -1)], dim=1)
            name = f"blocks.{block}"
            q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").unflatten(
                -1, (3, HEADS, -1)
            ).permute(2, 0, 3, 1, 4)  # fmt: skip
            a = torch.softmax(q @ k.mT / math.sqrt(WIDTH // HEADS), dim=-1) @ v
            a = linear(a.transpose(1, 2).flatten(2), f"{name}.attn.proj")
            x = x + tuned(a, f"{name}.attn")
            hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + tuned(linear(hidden, f"{name}.mlp.fc2"), f"{name}.mlp")
            if self.leave and block in self.prompts:
                x = x[:, : -len(self.prompts[block])]
            states.append(x)
        x = self.bypass(*states) if self.bypass else x
        x = norm(x, "norm")[:, 0]
        x = self.side(images, x) if self.side else x
        return F.linear(x, self.head["weight"].double(), self.head["bias"].double())


@pytest.fixture(scope="module")
def images():
    return random(7, 2, 3, 32, 32, scale=1.0)


@pytest.fixture(scope="module")
def headless(vit):
    """The ViT without a classifier."""
    arguments = {**vit.identity.arguments, "num_classes": 0}
    model = timm.create_model(vit.identity.architecture, **arguments)
    trunk = {k: v for k, v in vit.model.state_dict().items() if not vit.is_classifier(k)}
    model.load_state_dict(trunk)
    return wrap(model, vit.identity.architecture, arguments)


@pytest.fixture
def agrees(vit, vit64, images, error, sites_of, tmp_path):
    """Read, write, load and run in float64; give the delta: `(path, formula, settings, backbone)`."""

    def agrees(path, formula, settings=None, backbone=None):
        backbone = backbone or vit
        foreign = read("swift", path, backbone, settings)
        save_delta(tmp_path / "d.safetensors", foreign.delta("task", backbone), force=True)
        delta = load_delta(tmp_path / "d.safetensors")
        require_backbone(delta, backbone, sites_of(backbone), where=path)
        with torch.no_grad():
            found = Tuned(vit64, delta.branches, delta.tensors)(images.double())
            wanted, plain = formula(vit64, images), Formula(head=formula.head)(vit64, images)
        assert error(found, wanted) <= 1e-9
        if formula.beside or formula.behind or formula.prompts or formula.bypass or formula.side:
            assert error(plain, wanted) > 1e-3, "the tuners act"
        return delta

    return agrees


def adapter(seed: int, rank: int = 3) -> dict[str, torch.Tensor]:
    return {
        "linear1.weight": random(seed, rank, WIDTH),
        "linear1.bias": random(seed + 1, rank, scale=0.3),
        "linear2.weight": random(seed + 2, WIDTH, rank),
        "linear2.bias": random(seed + 3, WIDTH, scale=0.3),
    }


def serial(w, act=F.gelu):
    w = {name: tensor.double() for name, tensor in w.items()}

    def run(x):
        hidden = act(F.linear(x, w["linear1.weight"], w["linear1.bias"]))
        return x + F.linear(hidden, w["linear2.weight"], w["linear2.bias"])

    return run


def adapters(name: str = "default", seed: int = 10, module: str = "mlp", prefix: str = ""):
    """An adapter in every block: tensors by their keys, and functions by module."""
    own = {f"blocks.{block}.{module}": adapter(seed + 10 * block) for block in range(DEPTH)}
    tensors = {}
    for place, w in own.items():
        tensors |= named(f"{prefix}{place}.adapter_{name}.", w)
    return tensors, {place: [serial(w)] for place, w in own.items()}


@pytest.mark.parametrize("layout", ["2.4", "1.2"])
@pytest.mark.parametrize("module", ["mlp", "attn"])
def test_adapters_stand_behind_a_module(agrees, tmp_path, layout, module):
    tensors, behind = adapters(module=module)
    folder = write(
        tmp_path / "s", {"default": (ADAPTER, tensors)}, named("head.", HEAD), layout=layout
    )
    delta = agrees(folder, Formula(behind=behind))
    assert delta.provenance["imported from"] == "ms-swift ADAPTER"


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("relu", torch.relu),
        ("gelu_new", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
    ],
)
def test_activations_of_adapters(agrees, tmp_path, name, act):
    w = adapter(30)
    tensors = named("blocks.1.mlp.adapter_default.", w)
    config = {**ADAPTER, "act_layer": name}
    folder = write(tmp_path / "s", {"default": (config, tensors)}, named("head.", HEAD))
    agrees(folder, Formula(behind={"blocks.1.mlp": [serial(w, act)]}))


def lora(modules, rank=2, seed=50):
    """Matrices by layer: `{layer: (A, B)}`."""
    rows = {"qkv": 3 * WIDTH, "fc1": 4 * WIDTH}
    pairs = {}
    for number, module in enumerate(modules):
        out = rows.get(module.rpartition(".")[2], WIDTH)
        pairs[module] = (
            random(seed + 2 * number, rank, WIDTH),
            random(seed + 2 * number + 1, out, rank),
        )
    return pairs


def change(pair, scale):
    a, b = pair
    return scale * b.double() @ a.double()


def in_24(pairs, name="default"):
    return {
        f"{module}.lora_{part}.{name}.weight": tensor
        for module, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def in_12(pairs, name="default"):
    return {
        f"{module}.loramodule_{name}.lora_{part}": tensor
        for module, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


LAYERS = ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.2.mlp.fc1")


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"lora_alpha": 8, "lora_dropout": 0.1}, 4.0),
    ],
)
def test_lora(agrees, tmp_path, config, scale):
    pairs = lora(LAYERS)
    folder = write(
        tmp_path / "s", {"default": ({**LORA, **config}, in_24(pairs))}, named("head.", HEAD)
    )
    agrees(folder, Formula(beside={m: change(p, scale) for m, p in pairs.items()}))


def test_lora_on_a_convolution(agrees, tmp_path):
    a, b = random(60, 2, 3, 8, 8, scale=0.1), random(61, WIDTH, 2, 1, 1, scale=0.5)
    tuners = {"default": (LORA, in_24({"patch_embed.proj": (a, b)}))}
    folder = write(tmp_path / "s", tuners, named("head.", HEAD))
    kernel = change((a.flatten(1), b.flatten(1)), 3.0).reshape(WIDTH, 3, 8, 8)
    agrees(folder, Formula(beside={"patch_embed.proj": kernel}))


def test_lora_of_1_2(agrees, tmp_path):
    pairs = lora(LAYERS)
    config = {"swift_type": "LORA", "r": 2, "lora_alpha": 1.0, "merge_weights": True}
    tuners = {"default": (config, in_12(pairs))}
    folder = write(tmp_path / "s", tuners, named("head.", HEAD), layout="1.2")
    agrees(folder, Formula(beside={m: change(p, 0.5) for m, p in pairs.items()}))


def test_patterns_of_ranks_and_scales(agrees, tmp_path):
    pairs = lora(LAYERS[:1]) | lora(LAYERS[1:], rank=4, seed=70)
    patterns = {"rank_pattern": {"proj": 4, "fc1": 4}, "alpha_pattern": {"fc1": 2}}
    tuners = {"default": ({**LORA, **patterns}, in_24(pairs))}
    folder = write(tmp_path / "s", tuners, named("head.", HEAD))
    scales = dict(zip(LAYERS, (3.0, 1.5, 0.5), strict=True))
    agrees(folder, Formula(beside={m: change(p, scales[m]) for m, p in pairs.items()}))


def test_patterns_that_disagree_are_refused(vit, tmp_path):
    patterns = {"alpha_pattern": {"qkv": 2, "attn.qkv": 3}}
    tuners = {"default": ({**LORA, **patterns}, in_24(lora(LAYERS)))}
    with pytest.raises(IncompatibleArtefact, match="several patterns"):
        read("swift", write(tmp_path / "s", tuners, named("head.", HEAD)), vit)


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"qkv(": 2}},
        {"rank_pattern": {"[": 2}},
        {"rank_pattern": ["qkv"]},
        {"alpha_pattern": {"qkv": [2]}},
    ],
    ids=str,
)
def test_patterns_that_cannot_be_read_are_refused(vit, tmp_path, patterns):
    tuners = {"default": ({**LORA, **patterns}, in_24(lora(LAYERS)))}
    folder = write(tmp_path / "s", tuners, named("head.", HEAD))
    with pytest.raises(IncompatibleArtefact, match=next(iter(patterns))):
        read("swift", folder, vit)


def test_biases_and_modules_that_were_saved(vit, vit64, agrees, tmp_path, error, images):
    """`bias="all"` writes a wrapped layer's bias inside it, and the head's three times."""
    pairs = lora(LAYERS[:1])
    own = {
        name: tensor + random(90 + number, *tensor.shape, scale=0.3)
        for number, (name, tensor) in enumerate(vit.model.state_dict().items())
        if name in ("blocks.0.attn.qkv.bias", "blocks.1.norm2.bias", "norm.bias", "norm.weight")
    }
    saved = {
        name.replace("qkv.bias", "qkv.base_layer.bias"): tensor for name, tensor in own.items()
    }
    saved |= named("head.", HEAD)
    saved["head.original_module.bias"] = torch.zeros(7)
    saved["head.modules_to_save.default.bias"] = HEAD["bias"]
    config = {**LORA, "bias": "all", "modules_to_save": ["head", "norm"]}
    folder = write(tmp_path / "s", {"default": (config, in_24(pairs) | saved)})
    foreign = read("swift", folder, vit)
    double = wrap(timm.create_model(vit.identity.architecture, **vit.identity.arguments, num_classes=7).double(),
                  vit.identity.architecture, vit.identity.arguments)  # fmt: skip
    double.model.load_state_dict(
        {**vit64.model.state_dict(), **{name: tensor.double() for name, tensor in own.items()}}
    )
    with torch.no_grad():
        found = Tuned(vit64, foreign.branches, foreign.tensors)(images.double())
        wanted = Formula(beside={LAYERS[0]: change(pairs[LAYERS[0]], 3.0)})(double, images)
    assert error(found, wanted) <= 1e-9
    assert "blocks.0.attn.qkv.bias" in foreign.notes["tuned besides"]


def grouped(enabled, rank=2, seed=110):
    """MergedLinear's A and B, and the change of the weight, group by group."""
    groups = sum(enabled)
    a = random(seed, groups * rank, WIDTH)
    b = random(seed + 1, 3 * WIDTH // len(enabled) * groups, rank)
    rows = 3 * WIDTH // len(enabled)
    whole, group = [], 0
    for on in enabled:
        part = torch.zeros(rows, WIDTH, dtype=torch.float64)
        if on:
            ours = slice(group * rows, (group + 1) * rows)
            part = b[ours].double() @ a[group * rank : (group + 1) * rank].double()
            group += 1
        whole.append(part)
    return a, b, torch.cat(whole)


ENABLED = ([True], [True, False, True], [False, True, False], [True, True, True])


@pytest.mark.parametrize("enabled", ENABLED)
def test_merged_linear_of_1_2(agrees, tmp_path, enabled):
    a, b, whole = grouped(enabled)
    config = {**LORA, "use_merged_linear": True, "enable_lora": enabled}
    tuners = {"default": (config, in_12({LAYERS[0]: (a, b)}))}
    folder = write(tmp_path / "s", tuners, named("head.", HEAD), layout="1.2")
    agrees(folder, Formula(beside={LAYERS[0]: 3.0 * whole}))


def flat(vit, a, b, prefix=""):
    """What `torch.save(model.state_dict())` writes of a model with MergedLinear."""
    tensors = {**vit.model.state_dict(), **named("head.", HEAD)}
    for part in ("weight", "bias"):
        tensors[f"{LAYERS[0]}.base_layer.{part}"] = tensors[f"{LAYERS[0]}.{part}"]
    tensors |= {f"{LAYERS[0]}.lora_A": a, f"{LAYERS[0]}.lora_B": b}
    return named(prefix, tensors)


@pytest.mark.parametrize("enabled", ENABLED)
def test_merged_linear_in_a_whole_state_dict(vit, agrees, tmp_path, enabled):
    a, b, whole = grouped(enabled)
    torch.save(flat(vit, a, b), tmp_path / "checkpoint.pth")
    settings = {"lora_alpha": "5", "enable_lora": ",".join(map(str, enabled))}
    delta = agrees(tmp_path / "checkpoint.pth", Formula(beside={LAYERS[0]: 2.5 * whole}), settings)
    assert delta.provenance["lora_alpha"] == "5.0"


def test_a_whole_state_dict_asks_and_compares(vit, tmp_path):
    a, b, _ = grouped([True])
    path = tmp_path / "checkpoint.pth"
    torch.save(flat(vit, a, b, "module."), path)
    with pytest.raises(UsageError, match="lora_alpha"):
        read("swift", path, vit)
    with pytest.raises(UsageError, match="enable_lora"):
        read("swift", path, vit, {"lora_alpha": "8"})
    given = {"lora_alpha": "8", "enable_lora": "true"}
    with pytest.raises(UsageError, match="enable_lora cannot be read"):
        read("swift", path, vit, {**given, "enable_lora": "q,v"})
    with pytest.raises(IncompatibleArtefact, match="do not fit its enable_lora"):
        read("swift", path, vit, {**given, "enable_lora": "true,false,true"})
    whole = read("swift", path, vit, given)
    trained = {k: t for k, t in flat(vit, a, b).items() if "lora_" in k or k.startswith("head.")}
    torch.save(trained, path)
    alone = read("swift", path, vit, given)
    assert alone.branches == whole.branches
    assert "no frozen tensors" in alone.notes["trunk"]
    other = flat(vit, a, b)
    other["blocks.1.mlp.fc1.weight"] = other["blocks.1.mlp.fc1.weight"] + 1
    torch.save(other, path)
    with pytest.raises(IncompatibleArtefact, match="not the backbone's"):
        read("swift", path, vit, given)


def test_merged_linear_that_was_not_saved(vit, tmp_path):
    config = {**LORA, "use_merged_linear": True, "enable_lora": [True]}
    folder = write(tmp_path / "s", {"default": (config, {})}, named("head.", HEAD))
    with pytest.raises(
        IncompatibleArtefact, match="does not save the LoRA tensors of MergedLinear"
    ):
        read("swift", folder, vit)


@pytest.mark.parametrize("layout", ["2.4", "1.2"])
@pytest.mark.parametrize("numbers", [(0, 1, 2), (0,)])
def test_prompts(agrees, tmp_path, layout, numbers):
    prompts = {n: random(130 + n, 4, WIDTH, scale=0.8) for n in numbers}
    tensors = {f"blocks.{n}.prompt_default.prompt_token": t[None] for n, t in prompts.items()}
    folder = write(
        tmp_path / "s", {"default": (PROMPT, tensors)}, named("head.", HEAD), layout=layout
    )
    agrees(folder, Formula(prompts=prompts))


@pytest.mark.parametrize("front", [True, False])
def test_prompts_that_leave_behind_the_first_block(agrees, tmp_path, front):
    token = random(140, 4, WIDTH, scale=0.8)
    config = {**PROMPT, "attach_front": front, "extract_embedding": True}
    tensors = {"blocks.0.prompt_default.prompt_token": token[None]}
    folder = write(tmp_path / "s", {"default": (config, tensors)}, named("head.", HEAD))
    agrees(folder, Formula(prompts={0: token}, leave=True))


@pytest.mark.parametrize(
    ("config", "numbers", "sentence"),
    [
        ({"attach_front": True}, (0, 1, 2), "class token is no longer the first"),
        ({"extract_embedding": True}, (0, 1, 2), "taken out behind every block"),
        ({"attach_front": True, "extract_embedding": True}, (1,), "taken out behind every block"),
        ({}, (1, 2), "overwrite image tokens"),
        ({"attention_mask_pos": 1}, (0,), "this form of PROMPT"),
    ],
)
def test_prompts_that_cannot_be_carried(vit, tmp_path, config, numbers, sentence):
    tensors = {f"blocks.{n}.prompt_default.prompt_token": torch.ones(1, 2, WIDTH) for n in numbers}
    tuners = {"default": ({**PROMPT, **config}, tensors)}
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read("swift", write(tmp_path / "s", tuners, named("head.", HEAD)), vit)


def bypass_adapter(seed, rank):
    return {
        "ln1.weight": random(seed, rank, WIDTH),
        "ln1.bias": random(seed + 1, rank, scale=0.3),
        "ln2.weight": random(seed + 2, WIDTH, rank),
        "ln2.bias": random(seed + 3, WIDTH, scale=0.3),
    }


def bypass(ranks, factors=None):
    """Tensors by key and the formula; a rank of 0 is the identity. `factors` multiply the outputs."""
    own = {
        (level, rung): bypass_adapter(200 + 20 * level + 10 * number, ranks[level][number])
        for level in range(DEPTH)
        for number, rung in enumerate(("lateral", "vertical"))
        if ranks[level][number]
    }
    tensors = {}
    for (level, rung), w in own.items():
        tensors |= named(f"restuning_default.bypass_blocks.{level}.{rung}_tuner.tuner.", w)
    factors = factors or {}

    def one(level, rung, x):
        if (level, rung) not in own:
            return x
        w = {name: tensor.double() for name, tensor in own[level, rung].items()}
        hidden = F.gelu(F.linear(x, w["ln1.weight"], w["ln1.bias"]))
        return x + factors.get(rung, 1.0) * F.linear(hidden, w["ln2.weight"], w["ln2.bias"])

    def run(root, *stems):
        b = root
        for level, stem in enumerate(stems):
            b = one(level, "lateral", stem) + one(level, "vertical", b)
        return b

    return tensors, run


@pytest.mark.parametrize("layout", ["2.4", "1.2"])
def test_res_tuning(agrees, tmp_path, layout):
    tensors, run = bypass([(4, 4)] * DEPTH)
    folder = write(
        tmp_path / "s", {"default": (BYPASS, tensors)}, named("head.", HEAD), layout=layout
    )
    delta = agrees(folder, Formula(bypass=run))
    assert sorted(delta.branches) == ["head/head", "norm/bypass"]


def test_res_tuning_of_unequal_ranks_and_identities(agrees, tmp_path):
    ranks = [(2, 0), (5, 3), (0, 7)]
    tensors, run = bypass(ranks)
    rung = {n: "identity" if n == 0 else {"res_adapter": {"adapter_length": n}} for n in range(8)}
    chosen = [{"lateral_cfg": rung[a], "vertical_cfg": rung[b]} for a, b in ranks]
    stems = [f"blocks.{n}" for n in range(DEPTH)]
    config = {**BYPASS, "tuner_cfg": chosen, "stem_modules": stems}
    folder = write(tmp_path / "s", {"default": (config, tensors)}, named("head.", HEAD))
    agrees(folder, Formula(bypass=run))


def test_factors_of_res_tuning_are_folded(agrees, tmp_path):
    channels = 1 + random(300, WIDTH, scale=0.3)
    tensors, run = bypass([(4, 3)] * DEPTH, {"lateral": channels.double(), "vertical": 0.3})
    prefix = "restuning_default.bypass_blocks."
    tensors |= {f"{prefix}{n}.lateral_tuner.tuner.scaling": channels for n in range(DEPTH)}
    weights = {"lateral": "scale_channel", "vertical": "scalar_0.3"}
    chosen = {f"{r}_cfg": {"res_adapter": {"adapter_weight": w}} for r, w in weights.items()}
    config = {**BYPASS, "tuner_cfg": chosen}
    folder = write(tmp_path / "s", {"default": (config, tensors)}, named("head.", HEAD))
    agrees(folder, Formula(bypass=run))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"tuner_cfg": {"lateral_cfg": "zero", "vertical_cfg": "res_adapter"}}, "drops the input"),
        ({"tuner_cfg": {"lateral_cfg": {"res_adapter": {"adapter_weight": "gate"}}}}, "gated by"),
        ({"tuner_cfg": {"lateral_cfg": {"res_adapter": {"adapter_weight": "novel"}}}}, "factor"),
        ({"tuner_cfg": "res_group_adapter"}, "unknown kind"),
        (
            {"tuner_cfg": {"lateral_cfg": "identity", "vertical_cfg": "res_adapter"}},
            "does not name",
        ),
        ({"use_upsample": True}, "this form of Res-Tuning"),
        ({"stem_modules_hook": "input"}, "this form of Res-Tuning"),
        ({"dims": [WIDTH] * DEPTH}, "width changes"),
        ({"root_modules": r".*blocks\.1$"}, "other places"),
        ({"stem_modules": r".*blocks\.[01]$"}, "other places"),
        ({"target_modules": r".*norm\d?$"}, "other places"),
        ({"stem_modules": r".*blocks\.(\d+$"}, "cannot be read"),
    ],
)
def test_res_tuning_that_cannot_be_carried(vit, tmp_path, config, sentence):
    tensors, _ = bypass([(4, 4)] * DEPTH)
    tuners = {"default": ({**BYPASS, **config}, tensors)}
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read("swift", write(tmp_path / "s", tuners, named("head.", HEAD)), vit)


def side_network():
    """FCN4's tensors and the mixing of its output."""
    own = {"alpha": torch.tensor(0.4)}
    strides = ((3, 16, 1, 1), (16, 16, 2, 0), (16, 32, 2, 0), (32, 64, 1, 0))
    for number, (given, taken, _, _) in enumerate(strides, start=1):
        weight = random(320 + number, taken, given, 3, 3, scale=(9 * given) ** -0.5)
        own[f"side_net.conv{number}.0.weight"] = weight
        own[f"side_net.conv{number}.1.weight"] = 1 + random(330 + number, taken, scale=0.3)
        own[f"side_net.conv{number}.1.bias"] = random(340 + number, taken, scale=0.3)
    own["side_net.fc.weight"] = random(350, WIDTH, 64, scale=0.3)
    own["side_net.fc.bias"] = random(351, WIDTH, scale=0.3)
    w = {name.removeprefix("side_net."): tensor.double() for name, tensor in own.items()}

    def mix(x, features):
        for number, (_, _, stride, padding) in enumerate(strides, start=1):
            x = F.conv2d(x, w[f"conv{number}.0.weight"], stride=stride, padding=padding)
            x = F.group_norm(x, 2, w[f"conv{number}.1.weight"], w[f"conv{number}.1.bias"])
            x = torch.relu(x)
        x = F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])
        share = torch.sigmoid(w["alpha"])
        return share * features + (1 - share) * x

    return own, mix


def test_side_networks_stand_behind_the_backbone(agrees, headless, tmp_path):
    own, mix = side_network()
    tensors = named("model.backbone.side_default.", own)
    folder = write(tmp_path / "s", {"default": (SIDE, tensors)}, named("model.head.fc.", HEAD))
    delta = agrees(folder, Formula(side=mix), backbone=headless)
    assert delta.preprocessing.interpolation == "bilinear", "the keys are of modelscope's model"


def test_side_networks_that_cannot_be_carried(vit, headless, host, tmp_path):
    own, _ = side_network()
    tuners = {"default": (SIDE, named("side_default.", own))}
    on_logits = write(tmp_path / "logits", tuners, named("head.", HEAD))
    with pytest.raises(IncompatibleArtefact, match="something else than the backbone's features"):
        read("swift", on_logits, vit)
    inside = {"default": (SIDE, named("norm.side_default.", own))}
    with pytest.raises(IncompatibleArtefact, match="something else than the backbone's features"):
        read("swift", write(tmp_path / "inside", inside, named("head.", HEAD)), headless)
    deit = host("deit", double=False)
    arguments = {**deit.identity.arguments, "num_classes": 0}
    two = create(deit.identity.architecture, arguments)
    assert two.classifiers == ("head", "head_dist")
    folder = write(
        tmp_path / "two",
        {"default": (SIDE, named("model.backbone.side_default.", own))},
        named("model.head.fc.", HEAD),
    )
    with pytest.raises(IncompatibleArtefact, match="only one of the classifiers") as caught:
        read("swift", folder, two)
    assert "head, head_dist" in str(caught.value)
    mlp = {"default": ({**SIDE, "side_module_name": "mlp"}, {"side_default.alpha": torch.ones(())})}
    with pytest.raises(IncompatibleArtefact, match="this side network"):
        read("swift", write(tmp_path / "mlp", mlp, named("head.", HEAD)), headless)


def test_several_tuners_in_one_folder(agrees, tmp_path):
    first, behind = adapters("one")
    pairs = lora(LAYERS[:1])
    prompts = {n: random(130 + n, 3, WIDTH, scale=0.8) for n in range(DEPTH)}
    tokens = {f"blocks.{n}.prompt_three.prompt_token": t[None] for n, t in prompts.items()}
    bias = {"blocks.0.mlp.adapter_one.linear1.bias": first["blocks.0.mlp.adapter_one.linear1.bias"]}
    tuners = {
        "one": (ADAPTER, first),
        "two": (LORA, in_24(pairs, "two") | bias),  # `bias="all"` saves other tuners' biases too
        "three": (PROMPT, tokens),
    }
    folder = write(tmp_path / "s", tuners, named("head.", HEAD))
    formula = Formula({LAYERS[0]: change(pairs[LAYERS[0]], 3.0)}, behind, prompts)
    agrees(folder, formula)
    agrees(folder, formula, {"order": "three, one, two"})


def test_two_tuners_on_one_module_need_their_order(agrees, vit, tmp_path):
    first, one = adapters("one")
    second, two = adapters("two", seed=400)
    folder = write(
        tmp_path / "s", {"one": (ADAPTER, first), "two": (ADAPTER, second)}, named("head.", HEAD)
    )
    with pytest.raises(IncompatibleArtefact, match=r"one, two on blocks\.0\.mlp"):
        read("swift", folder, vit)
    with pytest.raises(UsageError, match="does not name each tuner once"):
        read("swift", folder, vit, {"order": "one"})
    agrees(folder, Formula(behind={m: one[m] + two[m] for m in one}), {"order": "one,two"})
    agrees(folder, Formula(behind={m: two[m] + one[m] for m in one}), {"order": "two,one"})


def test_two_lora_on_one_layer_add_up(agrees, tmp_path):
    first, second = lora(LAYERS[:1]), lora(LAYERS[:1], seed=420)
    tuners = {"a": (LORA, in_24(first, "a")), "ab": (LORA, in_24(second, "ab"))}
    folder = write(tmp_path / "s", tuners, named("head.", HEAD))
    both = change(first[LAYERS[0]], 3.0) + change(second[LAYERS[0]], 3.0)
    agrees(folder, Formula(beside={LAYERS[0]: both}))


def test_a_tuner_never_reads_the_tensors_of_another(vit, tmp_path):
    """The file of a tuner named `a` holds all LoRA of `attn` too, for its name is in theirs."""
    pairs = in_24(lora(LAYERS[:1]), "ab")
    tuners = {"a": ({**LORA, "lora_alpha": 1}, pairs), "ab": (LORA, pairs)}
    folder = write(tmp_path / "s", tuners, named("head.", HEAD))
    with pytest.raises(IncompatibleArtefact, match="LORA a: no such tensors"):
        read("swift", folder, vit)


def test_tuners_that_replace_each_other_are_refused(vit, tmp_path):
    tokens = {n: {f"blocks.0.prompt_{n}.prompt_token": torch.ones(1, 2, WIDTH)} for n in "ab"}
    tuners = {n: (PROMPT, tokens[n]) for n in "ab"}
    with pytest.raises(IncompatibleArtefact, match="two PROMPT tuners"):
        read("swift", write(tmp_path / "s", tuners, named("head.", HEAD)), vit)
    tensors, _ = bypass([(4, 4)] * DEPTH)
    tuners = {"a": (PROMPT, tokens["a"]), "default": (BYPASS, tensors)}
    with pytest.raises(IncompatibleArtefact, match="a bypass cannot add them"):
        read("swift", write(tmp_path / "t", tuners, named("head.", HEAD)), vit)


def test_without_a_head_the_backbone_s_own_serves(agrees, vit, tmp_path):
    tensors, behind = adapters()
    folder = write(tmp_path / "s", {"default": (ADAPTER, tensors)})
    own = {part: vit.model.state_dict()[f"head.{part}"] for part in ("weight", "bias")}
    delta = agrees(folder, Formula(behind=behind, head=own))
    assert delta.provenance["head"] == "the backbone's own"


@pytest.mark.parametrize("prefix", ["head.fc.", "head.", "fc.", "", "model.head.fc."])
def test_a_head_of_its_own_file(agrees, headless, vit, tmp_path, prefix):
    tensors, behind = adapters(prefix="model.backbone.")
    folder = write(tmp_path / "s", {"default": (ADAPTER, tensors)})
    with pytest.raises(IncompatibleArtefact, match="--set head=FILE"):
        read("swift", folder, headless)
    save_file(named(prefix, HEAD), tmp_path / "head.safetensors")
    for backbone in (headless, vit):
        agrees(
            folder, Formula(behind=behind), {"head": str(tmp_path / "head.safetensors")}, backbone
        )
    save_file({"other": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(IncompatibleArtefact, match="no classifier"):
        read("swift", folder, headless, {"head": str(tmp_path / "head.safetensors")})


def test_a_head_behind_the_backbone_s_classifier(agrees, vit, tmp_path):
    """modelscope's model applies both; which one is met shows in the channels."""
    tensors, behind = adapters(prefix="model.backbone.")
    inner = {part: vit.model.state_dict()[f"head.{part}"].double() for part in ("weight", "bias")}
    outer = {"weight": random(430, CLASSES, 7), "bias": random(431, CLASSES)}
    product = {
        "weight": outer["weight"].double() @ inner["weight"],
        "bias": outer["weight"].double() @ inner["bias"] + outer["bias"].double(),
    }
    for name, extra in (
        ("frozen", named("model.head.fc.", outer)),
        ("tuned", named("model.head.fc.", outer) | named("model.backbone.head.", inner)),
    ):
        folder = write(tmp_path / name, {"default": (ADAPTER, tensors)}, extra)
        agrees(folder, Formula(behind=behind, head=product))
    folder = write(
        tmp_path / "features", {"default": (ADAPTER, tensors)}, named("model.head.fc.", HEAD)
    )
    agrees(folder, Formula(behind=behind))


def test_tuners_on_the_classifier_fold_or_are_refused(agrees, vit, tmp_path):
    a, b = random(440, 2, WIDTH), random(441, CLASSES, 2)
    tuners = {"default": (LORA, in_24({"head": (a, b)}))}
    folder = write(
        tmp_path / "s",
        tuners,
        {"head.base_layer.weight": HEAD["weight"], "head.bias": HEAD["bias"]},
    )
    weight = HEAD["weight"].double() + change((a, b), 3.0)
    agrees(folder, Formula(head={"weight": weight, "bias": HEAD["bias"]}))
    tensors = named("head.adapter_default.", {
        "linear1.weight": torch.ones(2, CLASSES), "linear1.bias": torch.ones(2),
        "linear2.weight": torch.ones(CLASSES, 2), "linear2.bias": torch.ones(CLASSES),
    })  # fmt: skip
    folder = write(tmp_path / "t", {"default": (ADAPTER, tensors)}, named("head.", HEAD))
    with pytest.raises(IncompatibleArtefact, match="a tuner on the classifier"):
        read("swift", folder, vit)


def test_the_folder_or_the_file_of_one_tuner(agrees, tmp_path):
    tensors, behind = adapters()
    folder = write(tmp_path / "s", {"default": (ADAPTER, tensors)}, named("head.", HEAD))
    (folder / "default").rename(folder / "renamed")
    settings = {"head": str(folder / "extra_states" / "adapter_model.bin")}
    for path in (folder / "renamed", folder / "renamed" / "adapter_model.bin"):
        agrees(path, Formula(behind=behind), settings)
    agrees(folder, Formula(behind=behind))


def test_what_is_of_peft_is_sent_there(vit, tmp_path):
    config = {name: value for name, value in LORA.items() if name != "swift_type"}
    for name, folder in (("root", tmp_path / "root"), ("inner", tmp_path / "inner" / "default")):
        save(folder, named("base_model.model.", in_24(lora(LAYERS))))
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(IncompatibleArtefact, match="--from peft"):
            read("swift", tmp_path / name, vit)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({**ADAPTER, "hidden_pos": 1}, "hidden_pos=1"),
        ({**ADAPTER, "hidden_pos": "hidden_states"}, "hidden_pos='hidden_states'"),
        ({**ADAPTER, "method_name": "feed_forward_chunk"}, "method_name"),
        ({**ADAPTER, "act_layer": "mish"}, "act_layer='mish'"),
        ({**LORA, "use_dora": True}, "use_dora=True"),
        ({**LORA, "use_qa_lora": True}, "use_qa_lora=True"),
        ({**LORA, "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({**LORA, "r": 3}, "does not fit its tensors"),
        ({**LORA, "lora_alpha": None}, "does not fit its tensors"),
        ({**LORA, "use_merged_linear": True}, "enable_lora=None"),
        ({"swift_type": "SCETUNING"}, "this kind of ms-swift tuner"),
        ({"other": 1}, "without swift_type"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(vit, tmp_path, config, sentence):
    tensors = adapters()[0] if "hidden_pos" in config else in_24(lora(LAYERS))
    folder = write(tmp_path / "s", {"default": (config, tensors)}, named("head.", HEAD))
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read("swift", folder, vit)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"head.weight": HEAD["weight"], "unknown.weight": torch.ones(1)}, "unknown.weight"),
        ({"norm.bias": torch.ones(WIDTH + 1)}, "not the backbone's"),
        ({"head.weight": torch.ones(WIDTH)}, "not one linear layer"),
        ({"model.backbone.blocks.0.mlp.adapter_default.linear1.bias": torch.ones(3)}, "unlike"),
    ],
)
def test_tensors_of_no_tuner_or_of_another_shape(vit, tmp_path, extra, sentence):
    folder = write(tmp_path / "s", {"default": (ADAPTER, adapters()[0])}, extra)
    with pytest.raises(IncompatibleArtefact, match=sentence):
        read("swift", folder, vit)


def test_tuners_that_are_not_whole_or_nowhere(vit, tmp_path):
    tensors = adapters()[0]
    partial = {k: v for k, v in tensors.items() if k != "blocks.1.mlp.adapter_default.linear2.bias"}
    with pytest.raises(IncompatibleArtefact, match="not whole"):
        read("swift", write(tmp_path / "a", {"default": (ADAPTER, partial)}), vit)
    beyond = named("blocks.9.mlp.adapter_default.", adapter(1))
    with pytest.raises(IncompatibleArtefact, match="no such module"):
        read("swift", write(tmp_path / "b", {"default": (ADAPTER, beyond)}), vit)
    with pytest.raises(IncompatibleArtefact, match="does not hold its tensors"):
        read("swift", write(tmp_path / "c", {"default": (ADAPTER, {})}), vit)
    two = tensors | named("blocks.0.mlp.adapter_other.", adapter(1))
    with pytest.raises(IncompatibleArtefact, match="default, other"):
        read("swift", write(tmp_path / "d", {"third": (ADAPTER, two)}), vit)


def test_missing_malformed_and_unknown(vit, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        read("swift", tmp_path / "none", vit)
    with pytest.raises(UsageError, match="no ms-swift tuner"):
        read("swift", tmp_path, vit)
    torch.save(adapters()[0], tmp_path / "single.bin")
    with pytest.raises(IncompatibleArtefact, match="a single file does not say"):
        read("swift", tmp_path / "single.bin", vit)
    folder = write(tmp_path / "s", {"default": (ADAPTER, adapters()[0])}, named("head.", HEAD))
    with pytest.raises(UsageError, match="means nothing"):
        read("swift", folder, vit, {"lora_alpha": "8"})
    (folder / "default" / "adapter_config.json").write_text("{")
    with pytest.raises(IncompatibleArtefact, match="configuration is malformed"):
        read("swift", folder, vit)
    (folder / "default" / "adapter_config.json").unlink()
    with pytest.raises(IncompatibleArtefact, match="does not say what tuner"):
        read("swift", folder, vit)


class Exploit:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_code_in_a_file_is_never_run(vit, tmp_path, capsys):
    folder = write(tmp_path / "s", {"default": (ADAPTER, {"a": Exploit()})})
    for path in (folder, folder / "default", folder / "default" / "adapter_model.bin"):
        with pytest.raises(IncompatibleArtefact, match="would run code"):
            read("swift", path, vit)
    torch.save(Exploit(), tmp_path / "checkpoint.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(IncompatibleArtefact, match="would run code"):
        read("swift", tmp_path / "checkpoint.pth", vit)
    with pytest.raises(IncompatibleArtefact, match="no state dict"):
        read("swift", tmp_path / "list.pth", vit)
    assert "never run" not in capsys.readouterr().out


PLACE = f"{LAYERS[0]}.lora_A.default.weight", f"{LAYERS[0]}.lora_B.default.weight"


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({**ADAPTER, "act_layer": ["gelu"]}, {}),
        (PROMPT, {"blocks.0.prompt_default.prompt_token": torch.zeros(0, 4, WIDTH)}),
        (LORA, {PLACE[0]: torch.zeros(()), PLACE[1]: torch.zeros(144, 2)}),
        (LORA, {PLACE[0]: torch.zeros(2, WIDTH), PLACE[1]: torch.zeros(144)}),
    ],
    ids=["activation", "prompt", "A", "B"],
)
def test_shapes_and_values_of_another_kind(config, tensors, vit, tmp_path):
    tuners = {"default": (config, tensors or adapters()[0])}
    folder = write(tmp_path / "s", tuners, named("head.", HEAD))
    with pytest.raises(IncompatibleArtefact) as caught:
        read("swift", folder, vit)
    assert str(folder) in caught.value.details["where"]
