"""What the layers of transformers' vision models are in timm's: a module, or a part of its rows.

ViT, DeiT, DINOv2 (with registers or without), BEiT and Data2Vec, Swin, Swin V2, and the image towers of CLIP and
SigLIP, by the names of transformers 4 and of transformers 5. Names are all that is needed: transformers is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...errors import IncompatibleArtefact
from ..architecture import features_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

Rule = tuple[str, str, int, int]  # a pattern, timm's name, which part of the rows, of how many

INSIDE: tuple[Rule, ...] = (
    *(
        (rf"attention\.(?:attention|self)\.{old}|(?:attention|self_attn)\.{new}_proj", "attn.qkv", part, 3)
        for part, (old, new) in enumerate((("query", "q"), ("key", "k"), ("value", "v")))
    ),
    (r"attention\.output\.dense|attention\.o_proj|self_attn\.out_proj", "attn.proj", 0, 1),
    (r"mlp\.gate_proj", "mlp.fc1", 0, 2),
    (r"mlp\.up_proj", "mlp.fc1", 1, 2),
    (r"intermediate\.dense|mlp\.fc1|mlp\.weights_in", "mlp.fc1", 0, 1),
    (r"output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj", "mlp.fc2", 0, 1),
    (r"layernorm_before|layer_norm1|norm1", "norm1", 0, 1),
    (r"layernorm_after|layer_norm2|norm2", "norm2", 0, 1),
    *((rf"layer_scale{n}\.lambda1", f"ls{n}.gamma", 0, 1) for n in (1, 2)),
    *((rf"lambda_{n}", f"gamma_{n}", 0, 1) for n in (1, 2)),
    (r"attention\.self\.logit_scale", "attn.logit_scale", 0, 1),
    (r"attention\.self\.continuous_position_bias_mlp", "attn.cpb_mlp", 0, 1),
    (
        r"(?:attention\.(?:attention\.|self\.)?)?(?:relative_position_bias\.)?relative_position_bias_table",
        "attn.relative_position_bias_table", 0, 1,
    ),
)  # fmt: skip
"""Behind the number of a block."""

AROUND: tuple[Rule, ...] = (
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token", 0, 1),
    (r"embeddings\.distillation_token", "dist_token", 0, 1),
    (r"embeddings\.register_tokens", "reg_token", 0, 1),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed", 0, 1),
    (r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)", "patch_embed.proj", 0, 1),
    (r"embeddings\.norm", "patch_embed.norm", 0, 1),
    (r"pre_layrnorm", "norm_pre", 0, 1),
    (r"layernorm|post_layernorm", "norm", 0, 1),
    (r"pooler\.layernorm", "fc_norm", 0, 1),
    (
        r"encoder\.relative_position_bias\.relative_position_bias_table",
        "rel_pos_bias.relative_position_bias_table", 0, 1,
    ),
)  # fmt: skip
"""Behind the trunk's name, outside its blocks."""

DINOV2 = ("dinov2.", "dinov2_with_registers.")  # the trunks in its models with a classifier
CLASSIFIERS = {"classifier": 0, "cls_classifier": 0, "distillation_classifier": 1}
UNUSED = re.compile(  # what no classifier reads, and what the module makes itself
    r"(?:.*\.)?(?:mask_token|pooler\.dense(?:\.\w+)?|position_ids|relative_position_index|relative_coords_table)"
)
BLOCK = re.compile(r"(?:encoder\.)?(?:model\.)?layers?\.(\d+)\.(?:blocks\.(\d+)\.)?")
STAGE = re.compile(r"encoder\.layers\.(\d+)\.downsample\.")
TRUNK = re.compile(
    r"(?P<trunk>(?:(?!head\.)\w+\.)*?)"
    r"(?:encoder\.layers?\.\d+\.|layers?\.\d+\.(?!blocks|downsample)|encoder\.relative_position_bias\."
    r"|embeddings\.(?:patch_embedding|cls_token|class_embedding|distillation_token|register_tokens|"
    r"position_embedding|mask_token|norm)|pooler\.|pre_layrnorm\.|layernorm\.|post_layernorm\.)"
)


@dataclass(frozen=True)
class Place:
    """Where a transformers layer or tensor is in timm's model.

    Attributes:
        name: Dotted, of the module or the tensor.
        part: Which of the equal parts of its rows it is.
        of: How many there are; 1 where it is the whole.
    """

    name: str
    part: int = 0
    of: int = 1

    def rows(self, size: int) -> slice:
        """Its rows among all `size`."""
        each = size // self.of
        return slice(self.part * each, (self.part + 1) * each)


@dataclass(frozen=True)
class Counterparts:
    """The names of one transformers model, on one of timm's.

    Attributes:
        model: timm's.
        classifiers: Dotted paths of its classifiers.
        trunk: What the names of the transformers trunk begin with, such as `vit.`; empty for a bare trunk.
    """

    model: nn.Module
    classifiers: tuple[str, ...]
    trunk: str

    @staticmethod
    def may_be(name: str) -> bool:
        """The name could be of a transformers model."""
        return TRUNK.match(name) is not None

    @classmethod
    def find(
        cls, model: nn.Module, classifiers: tuple[str, ...], names: Iterable[str], *, where: Path
    ) -> Counterparts | None:
        """The names, if they are those of a transformers model; None where they are timm's, or nobody's.

        Args:
            model: The timm model.
            classifiers: Dotted paths of its classifiers.
            names: Of layers or tensors.
            where: Their file, for messages.

        Raises:
            IncompatibleArtefact: They are of two trunks.
        """
        modules = {path for path, _ in model.named_modules()}
        trunks: dict[str, str] = {}
        for name in names:
            met = TRUNK.match(name)
            if met is None:
                continue
            path = met[0].rstrip(".").split(".")
            ends = range(met["trunk"].count(".") + 1)
            if any(".".join(path[start:]) in modules for start in ends):
                return None  # timm's own, or inside a wrapper
            block = BLOCK.match(name.removeprefix(met["trunk"]))
            inner = name.removeprefix(met["trunk"])[block.end() :] if block else ""
            if block and not inner.startswith("downsample.") and _rule(INSIDE, inner) is None:
                return None
            trunks.setdefault(met["trunk"], name)
        if len(trunks) > 1:
            raise IncompatibleArtefact(
                "the names are of more than one trunk",
                where=where,
                wanted="the layers of one transformers vision model",
                found=", ".join(list(trunks.values())[:2]),
            )
        return cls(model, classifiers, next(iter(trunks))) if trunks else None

    def place(self, name: str) -> Place | None:
        """The place of a layer or a tensor; None for a name that is not in the table.

        The model need not have it.
        """
        if not name.startswith(self.trunk) or name.partition(".")[0] in CLASSIFIERS:
            head, _, rest = name.partition(".")
            index = CLASSIFIERS.get(head, len(self.classifiers))
            if index >= len(self.classifiers):
                return None
            return Place(f"{self.classifiers[index]}.{rest}".rstrip("."))
        inner = name.removeprefix(self.trunk)
        if inner.startswith("post_layernorm.") and isinstance(
            getattr(self.model, "norm", None), nn.Identity
        ):
            return None  # CLIP's classifier reads what is in front of it
        if stage := STAGE.match(inner):
            return Place(f"layers.{int(stage[1]) + 1}.downsample.{inner[stage.end() :]}")
        if (block := BLOCK.match(inner)) is None:
            return _rule(AROUND, inner)
        at = f"blocks.{block[1]}" if block[2] is None else f"layers.{block[1]}.blocks.{block[2]}"
        found = _rule(INSIDE, inner[block.end() :])
        return (
            None
            if found is None
            else self._outside(Place(f"{at}.{found.name}", found.part, found.of))
        )

    def _outside(self, place: Place) -> Place:
        """BEiT and Swin V2 of timm keep the bias of `qkv` in the attention, and none of the keys."""
        attention, qkv, rest = place.name.rpartition(".qkv.bias")
        if not qkv or rest:
            return place
        try:
            module = self.model.get_submodule(attention)
        except AttributeError:
            return place
        apart = isinstance(getattr(module, "q_bias", None), nn.Parameter)
        return Place(f"{attention}.{'qkv'[place.part]}_bias") if apart else place

    @property
    def shared_head(self) -> tuple[str, ...]:
        """The name of one classifier that stands for two of timm's, which it averages."""
        return ("classifier",) if len(self.classifiers) == 2 else ()

    def reads_class_and_mean(self, head: Tensor) -> bool:
        """A classifier's weight is DINOv2's: of the class token, and beside it of the mean of the patches."""
        width = features_of(self.model)
        return self.trunk in DINOV2 and width is not None and head.shape[-1] == 2 * width

    def require_features(self, tensors: Mapping[str, Tensor], *, where: Path) -> None:
        """A classifier among the names reads what timm's does.

        transformers' ViT and DeiT read the class token, DINOv2 the mean of the patches beside it, CLIP this mean in
        front of the last norm, SigLIP behind it. BEiT and Swin have one way in both.

        Raises:
            IncompatibleArtefact: It reads something else.
        """
        head = tensors.get("classifier.weight")
        width = features_of(self.model)
        wide = head is not None and self.reads_class_and_mean(head)
        if head is not None and not wide and width not in (None, head.shape[-1]):
            raise IncompatibleArtefact(
                "the classifier reads other features than the backbone's",
                where=f"{where}: classifier",
                wanted=f"{width} features",
                found=head.shape[-1],
                do="train a linear classifier on what the backbone pools, in modules_to_save",
            )
        if not hasattr(self.model, "blocks") or not hasattr(self.model, "norm_pre"):
            return  # not timm's VisionTransformer
        if head is None:
            return
        pools = str(getattr(self.model, "global_pool", ""))
        bare = all(isinstance(getattr(self.model, n), nn.Identity) for n in ("norm", "fc_norm"))
        if self.trunk.endswith("vision_model."):
            clip = getattr(self.model, "cls_token", None) is not None
            fits = pools == "avg" and isinstance(self.model.fc_norm, nn.Identity) and bare == clip
            wanted = "global_pool=avg fc_norm=false" + (" final_norm=false" if clip else "")
        else:
            fits, wanted = pools == "token" and not bare, "global_pool=token"
        if not fits:
            raise IncompatibleArtefact(
                "the classifier reads other features than the backbone's",
                where=where,
                wanted=wanted,
                found=f"global_pool={pools}",
                do=f"name the backbone with --backbone-arg {wanted.replace(' ', ' --backbone-arg ')}",
            )

    def assemble(
        self, tensors: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *, where: Path
    ) -> dict[str, Tensor]:
        """Tensors of the transformers model by timm's names.

        Args:
            tensors: By their own names. What no classifier reads is left out.
            frozen: timm's tensors, for the shapes, and for the rows of a part that is not given.
            where: The file, for messages.

        Raises:
            IncompatibleArtefact: A tensor has no place in timm's model, or not its shape.
        """
        found: dict[str, Tensor] = {}
        parts: dict[str, dict[Place, Tensor]] = {}
        strange = []
        for name, tensor in tensors.items():
            place = self.place(name)
            if place is None:
                strange += [] if self.unused(name) else [name]
            elif place.of > 1:
                parts.setdefault(place.name, {})[place] = tensor
            else:
                found[place.name] = _seen_as(tensor, frozen.get(place.name))
        if strange:
            raise IncompatibleArtefact(
                f"the transformers model has tensors of no place in {type(self.model).__name__}",
                where=where,
                found=", ".join(strange[:5])
                + (f" and {len(strange) - 5} more" if strange[5:] else ""),
                do="load the backbone that it was trained on",
            )
        for name, own in parts.items():
            found[name] = _whole(own, frozen.get(name), where=f"{where}: {name}")
        if getattr(self.model, "no_embed_class", False) and "cls_token" in found:
            if "pos_embed" not in found:
                raise IncompatibleArtefact(
                    "timm's class token has its position in it, which the file does not have",
                    where=where,
                    wanted="position_embeddings beside cls_token",
                )
            positions = found["pos_embed"]
            found["cls_token"] = found["cls_token"] + positions[:, :1]
            found["pos_embed"] = positions[:, 1:]
        return self._of_both_heads(found, tensors)

    def unused(self, name: str) -> bool:
        """No classifier reads it, or the model makes it itself."""
        if UNUSED.fullmatch(name):
            return True
        inner = name.removeprefix(self.trunk)
        if inner.startswith("post_layernorm."):
            return isinstance(getattr(self.model, "norm", None), nn.Identity)
        pools = getattr(self.model, "global_pool", None) == "map"
        return inner.startswith("head.") and not pools  # SigLIP's attention over all tokens

    def _of_both_heads(
        self, found: dict[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """One classifier on a model that averages two: twice the one, and zeros."""
        if len(self.classifiers) == 2 and "classifier.weight" in tensors:
            for key in ("weight", "bias"):
                first, second = (f"{path}.{key}" for path in self.classifiers)
                found[first] = 2 * found[first]
                found[second] = torch.zeros_like(found[first])
        return found


def _rule(rules: tuple[Rule, ...], name: str) -> Place | None:
    """The place that the first rule gives; what follows the pattern is kept."""
    for pattern, ours, part, of in rules:
        if met := re.match(rf"(?:{pattern})(?=\.|$)", name):
            return Place(ours + name[met.end() :], part, of)
    return None


def _seen_as(tensor: Tensor, frozen: Tensor | None) -> Tensor:
    """A token or a table of positions, with timm's leading axes of one."""
    if frozen is None or frozen.dim() <= tensor.dim() or frozen.numel() != tensor.numel():
        return tensor
    return tensor.reshape(frozen.shape)


def _whole(parts: Mapping[Place, Tensor], frozen: Tensor | None, *, where: str) -> Tensor:
    """Parts as one tensor; rows that are not given are the frozen ones.

    Raises:
        IncompatibleArtefact: There are no frozen ones, or a part has other rows.
    """
    of = next(iter(parts)).of
    if len(parts) == of:
        return torch.cat([parts[place] for place in sorted(parts, key=lambda place: place.part)])
    if frozen is None:
        raise IncompatibleArtefact("the backbone has no such tensor", where=where)
    whole = frozen.detach().to(torch.float64, copy=True)
    for place, tensor in parts.items():
        rows = whole[place.rows(len(whole))]
        if rows.shape != tensor.shape:
            raise IncompatibleArtefact(
                "a saved tensor has another shape than the backbone's",
                where=where,
                wanted=list(rows.shape),
                found=list(tensor.shape),
                do="load the backbone that it was trained on",
            )
        rows.copy_(tensor)
    return whole
