"""A PEFT adapter folder: its configuration, its tensors, and who has read which of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...attention import Seam
from ...backbone.transformers.counterparts import Counterparts, Place
from ...errors import IncompatibleArtefact, UsageError
from ...parallel import read_inside
from ...pickles import read_pickle
from ...tensor_files import read_tensors
from ..foreign import Foreign, differing, named_module, other_backbone, refuse, some
from .layer import Layer
from .state import MAGNITUDE, TUNED, is_whole, split

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ...backbone import Backbone

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
DISTRIBUTED = "module."

HARMLESS = frozenset(
    {  # what was done while training, or what the tensors say themselves
        *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "revision"),
        *("base_model_name_or_path", "runtime_config", "ensure_weight_tying"),
        *("target_modules", "exclude_modules", "modules_to_save"),
        *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"),
        *("init_weights", "init_ia3_weights"),
        "merge_weights",  # of PEFT before 0.3: whether eval mode merged
        "fan_in_fan_out",  # of layers that keep their weight transposed, which none here does
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
        *("lora_dropout", "vera_dropout", "boft_dropout", "module_dropout"),
        *("rank_dropout", "rank_dropout_scale", "qalora_group_size"),
    }
)


@dataclass
class Adapter:
    """What is left to read of an adapter, and what was found.

    Attributes:
        path: The folder.
        config: Its configuration.
        tensors: Tensors that nobody has read yet, by their names without PEFT's prefix.
        backbone: The frozen backbone.
        found: The branches so far.
        counterparts: The table of names, of an adapter that was trained on a transformers model.
        wrapper: What stood in front of the backbone's names when it was trained inside another module, such as
            `timm_model.` of transformers' wrapper; PEFT's patterns are of names with it.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    backbone: Backbone
    found: Foreign
    wrapper: str = ""
    counterparts: Counterparts | None = None

    @classmethod
    def open(cls, path: Path, backbone: Backbone) -> Adapter:
        """An adapter folder, as `save_pretrained` writes it.

        Raises:
            UsageError: The folder lacks a file.
            IncompatibleArtefact: A file is malformed or unsafe.
        """
        if path.is_file() and (path.parent / CONFIG).is_file():
            path = path.parent
        if not (path / CONFIG).is_file():
            raise UsageError(
                "there is no PEFT adapter",
                where=path,
                wanted=f"{CONFIG} beside the file of tensors"
                if path.is_file()
                else f"a folder with {CONFIG}",
                do="copy it from the run: it says the kind, the scale and the layers"
                if path.is_file()
                else None,
            )
        try:
            config: dict[str, Any] = dict(json.loads((path / CONFIG).read_text()))
            kind = str(config["peft_type"])
        except (ValueError, KeyError, TypeError) as cause:
            raise refuse(
                path / CONFIG, "the adapter's configuration is malformed", found=repr(cause)
            ) from cause
        source = " ".join(filter(None, ("PEFT", str(config.get("peft_version") or ""), kind)))
        return cls(path, config, {}, backbone, Foreign(source))

    def load(self) -> None:
        """Read the tensors.

        Raises:
            UsageError: There is no file of tensors.
            IncompatibleArtefact: It is malformed or unsafe.
        """
        pickled = not (self.path / TENSORS).is_file() and (self.path / PICKLE).is_file()
        flat = read_pickle(self.path / PICKLE) if pickled else read_tensors(self.path / TENSORS)
        if not isinstance(flat, dict) or not all(isinstance(t, Tensor) for t in flat.values()):
            raise refuse(self.path / PICKLE, "the file is no state dict", found=type(flat).__name__)
        self.tensors = {
            str(name).removeprefix(DISTRIBUTED).removeprefix(PREFIX): tensor
            for name, tensor in flat.items()
        }
        frozen: dict[str, Tensor] = {}
        if is_whole(self.tensors):
            bias = str(self.config.get("bias") or "none")
            self.tensors, frozen = split(self.path, self.tensors, bias)
        self.tensors = {
            name.replace(f".{MAGNITUDE}.weight", f".{MAGNITUDE}"): tensor
            for name, tensor in self.tensors.items()
        }
        self.counterparts = Counterparts.find(
            self.backbone.model, self.backbone.classifiers, self.tensors, where=self.path
        )
        if self.counterparts is not None:
            self.found.notes["names"] = (
                f"of a transformers model, {self.counterparts.trunk or 'a bare trunk'}"
            )
        else:
            self.wrapper = self._wrapper()
        if self.wrapper:
            self.tensors = {n.removeprefix(self.wrapper): t for n, t in self.tensors.items()}
            self.found.notes["wrapper"] = f"names begin with {self.wrapper}, which was left out"
        if frozen:
            self._require_same(frozen)
        elif base := self.config.get("base_model_name_or_path"):
            self.found.notes["trained on"] = (
                f"{base}, by its configuration; that the weights here are the same cannot be seen in the adapter"
            )

    def _require_same(self, frozen: dict[str, Tensor]) -> None:
        """Hold the frozen tensors of a whole state dict to the backbone's.

        Raises:
            IncompatibleArtefact: One differs, or is missing.
        """
        own = self.backbone.model.state_dict()
        trained = {n for n in self._by_our_names(dict(self.tensors), own) if n.endswith("bias")}
        theirs = {n.removeprefix(self.wrapper): t for n, t in frozen.items()}
        theirs = self._by_our_names(theirs, own)
        theirs |= {name: own[name] for name in trained if name in own and name not in theirs}
        if other := differing(self.path, self.backbone, theirs):
            raise other_backbone(self.path, self.backbone, list(other))

    def _by_our_names(
        self, tensors: dict[str, Tensor], frozen: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Those of a transformers model by timm's names, without what is no parameter of it."""
        if self.counterparts is None:
            return tensors
        plain = {n: t for n, t in tensors.items() if not TUNED.search(n)}
        return self.counterparts.assemble(plain, frozen, where=self.path)

    def _wrapper(self) -> str:
        """What all names begin with in front of the backbone's; empty where they are no backbone's behind it either."""
        own = {name for name, _ in self.backbone.model.named_children()}
        names, wrapper = list(self.tensors), ""
        while names:
            first = {name.partition(".")[0] for name in names}
            if first & own:
                return wrapper
            if len(first) > 1:
                return ""
            (part,) = first
            wrapper += f"{part}."
            names = [name.partition(".")[2] for name in names if "." in name]
        return ""

    def allow(self, *settings: str) -> None:
        """Refuse every setting that is on, that the reader does not read, and that could matter.

        Raises:
            IncompatibleArtefact: There is one.
        """
        known = HARMLESS | set(settings)
        for name, value in self.config.items():
            if name not in known and value not in (None, False, "", 0, [], {}):
                raise IncompatibleArtefact(
                    f"this variant of {self.config['peft_type']} cannot be carried",
                    where=self.path / CONFIG,
                    wanted=f"{name} off",
                    found=f"{name}={value!r}",
                    do="merge it into the weights with PEFT (merge_and_unload), or train without it",
                )

    def number(self, name: str, default: float | None = None) -> float:
        """A number of the configuration.

        Raises:
            IncompatibleArtefact: It is missing or no number.
        """
        value = self.config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise IncompatibleArtefact(
                "the adapter's configuration is malformed",
                where=self.path / CONFIG,
                wanted=f"a number named {name}",
                found=repr(value),
            )
        return value

    def resolved(self, patterns: str, name: str, module: str) -> float:
        """A number of one layer.

        Args:
            patterns: Names a table of patterns; the first that is the module's name, or its end behind a
                dot, has the number.
            name: Names the number of all other layers.
            module: The layer's path.

        Raises:
            IncompatibleArtefact: It is missing or no number, or a pattern cannot be read.
        """
        table = self.config.get(patterns) or {}
        full = self.wrapper + module
        try:
            values = [float(v) for p, v in table.items() if re.match(rf"(.*\.)?({p})$", full)]
        except (AttributeError, TypeError, ValueError, re.error) as cause:
            raise IncompatibleArtefact(
                "the adapter's configuration is malformed",
                where=self.path / CONFIG,
                wanted=f"{patterns}, numbers by patterns of names",
                found=repr(cause),
            ) from cause
        if any(value != values[0] for value in values):
            self.found.notes[f"{patterns} of {module}"] = (
                f"several match, {values[0]:g} was used as PEFT does; it sorts them when it saves"
            )
        return values[0] if values else self.number(name)

    def layers(self, *names: str) -> list[Layer]:
        """The layers that have tensors of these names, which count as read.

        Raises:
            IncompatibleArtefact: A layer is not in the backbone, or is none with one weight.
        """
        grouped: dict[str, dict[str, Tensor]] = {}
        for full in list(self.tensors):
            for name in names:
                if full.endswith(f".{name}"):
                    module = full.removesuffix(f".{name}")
                    grouped.setdefault(module, {})[name] = self.tensors.pop(full)
        if self.counterparts is not None and (
            unused := list(filter(self.counterparts.unused, grouped))
        ):
            self.found.notes["left out"] = f"{some(unused)}: no classifier reads these layers"
            grouped = {name: own for name, own in grouped.items() if name not in unused}
        return [self._layer(name, own) for name, own in grouped.items()]

    def _layer(self, name: str, own: dict[str, Tensor]) -> Layer:
        """A layer by its name in the adapter.

        Raises:
            IncompatibleArtefact: The backbone has none like it.
        """
        if self.counterparts is None:
            return Layer(self, Place(name), name, self.module(name), own)
        place = self.counterparts.place(name)
        if place is None:
            raise IncompatibleArtefact(
                "the backbone has no counterpart of a tuned layer",
                where=self.path,
                wanted=f"a layer of {self.backbone.identity.architecture}",
                found=name,
                do="leave the layer out of target_modules, or load the backbone that it was trained on",
            )
        if name in self.counterparts.shared_head:
            raise IncompatibleArtefact(
                "a tuned classifier stands where the backbone averages two",
                where=f"{self.path}: {name}",
                do="name the classifier in modules_to_save instead of target_modules",
            )
        layer = Layer(self, place, name, self.module(place.name), own)
        if place.of > 1 and len(layer.weight) * place.of != len(layer.op.weight):  # type: ignore[arg-type]
            raise layer.refuse_op(f"rows that divide by {place.of}")
        return layer

    def settle(self) -> None:
        """What is left, by the backbone's names.

        Raises:
            IncompatibleArtefact: A tensor has no place in the backbone.
        """
        if self.counterparts is None:
            return
        self.counterparts.require_features(self.tensors, where=self.path)
        frozen = self.backbone.model.state_dict()
        self.tensors = self.counterparts.assemble(self.tensors, frozen, where=self.path)

    def module(self, path: str) -> nn.Module:
        """A module of the backbone; see `named_module`."""
        return named_module(self.path, self.backbone, path)

    def given_bias(self, path: str) -> Tensor | None:
        """The bias that a layer adds: its own, or what the module around it reads it with.

        EVA, BEiT and Swin V2 of timm keep the bias of `qkv` outside the layer, which they read instead
        of calling it.
        """
        if read_inside(self.backbone.model, {path}) and path in self._read:
            return self._read[path]
        return getattr(self.backbone.model.get_submodule(path), "bias", None)

    @cached_property
    def _read(self) -> dict[str, Tensor | None]:
        """The biases with which one image's linear layers run, of those that may be read."""
        model = self.backbone.model
        paths = {path for path, _ in model.named_modules() if path}
        layers = [path for read in read_inside(model, paths).values() for path in read]
        seen = _Biases({path: model.get_submodule(path) for path in layers})
        with torch.no_grad(), seen:
            model(*self.backbone.draw())
        return seen.biases


class _Biases(Seam):
    """Notes the biases with which the weights of linear layers are read."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self.biases: dict[str, Tensor | None] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.biases |= {p: bias for p, layer in self.layers.items() if weight is layer.weight}
        return super().linear(x, weight, bias)
