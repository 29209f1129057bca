"""CLIP's two towers, each for itself: pictures or token ids to the embedding that both share.

The layers and the names of their parameters are transformers' (`CLIPVisionModelWithProjection`,
`CLIPTextModelWithProjection`), for vision transformers; `from_openai` reads the names of OpenAI's release,
https://github.com/openai/CLIP. Radford et al., arXiv 2103.00020, section 2.4.

The text tower is causal and knows no padding: what follows the end of a text cannot reach it.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..errors import IncompatibleArtefact, UsageError
from ..inputs import Input, require_rows
from .arguments import require_heads, require_room, require_sizes
from .head import classifier
from .huggingface import ATTENTION, require_activation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

HEAD_WIDTH = 64  # of every vision transformer that OpenAI released


class ClipImage(nn.Module):
    """CLIP's picture tower; the defaults are clip-vit-base-patch32.

    Seats, modules that forward what they are called with: `mask` (`[B, N]` ones: a picture has no padding),
    `features` (the last block's tokens `[B, N, C]`, in front of the last norm, which CLIP gives the class
    token alone), `pooled` (the class token behind that norm and the projection, `[B, E]`).

    Args:
        image_size: Height and width of a picture, in pixels.
        num_classes: Classes of the classifier; 0 for none.
        patch_size: Height and width of a patch, in pixels.
        hidden_size: Channels C.
        num_hidden_layers: Blocks.
        num_attention_heads: Attention heads of each block.
        intermediate_size: Hidden channels of each mlp.
        projection_dim: Channels E of the embedding.
        hidden_act: The mlp's activation, by transformers' name.
        layer_norm_eps: Of every LayerNorm.

    Raises:
        UsageError: An argument is out of range.
    """

    def __init__(
        self,
        image_size: int = 224,
        num_classes: int = 0,
        patch_size: int = 32,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        sizes = {
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "intermediate_size": intermediate_size,
            "projection_dim": projection_dim,
        }
        require_sizes(**sizes)
        require_heads("num_attention_heads", num_attention_heads, hidden_size)
        require_activation("hidden_act", hidden_act)
        if patch_size > image_size:
            raise UsageError(
                "a patch is larger than the picture",
                where="patch_size",
                wanted=f"at most {image_size}",
                found=patch_size,
            )
        tower = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                **sizes,
                hidden_act=hidden_act,
                layer_norm_eps=layer_norm_eps,
                **ATTENTION,
            )
        )
        self.inputs = (Input("images", (3, image_size, image_size)),)
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (3, image_size, image_size),
            "classifier": "head",
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": OPENAI_CLIP_MEAN,
            "std": OPENAI_CLIP_STD,
        }
        self.num_features = projection_dim
        self.vision_model = tower.vision_model
        self.visual_projection = tower.visual_projection
        self.mask = nn.Identity()
        self.features = nn.Identity()
        self.pooled = nn.Identity()
        self.head = classifier(projection_dim, num_classes)

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are the hidden states, the norm in front of the blocks first."""
        layers = range(len(self.vision_model.encoder.layers))
        return (
            "vision_model.pre_layrnorm",
            *(f"vision_model.encoder.layers.{number}" for number in layers),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, or without a classifier embeddings `[B, E]`, of pictures `[B, 3, H, W]`.

        Raises:
            UsageError: The pictures have another size.
        """
        require_rows(self.inputs, (images,))
        tower = self.vision_model
        x = tower.pre_layrnorm(tower.embeddings(images))
        self.mask(x.new_ones(x.shape[:2]))
        for layer in tower.encoder.layers:
            x = layer(x, None)
        x = self.features(x)
        return self.head(self.pooled(self.visual_projection(tower.post_layernorm(x[:, 0]))))


class ClipText(nn.Module):
    """CLIP's text tower; the defaults are clip-vit-base-patch32.

    A text ends at its first token of the largest id, as in OpenAI's release, and is padded with zeros.

    Seats, modules that forward what they are called with: `mask` (`[B, N]` real numbers, 1 where the id is
    not 0), `end` (`[B, N]`, 1 at the end of the text), `features` (the last block's tokens `[B, N, C]` behind
    the last norm), `pooled` (the end's token behind the projection, `[B, E]`).

    Args:
        length: Tokens of a row, padding among them.
        num_classes: Classes of the classifier; 0 for none.
        vocab_size: Rows of the table of words.
        max_position_embeddings: Rows of the table of positions.
        hidden_size: Channels C.
        num_hidden_layers: Blocks.
        num_attention_heads: Attention heads of each block.
        intermediate_size: Hidden channels of each mlp.
        projection_dim: Channels E of the embedding.
        hidden_act: The mlp's activation, by transformers' name.
        layer_norm_eps: Of every LayerNorm.

    Raises:
        UsageError: An argument is out of range.
    """

    causal: Tensor  # [1, 1, N, N] bool: what each token attends to

    def __init__(
        self,
        length: int = 77,
        num_classes: int = 0,
        vocab_size: int = 49408,
        max_position_embeddings: int = 77,
        hidden_size: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "max_position_embeddings": max_position_embeddings,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "intermediate_size": intermediate_size,
            "projection_dim": projection_dim,
        }
        require_sizes(length=length, **sizes)
        require_heads("num_attention_heads", num_attention_heads, hidden_size)
        require_activation("hidden_act", hidden_act)
        require_room("length", length, max_position_embeddings)
        tower = CLIPTextModelWithProjection(
            CLIPTextConfig(
                **sizes,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=vocab_size - 1,
                hidden_act=hidden_act,
                layer_norm_eps=layer_norm_eps,
                **ATTENTION,
            )
        )
        self.inputs = (Input("input_ids", (length,), "ids", high=vocab_size),)
        self.pretrained_cfg: dict[str, Any] = {"classifier": "head"}
        self.num_features = projection_dim
        self.text_model = tower.text_model
        self.text_projection = tower.text_projection
        self.mask = nn.Identity()
        self.end = nn.Identity()
        self.features = nn.Identity()
        self.pooled = nn.Identity()
        self.head = classifier(projection_dim, num_classes)
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        self.register_buffer("causal", causal, persistent=False)

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are the hidden states, embeddings first."""
        layers = range(len(self.text_model.encoder.layers))
        return (
            "text_model.embeddings",
            *(f"text_model.encoder.layers.{number}" for number in layers),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, K]`, or without a classifier embeddings `[B, E]`, of ids `[B, N]` int64.

        Raises:
            UsageError: The rows have another length.
        """
        require_rows(self.inputs, (input_ids,))
        tower = self.text_model
        dtype = self.text_projection.weight.dtype
        self.mask((input_ids != 0).to(dtype))
        last = input_ids.int().argmax(dim=-1)  # of equal ones the first; runtimes lack it for int64
        end = self.end(F.one_hot(last, input_ids.shape[1]).to(dtype))
        x = tower.embeddings(input_ids)
        for layer in tower.encoder.layers:
            x = layer(x, self.causal)
        x = self.features(tower.final_layer_norm(x))
        return self.head(self.pooled(self.text_projection((x * end[..., None]).sum(dim=1))))


# OpenAI's names

BLOCK = {  # of a residual attention block, and transformers' of an encoder layer
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TOWERS = {
    "clip_image": {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "visual.proj": "visual_projection.weight",
    },
    "clip_text": {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "text_projection": "text_projection.weight",
    },
}
BLOCKS = {
    "clip_image": ("visual.transformer.resblocks", "vision_model.encoder.layers"),
    "clip_text": ("transformer.resblocks", "text_model.encoder.layers"),
}
TURNED = ("visual.proj", "text_projection")  # [in, out], where a linear layer has [out, in]


def from_openai(
    tensors: Mapping[str, Tensor], kind: str, heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One tower of a checkpoint with OpenAI's names.

    Whatever stands in front of those names, such as CLIP4Clip's `clip.`, is taken off, and tensors outside
    of the tower are left. Half precision, which OpenAI's files mix with single, becomes single: that is exact.

    Args:
        tensors: By name.
        kind: `clip_image` or `clip_text`.
        heads: Attention heads; None for one per 64 channels, as in every release.

    Returns:
        Arguments of `ClipImage` or `ClipText`, and tensors by their names.

    Raises:
        UsageError: There is no such kind.
        IncompatibleArtefact: The tensors have no such tower, or one that is not a vision transformer's.
    """
    if kind not in TOWERS:
        raise UsageError("there is no such tower of CLIP", wanted=sorted(TOWERS), found=repr(kind))
    theirs, ours = BLOCKS[kind]
    own = _inside(tensors, kind)
    depth = 1 + max(
        (int(m[1]) for n in own if (m := re.match(rf"{re.escape(theirs)}\.(\d+)\.", n))), default=-1
    )
    names = dict(TOWERS[kind])
    for number in range(depth):
        for part, name in BLOCK.items():
            for last in ("weight", "bias"):
                names[f"{theirs}.{number}.{part}.{last}"] = f"{ours}.{number}.{name}.{last}"
    joint = [
        f"{theirs}.{n}.attn.in_proj_{last}" for n in range(depth) for last in ("weight", "bias")
    ]
    _require_names(kind, own, {*names, *joint})
    found = {
        name: (own[old].T.contiguous() if old in TURNED else own[old])
        for old, name in names.items()
    }
    for old in joint:
        layer, last = old.removesuffix(old[old.index(".attn.") :]), old.rpartition("_")[2]
        for part, tensor in zip("qkv", own[old].chunk(3), strict=True):
            path = f"{ours}{layer.removeprefix(theirs)}.self_attn.{part}_proj.{last}"
            found[path] = tensor.clone()
    width, hidden = (
        own[f"{theirs}.0.ln_1.weight"].shape[0],
        own[f"{theirs}.0.mlp.c_fc.bias"].shape[0],
    )
    arguments: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads or max(width // HEAD_WIDTH, 1),
        "intermediate_size": hidden,
    }
    if kind == "clip_image":
        patch = own["visual.conv1.weight"].shape[-1]
        side = math.isqrt(own["visual.positional_embedding"].shape[0] - 1)
        arguments |= {"image_size": side * patch, "patch_size": patch}
        arguments |= {"projection_dim": own["visual.proj"].shape[1]}
    else:
        positions = own["positional_embedding"].shape[0]
        arguments |= {"length": positions, "max_position_embeddings": positions}
        arguments |= {"vocab_size": own["token_embedding.weight"].shape[0]}
        arguments |= {"projection_dim": own["text_projection"].shape[1]}
    return arguments, found


def _inside(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tower's tensors by OpenAI's names, in single precision at least.

    Raises:
        IncompatibleArtefact: There is none, or several.
    """
    mark = {"clip_image": "visual.conv1.weight", "clip_text": "token_embedding.weight"}[kind]
    before = [n.removesuffix(mark) for n in tensors if n == mark or n.endswith(f".{mark}")]
    if len(before) != 1:
        raise IncompatibleArtefact(
            "the tensors are not one CLIP with OpenAI's names",
            wanted=mark,
            found=", ".join(f"{b}{mark}" for b in before) or "none of that name",
        )
    own = {n.removeprefix(before[0]): t for n, t in tensors.items() if n.startswith(before[0])}
    if kind == "clip_image":
        own = {n: t for n, t in own.items() if n.startswith("visual.")}
    else:
        own = {n: t for n, t in own.items() if n in TOWERS[kind] or n.startswith("transformer.")}
    return {
        n: (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t) for n, t in own.items()
    }


def _require_names(kind: str, found: Mapping[str, Tensor], wanted: set[str]) -> None:
    for what, names in (
        ("lacks", sorted(wanted - set(found))),
        ("has more than", sorted(set(found) - wanted)),
    ):
        if names:
            raise IncompatibleArtefact(
                f"the checkpoint {what} the tensors of a vision transformer's CLIP",
                where=kind,
                found=", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else ""),
            )
