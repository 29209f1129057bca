"""The files of an ms-swift folder: its tuners, their tensors, and who has read which of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..errors import IncompatibleArtefact, UsageError
from ..preprocessing import Preprocessing
from ..tensor_files import read_saved
from .foreign import Foreign, bare_name, named_module, refuse
from .modelscope import CROP

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..backbone import Backbone
    from ..tuner import Branch

CONFIG = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there, as it does
EXTRA = "extra_states"
PEFT = "base_model.model."
WRAPPERS = ("module.", "base_model.", "model.")  # of distributed training, of itself, of a trainer
KINDS = ("ADAPTER", "LORA", "PROMPT", "RESTUNING", "SIDE")
MODELSCOPE = ("model.backbone.", "model.head.")  # its vision_efficient_tuning, and so its pipeline
HEADS = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias")  # behind a backbone
NOT_SAVED = (
    "ms-swift 2.x does not save the LoRA tensors of MergedLinear: they are not in this folder"
)
FLAT = (
    "save the whole model's state dict and import that file, with --set lora_alpha=NUMBER "
    "--set enable_lora=true,false,true"
)


@dataclass
class Adapter:
    """One tuner.

    Attributes:
        name: Of its folder; its keys carry it.
        kind: Its `swift_type`.
        config: Its settings.
        keys: Of the tensors in its own file.
    """

    name: str
    kind: str
    config: dict[str, Any]
    keys: frozenset[str] = frozenset()


@dataclass
class Reading:
    """What is left to read, and what was found.

    Attributes:
        path: The file or folder, for messages.
        backbone: The frozen backbone.
        found: The branches so far.
        tensors: Tensors that nobody has read yet, by their names in the backbone.
        outer: A classifier behind the backbone: `weight` and `bias`.
        adapters: The tuners, in the order in which they join.
        owners: Which of them planted a branch.
    """

    path: Path
    backbone: Backbone
    found: Foreign = field(default_factory=lambda: Foreign("ms-swift"))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    outer: dict[str, Tensor] = field(default_factory=dict)
    adapters: list[Adapter] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)

    def module(self, path: str) -> nn.Module:
        """A module of the backbone; see `named_module`."""
        return named_module(self.path, self.backbone, path)

    def plant(
        self, adapter: Adapter, label: str, branch: Branch, tensors: dict[str, Tensor]
    ) -> None:
        """Add a branch at a module, by the tuner's name too where there are several."""
        label = label if len(self.adapters) <= 1 else f"{label}.{adapter.name}"
        name = f"{branch.add.module}/{label}"
        self.owners[name] = adapter.name
        self.found.plant(name, branch, tensors)

    def take(self, adapter: Adapter, pattern: str) -> dict[str, dict[str, Tensor]]:
        """The tuner's tensors by module and part; they count as read.

        Raises:
            IncompatibleArtefact: It has none, or its keys carry several names.
        """
        met = {key: m for key in self.tensors if (m := re.fullmatch(pattern, key))}
        own = {named(m) for key, m in met.items() if key in adapter.keys}
        merged = bool(adapter.config.get("use_merged_linear"))
        name: str | None = adapter.name
        if len(own) == 1 and len(self.adapters) == 1:
            (name,) = own  # its folder was renamed
        elif merged and None in own:
            name = None
        taken: dict[str, dict[str, Tensor]] = {}
        for key, match in met.items():
            if named(match) == name:
                module = taken.setdefault(match["module"] or "", {})
                module[match["part"]] = self.tensors.pop(key)
        if not taken:
            raise refuse(
                self.path,
                NOT_SAVED if merged else "the folder of a tuner does not hold its tensors",
                found=f"{adapter.kind} {adapter.name}: no such tensors"
                if len(own) < 2
                else f"{adapter.kind} {adapter.name}: tensors named {', '.join(sorted(map(str, own)))}",
                do=FLAT if merged else "save it again with save_pretrained",
            )
        return taken


def named(match: re.Match[str]) -> str | None:
    """The tuner's name in a key; MergedLinear's keys have none."""
    groups = match.groupdict()
    return groups["name"] or groups.get("old")


def open_folder(reading: Reading) -> None:
    """All tuners and tensors of a folder.

    Raises:
        UsageError: There is no such folder, or no tuner in it.
        IncompatibleArtefact: A file is malformed or unsafe, or a folder is of PEFT.
    """
    path = reading.path
    if not path.is_dir():
        raise UsageError(
            "there is no such folder", where=path, wanted="a folder that ms-swift wrote"
        )
    root = config_of(path)
    flat: dict[str, Tensor] = {}
    files: list[tuple[Adapter | None, dict[str, Tensor]]] = []
    if "swift_type" in root:
        files.append((_adapter_of(path, root), _read(path)))
    else:
        _require_swift(path, root)
        for folder in sorted(f for f in path.iterdir() if f.is_dir() and f.name != EXTRA):
            if (config := config_of(folder)) or any((folder / name).is_file() for name in TENSORS):
                _require_swift(folder, config, needed=True)
                files.append((_adapter_of(folder, config), _read(folder)))
        files += [(None, _read(path)), (None, _read(path / EXTRA))]
    for adapter, tensors in files:
        if any(key.startswith(PEFT) for key in tensors):
            raise of_peft(path)
        if adapter is not None:
            named = {renamed(unwrapped(key)[0]) for key in tensors}
            adapter.keys = frozenset(name for name in named if name)
            reading.adapters.append(adapter)
        for key, tensor in tensors.items():
            if key in flat and not torch.equal(flat[key], tensor):
                raise refuse(path, "two files hold a tensor of one name, unlike", found=key)
            flat[key] = tensor
    if not reading.adapters:
        raise UsageError(
            "there is no ms-swift tuner",
            where=path,
            wanted=f"a folder with NAME/{CONFIG}, as save_pretrained writes it",
        )
    spread(reading, flat)


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration in a folder; empty if there is none."""
    file = folder / CONFIG
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as cause:
        raise refuse(file, "the configuration is malformed", found=repr(cause)) from cause


def _require_swift(folder: Path, config: Mapping[str, Any], *, needed: bool = False) -> None:
    """Raise unless a configuration is of ms-swift, where there is one."""
    if "swift_type" in config:
        return
    if "peft_type" in config:
        raise of_peft(folder)
    if needed:
        raise refuse(
            folder, "a folder of tensors does not say what tuner they are",
            found=f"{CONFIG} without swift_type" if config else f"no {CONFIG}",
        )  # fmt: skip


def of_peft(path: Path) -> IncompatibleArtefact:
    """The error of an adapter that another reader reads."""
    return refuse(
        path,
        "this is an adapter in PEFT's format",
        found=f"peft_type in {CONFIG}, or keys {PEFT}*",
        do="import it with --from peft",
    )


def _adapter_of(folder: Path, config: dict[str, Any]) -> Adapter:
    """A tuner without its tensors.

    Raises:
        IncompatibleArtefact: It is of a kind that cannot be carried.
    """
    kind = str(config["swift_type"])
    if kind not in KINDS:
        raise refuse(
            folder, "this kind of ms-swift tuner cannot be carried", found=f"swift_type {kind}",
            do=f"wanted: one of {', '.join(KINDS)}",
        )  # fmt: skip
    return Adapter(folder.resolve().name, kind, config)


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder; none if it has no file of them."""
    for file in (folder / name for name in TENSORS):
        if file.is_file():
            return state_dict(file)
    return {}


def state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        UsageError: There is no such file.
        IncompatibleArtefact: It is malformed, unsafe, or no state dict.
    """
    saved = read_saved(file)
    saved = saved.get("state_dict", saved) if isinstance(saved, dict) else saved
    if not isinstance(saved, dict) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise refuse(file, "the file is no state dict", found=type(saved).__name__)
    return {str(key): tensor for key, tensor in saved.items()}


def unwrapped(key: str) -> tuple[str, bool]:
    """A key without the models around the backbone, and whether it was in a `backbone` of theirs."""
    key = bare_name(key, WRAPPERS)
    return key.removeprefix("backbone."), key.startswith("backbone.")


def renamed(name: str) -> str | None:
    """A name without what LoRA and `modules_to_save` wrap; None for a frozen copy that does not run."""
    if ".original_module." in name:
        return None
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name.replace(".base_layer.", "."))


def spread(reading: Reading, flat: Mapping[str, Tensor]) -> None:
    """Tensors by their names in the backbone, and the classifier behind it.

    Raises:
        IncompatibleArtefact: One is there twice, unlike.
    """
    inside = any(unwrapped(key)[1] for key in flat)
    own = {f"{path}.{part}" for path in reading.backbone.classifiers for part in ("weight", "bias")}
    for key, tensor in flat.items():
        short, within = unwrapped(key)
        name = renamed(short)
        if name is None:
            continue
        outer = not within and name in HEADS and (inside or name not in own)
        place = reading.outer if outer else reading.tensors
        name = name.removeprefix("head.").removeprefix("fc.") if outer else name
        if name in place and not torch.equal(place[name], tensor):
            raise refuse(reading.path, "the files hold a tensor twice, unlike", found=key)
        place[name] = tensor
    if any(key.removeprefix("module.").startswith(MODELSCOPE) for key in flat):
        reading.found.preprocessing = Preprocessing(
            reading.backbone.image_size,
            "bilinear",
            CROP,
            IMAGENET_DEFAULT_MEAN,
            IMAGENET_DEFAULT_STD,
        )
        reading.found.notes["preprocessing"] = "modelscope's, whose model the keys are of"


def require(reading: Reading, adapter: Adapter, **plain: tuple[Any, ...]) -> None:
    """Raise where a setting is not one of those that can be carried; one that is missing is the first."""
    for name, values in plain.items():
        value = adapter.config.get(name, values[0])
        if not any(value == one and type(value) is type(one) for one in values):
            raise refuse(
                reading.path,
                f"this form of {adapter.kind} cannot be carried",
                found=f"{name}={value!r} of {adapter.name}",
                do=f"wanted: {name}={values[0]!r}",
            )


def require_whole(
    reading: Reading, name: str, parts: Mapping[str, Tensor], wanted: Sequence[str]
) -> None:
    """Raise where one of a tuner's tensors is missing."""
    if missing := [f"{name}.{part}" for part in wanted if part not in parts]:
        raise refuse(reading.path, "a tuner is not whole", found=f"missing {', '.join(missing)}")


def few(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
