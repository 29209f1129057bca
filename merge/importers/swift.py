"""ms-swift's folders of vision tuners: adapter, LoRA, prompts, Res-Tuning-Bypass, side networks.

`save_pretrained` writes one folder per tuner, NAME/adapter_config.json with a `swift_type` beside
NAME/adapter_model.bin or .safetensors, and what was trained besides, the head as a rule, in `extra_states`
(2.x) or in the folder itself (1.x). Keys are those of the wrapped model. Nothing says in which order tuners
were put on a module. Checked against ms-swift 1.2.0 and 2.4 (github.com/modelscope/ms-swift).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..backbone.transformers.config import CALLED
from ..differences import carry, subtract
from ..errors import UsageError
from ..sites import blocks
from ..tuner import Branch, Point
from ..tuners.bottleneck import Bottleneck
from ..tuners.prompt import Prompt
from .foreign import Foreign, other_backbone, refuse
from .prompts import plant_prompts
from .res_tuning import plant_bypass
from .side_tuning import plant_side_network
from .swift_files import (
    PEFT,
    TENSORS,
    Adapter,
    Reading,
    config_of,
    few,
    named,
    of_peft,
    open_folder,
    require,
    require_whole,
    spread,
    state_dict,
)
from .swift_heads import plant_heads, reads_logits
from .swift_lora import IN_LORA, plant_lora, read_lora, require_matrices, ungrouped
from .trunk import trunk_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..backbone import Backbone
    from .settings import Settings

ACTIVATIONS = {
    **CALLED,
    "gelu_python": "gelu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "identity",
}
LINEARS = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
IN_ADAPTER = r"(?P<module>.+)\.adapter_(?P<name>[^.]+)\.(?P<part>linear[12]\.(?:weight|bias))"
IN_PROMPT = r"(?P<module>.+)\.prompt_(?P<name>[^.]+)\.(?P<part>prompt_token)"
IN_BYPASS = r"(?P<module>)restuning_(?P<name>[^.]+)\.bypass_blocks\.(?P<part>.+)"
IN_SIDE = r"(?:(?P<module>.+)\.)?side_(?P<name>[^.]+)\.(?P<part>alpha|side_net\..+)"
ALONE = {
    "PROMPT": "replace each other's tokens, in an order that is not in the files",
    "RESTUNING": "replace each other's answer, in an order that is not in the files",
    "SIDE": "mix each other's answer, in an order that is not in the files",
}


def read_swift(path: Path, backbone: Backbone, settings: Settings) -> Foreign:
    """Branches of an ms-swift folder, or of a flat state dict with the LoRA of MergedLinear.

    Settings: `order`, names of tuners divided by commas, where two stand on one module; `head`, a file
    with `weight` and `bias`, where the files have no classifier; of a flat state dict `lora_alpha`, and
    `enable_lora` as true and false divided by commas.

    Raises:
        UsageError: There is no such folder or no tuner in it, or a setting is missing or unreadable.
        IncompatibleArtefact: A file is unsafe or malformed, of PEFT, or of another backbone; a tuner or a
            form of one cannot be carried, is not whole, or its order among others is not known.
    """
    path = Path(path)
    if path.is_file() and path.name in TENSORS and "swift_type" in config_of(path.parent):
        path = path.parent
    reading = Reading(path, backbone)
    if path.is_file():
        _read_flat(reading, settings)
    else:
        open_folder(reading)
        _sort(reading, settings)
        _read_saved(reading)
        for adapter in reading.adapters:
            READERS[adapter.kind](reading, adapter)
        _require_order(reading, settings)
    classifier = {n for n in reading.tensors if backbone.is_classifier(n)}
    if left := sorted(set(reading.tensors) - classifier):
        raise refuse(
            path,
            "the files hold tensors of no known tuner",
            found=few(left),
            do="load the backbone that it was trained on; tuners are read with their configuration",
        )
    plant_heads(reading, settings)
    reading.found.source = f"ms-swift {' '.join(a.kind for a in reading.adapters)}".rstrip()
    reading.found.notes |= {name: str(value) for name, value in settings.found.items()}
    return reading.found


def _sort(reading: Reading, settings: Settings) -> None:
    """The tuners in the order that a person gave, by name otherwise.

    Raises:
        UsageError: The order does not name each of them once.
        IncompatibleArtefact: Tuners that cannot be together.
    """
    adapters = {adapter.name: adapter for adapter in reading.adapters}
    if len(adapters) > 1 and (order := settings.get("order", str)) is not None:
        names = [name.strip() for name in order.split(",")]
        if sorted(names) != sorted(adapters):
            raise UsageError(
                "the order does not name each tuner once",
                where=reading.path,
                wanted=", ".join(sorted(adapters)),
                found=order,
            )
        reading.adapters = [adapters[name] for name in names]
    kinds = [adapter.kind for adapter in reading.adapters]
    for kind, reason in ALONE.items():
        if kinds.count(kind) > 1:
            names = ", ".join(a.name for a in reading.adapters if a.kind == kind)
            raise refuse(reading.path, f"two {kind} tuners {reason}", found=names)
    if {"PROMPT", "RESTUNING"} <= set(kinds):
        raise refuse(
            reading.path,
            "prompts are in what the blocks give and not in what the first one is given, so that a bypass "
            "cannot add them",
            found="PROMPT and RESTUNING together",
        )


def _require_order(reading: Reading, settings: Settings) -> None:
    """Raise where two tuners meet in an order that is not known.

    Only the sum of several LoRA is the same in any order.

    Raises:
        IncompatibleArtefact: They do.
    """
    if len(reading.adapters) < 2 or settings.get("order", str) is not None:
        return
    kinds = {adapter.name: adapter.kind for adapter in reading.adapters}
    at: dict[Point, set[str]] = {}
    for name, owner in reading.owners.items():
        at.setdefault(reading.found.branches[name].add, set()).add(owner)
    for point, names in at.items():
        if len(names) > 1 and {kinds[name] for name in names} != {"LORA"}:
            raise refuse(
                reading.path,
                "several tuners stand on one module, and their order is not in the files",
                found=f"{', '.join(sorted(names))} on {point.module}",
                do=f"say in which order they were prepared: --set order={','.join(sorted(kinds))}",
            )


def _read_saved(reading: Reading) -> None:
    """What was trained and saved besides: biases, and whole modules.

    Raises:
        IncompatibleArtefact: A tensor has another shape than the backbone's.
    """
    backbone = reading.backbone
    frozen = backbone.model.state_dict()
    frozen = {n: t for n, t in frozen.items() if n in reading.tensors}
    frozen = {n: t for n, t in frozen.items() if not backbone.is_classifier(n)}
    own = {name: reading.tensors.pop(name) for name in frozen}
    if strange := [name for name in frozen if own[name].shape != frozen[name].shape]:
        raise other_backbone(reading.path, backbone, strange)
    _plant_changes(reading, subtract(frozen, own))


def _plant_changes(reading: Reading, changes: Mapping[str, Tensor]) -> None:
    """Branches of tuned parameters, in front of all others, so that a tuner on the same op reads them."""
    if not changes:
        return
    reading.found.plant_changes(carry(reading.backbone, changes))
    reading.found.notes["tuned besides"] = few(list(changes))


def _read_adapter(reading: Reading, adapter: Adapter) -> None:
    """`x + up(act(down(x)))` on what a module gives, in front of a LayerScale behind it.

    Raises:
        IncompatibleArtefact: It stands elsewhere, or its activation is unknown.
    """
    require(reading, adapter, hidden_pos=(0, None), method_name=("forward", None))
    activation = adapter.config.get("act_layer", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise refuse(
            reading.path,
            "the activation of an adapter cannot be carried",
            found=f"act_layer={activation!r} of {adapter.name}",
            do=f"wanted: one of {', '.join(ACTIVATIONS)}",
        )
    for module, parts in reading.take(adapter, IN_ADAPTER).items():
        require_whole(reading, f"{module}.adapter_{adapter.name}", parts, LINEARS)
        reading.module(module)
        weights = dict(
            zip(("down", "down_bias", "up", "up_bias"), map(parts.get, LINEARS), strict=True)
        )
        point = Point(module, "output")
        branch = Branch(Bottleneck(ACTIVATIONS[activation], bias=True), point, point)
        tensors = {name: tensor for name, tensor in weights.items() if tensor is not None}
        reading.plant(adapter, "adapter", branch, {**tensors, "scale": torch.ones(())})


def _read_prompt(reading: Reading, adapter: Adapter) -> None:
    """Prompts behind the sequence, replaced block by block; or anywhere, of the first block alone.

    Raises:
        IncompatibleArtefact: They stand in front and stay, or later ones drop image tokens.
    """
    require(reading, adapter, embedding_pos=(0,), attention_mask_pos=(None, 0, ""))
    places = blocks(reading.backbone.model)
    prompts: dict[int, Tensor] = {}
    for module, parts in reading.take(adapter, IN_PROMPT).items():
        token = parts["prompt_token"]
        number = places.index(module) if module in places else -1
        if module.rpartition(".")[2] != str(number) or token.dim() != 3 or len(token) != 1:
            raise refuse(
                reading.path,
                "prompts stand at another place than a block of one sequence",
                found=f"{module}, tokens of shape {list(token.shape)}",
            )
        prompts[number] = token[0]
    front = bool(adapter.config.get("attach_front", True))
    if adapter.config.get("extract_embedding"):
        if set(prompts) != {0}:
            raise refuse(
                reading.path,
                "prompts that are taken out behind every block cannot be carried: those of a later block "
                "overwrite tokens of the image, or the class token, and these are then dropped",
                found=f"extract_embedding=True of {adapter.name}, attach_front={front}",
                do="wanted: prompts that were trained with extract_embedding=False",
            )
        point = Point(places[0], "tokens")  # where among the tokens they stand makes no difference
        reading.plant(adapter, "prompt", Branch(Prompt(), point, point), {"token": prompts[0]})
    elif front:
        raise refuse(
            reading.path,
            "prompts in front of the sequence cannot be carried: the class token is no longer the first, "
            "so that the classifier reads a prompt",
            found=f"attach_front=True of {adapter.name}",
            do="wanted: prompts that were trained with attach_front=False",
        )
    else:
        plant_prompts(reading.path, reading.backbone, prompts, places, reading.found)


def _read_bypass(reading: Reading, adapter: Adapter) -> None:
    (tensors,) = reading.take(adapter, IN_BYPASS).values()
    plant_bypass(reading.path, reading.backbone, adapter.config, tensors, reading.found)


def _read_side(reading: Reading, adapter: Adapter) -> None:
    """A network on the image, mixed with the features that the backbone gives.

    Raises:
        IncompatibleArtefact: It is of another kind, or mixed with something else.
    """
    name = str(adapter.config.get("side_module_name", "fcn4"))
    if name.lower() not in ("fcn4", "alexnet"):
        raise refuse(
            reading.path, "this side network cannot be carried", found=f"side_module_name={name!r}",
            do="wanted: fcn4 or alexnet",
        )  # fmt: skip
    require(reading, adapter, source_hidden_pos=(0,))
    taken = reading.take(adapter, IN_SIDE)
    classifier = reading.backbone.classifiers[0]
    own = f"{classifier}.weight" in reading.tensors
    layer = reading.module(classifier)
    if isinstance(layer, nn.Linear):
        own = own or not reading.outer or reads_logits(reading, layer, reading.outer)
    if list(taken) != [""] or own:
        raise refuse(
            reading.path,
            "the side network is mixed with something else than the backbone's features",
            found=f"the output of {', '.join(filter(None, taken)) or 'a backbone that ends in a classifier'}",
            do="wanted: target_modules that name a backbone without classifier",
        )
    side = {part.replace("side_net.", "side.", 1): tensor for part, tensor in taken[""].items()}
    plant_side_network(reading.path, reading.backbone, side, reading.found, pooled=classifier)


READERS: dict[str, Callable[[Reading, Adapter], None]] = {
    "ADAPTER": _read_adapter,
    "LORA": read_lora,
    "PROMPT": _read_prompt,
    "RESTUNING": _read_bypass,
    "SIDE": _read_side,
}


def _read_flat(reading: Reading, settings: Settings) -> None:
    """A whole state dict with the LoRA of MergedLinear, which 2.x saves nowhere else.

    Raises:
        UsageError: A setting is missing or unreadable.
        IncompatibleArtefact: The file holds no such tensors, or is of another backbone.
    """
    path = reading.path
    flat = state_dict(path)
    if any(key.startswith(PEFT) for key in flat):
        raise of_peft(path)
    spread(reading, flat)
    met = {key: m for key in reading.tensors if (m := re.fullmatch(IN_LORA, key))}
    if not met or any(named(match) for match in met.values()):
        raise refuse(
            path,
            "a single file does not say what tuners its tensors are",
            found=few(list(flat)) or "no tensors",
            do="give the folder that save_pretrained wrote; of single files only whole state dicts with the "
            "LoRA of MergedLinear can be read",
        )
    alpha = settings.need(
        "lora_alpha", float, hint="lora_alpha of its LoRAConfig (the default of ms-swift 2.x is 8)"
    )
    text = settings.need(
        "enable_lora", str, hint="enable_lora of its LoRAConfig, such as true,false,true"
    )
    words = text.strip("[] ").lower().replace(" ", "").split(",")
    if not set(words) <= {"true", "false"}:
        raise UsageError(
            "the setting enable_lora cannot be read", wanted="true and false", found=text
        )
    adapter = Adapter("default", "LORA", {}, frozenset(met))
    reading.adapters.append(adapter)
    layers = reading.take(adapter, IN_LORA)
    changes = trunk_changes(path, reading.backbone, reading.tensors, reading.found, tuned=".bias")
    if strange := [name for name in changes if not name.endswith(".bias")]:
        raise other_backbone(path, reading.backbone, strange)
    _plant_changes(reading, {n: own.double() - kept.double() for n, (own, kept) in changes.items()})
    for name in reading.backbone.model.state_dict():
        if not reading.backbone.is_classifier(name):
            reading.tensors.pop(name, None)
    for module, parts in layers.items():
        require_whole(reading, f"{module}.lora", parts, ("A", "B"))
        require_matrices(path, module, parts)
        enabled = [word == "true" for word in words]
        down, up = ungrouped(path, module, parts["A"], parts["B"], enabled)
        plant_lora(reading, adapter, module, down, up, alpha / parts["B"].shape[1])
