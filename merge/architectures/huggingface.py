"""A folder as Hugging Face keeps a model, `config.json` and safetensors, read into arguments and tensors of ours.

Nothing is downloaded. What a config does not say is transformers' default for its model type. Of the tensors,
heads and pooling layers that are not ours are left, and so is the other tower of CLIP.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    RobertaConfig,
    T5Config,
)
from transformers.activations import ACT2FN

from ..errors import IncompatibleArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}  # one call of torch, one ONNX node
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIGS: dict[str, Any] = {  # by model type
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "clip": CLIPConfig,
    "clip_vision_model": CLIPVisionConfig,
    "clip_text_model": CLIPTextConfig,
    "t5": T5Config,
}
TYPES = {  # of the folders that hold a kind
    "bert": ("bert", "roberta"),
    "clip_image": ("clip", "clip_vision_model"),
    "clip_text": ("clip", "clip_text_model"),
    "t5": ("t5",),
}
COMMON = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
)
ARGUMENTS = {  # what a config calls as we do
    "bert": (
        *COMMON,
        "vocab_size",
        "max_position_embeddings",
        "type_vocab_size",
        "pad_token_id",
    ),
    "clip_image": (*COMMON, "image_size", "patch_size"),
    "clip_text": (*COMMON, "vocab_size", "max_position_embeddings"),
    "t5": (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "layer_norm_epsilon",
        "feed_forward_proj",
        "scale_decoder_outputs",
    ),
}
FIRST_END = 2  # `eos_token_id` of CLIP configs that mean: the token of the largest id
TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def architecture_of(folder: Path) -> str | None:
    """What a folder holds: `bert`, `clip_image`, `clip_text`, `t5`; `clip` where it is both towers.

    None for a folder without a `config.json`, or with one of another model type.
    """
    try:
        model_type = json.loads((folder / CONFIG).read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    kinds = [kind for kind, types in TYPES.items() if model_type in types]
    return "clip" if len(kinds) == 2 else kinds[0] if kinds else None


def read_folder(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A trunk from a folder.

    Args:
        folder: With `config.json` and `model.safetensors`, or its shards and their index.
        kind: `bert`, `clip_image`, `clip_text` or `t5`.

    Returns:
        Arguments of `Bert`, `ClipImage`, `ClipText` or `T5`, lengths of rows not among them (but that of
        `clip_text`, where the table of positions says it), and tensors by its names, in the file's dtype.

    Raises:
        UsageError: There is no such kind, folder or file.
        IncompatibleArtefact: A file is damaged, or the folder holds something else.
    """
    if kind not in TYPES:
        raise UsageError("there is no such trunk", wanted=sorted(TYPES), found=repr(kind))
    config = _config(folder, kind)
    arguments = _arguments(folder / CONFIG, config, kind)
    places = _places(folder)
    ours = _names(kind, places)
    if not ours:
        raise IncompatibleArtefact(
            f"the file holds no tensors of {kind}",
            where=folder,
            found=", ".join(sorted(places)[:5]),
        )
    tensors = _read(places, ours)
    return _tied(folder, arguments, tensors) if kind == "t5" else (arguments, tensors)


# The configuration


def _config(folder: Path, kind: str) -> Any:
    """The configuration of the kind's part of a folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(
            "the folder holds no model of Hugging Face's", where=folder, wanted=f"a {CONFIG}"
        )
    try:
        said = json.loads(path.read_text())
        model_type = said["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise IncompatibleArtefact(
            "the configuration cannot be read", where=path, wanted="a model_type", found=repr(cause)
        ) from cause
    if model_type not in TYPES[kind]:
        raise IncompatibleArtefact(
            "the folder holds another kind of model",
            where=path,
            wanted=f"model_type {' or '.join(TYPES[kind])}",
            found=model_type,
        )
    try:
        config = CONFIGS[model_type].from_dict(said)
    except Exception as cause:  # its validation has kinds of its own
        raise IncompatibleArtefact(
            "transformers refuses the configuration", where=path, found=str(cause).strip()
        ) from cause
    unusual = {
        "is_decoder": getattr(config, "is_decoder", False) and kind == "bert",
        "add_cross_attention": getattr(config, "add_cross_attention", False),
        "position_embedding_type": said.get("position_embedding_type", "absolute") != "absolute",
        "num_channels": kind == "clip_image"
        and getattr(_part(config, kind), "num_channels", 3) != 3,
    }
    for name, found in unusual.items():
        if found:
            raise IncompatibleArtefact(
                "the model is one that is not written here",
                where=path,
                found=f"{name} {said.get(name, '')}".strip(),
            )
    return config


def _part(config: Any, kind: str) -> Any:
    """The kind's own configuration in that of CLIP's two towers."""
    if isinstance(config, CLIPConfig):
        return config.vision_config if kind == "clip_image" else config.text_config
    return config


def _arguments(path: Path, config: Any, kind: str) -> dict[str, Any]:
    """Those of the kind's class."""
    own = _part(config, kind)
    arguments = {name: getattr(own, name) for name in ARGUMENTS[kind]}
    if kind == "bert":
        arguments["family"] = config.model_type
    if kind.startswith("clip"):
        arguments["projection_dim"] = config.projection_dim
    if kind == "clip_text":
        arguments["length"] = arguments["max_position_embeddings"]
        if own.eos_token_id not in (FIRST_END, own.vocab_size - 1):
            raise IncompatibleArtefact(
                "a text does not end at its largest id, which is where it is read",
                where=path,
                wanted=f"eos_token_id {own.vocab_size - 1}",
                found=own.eos_token_id,
            )
    return arguments


# The tensors


def _places(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    try:
        if (folder / INDEX).is_file():
            shards = json.loads((folder / INDEX).read_text())["weight_map"]
            files = sorted({folder / shard for shard in shards.values()})
        elif (folder / WEIGHTS).is_file():
            files = [folder / WEIGHTS]
        else:
            raise UsageError(
                "the folder holds no weights as safetensors",
                where=folder,
                wanted=f"{WEIGHTS}, or shards and {INDEX}",
                found=", ".join(sorted(path.name for path in folder.iterdir())[:10]),
                do="save it again with transformers, which writes safetensors",
            )
        places = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise IncompatibleArtefact(
            "the weights are damaged, or a shard of them is missing", where=folder, found=str(cause)
        ) from cause
    return places


def _read(places: Mapping[str, Path], ours: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of these names, by our names; every file is opened once."""
    tensors = {}
    for path in sorted({places[name] for name in ours}):
        with safe_open(path, framework="pt") as file:
            tensors |= {ours[name]: file.get_tensor(name) for name in ours if places[name] == path}
    return tensors


def _names(kind: str, names: Iterable[str]) -> dict[str, str]:
    """Our names by theirs, for the tensors that are the kind's."""
    names = [name for name in names if not name.endswith(("position_ids", "token_type_ids"))]
    if kind == "bert":
        return _bert_names(names)
    if kind == "t5":
        surplus = ".EncDecAttention.relative_attention_bias.weight"
        tops = ("shared.", "encoder.", "decoder.", "lm_head.")
        return {n: n for n in names if n.startswith(tops) and not n.endswith(surplus)}
    tops = {
        "clip_image": ("vision_model.", "visual_projection."),
        "clip_text": ("text_model.", "text_projection."),
    }
    return {n: n for n in names if n.startswith(tops[kind])}


def _bert_names(names: Iterable[str]) -> dict[str, str]:
    """Of a trunk alone, or of one with heads; old files call a norm's weight gamma and its bias beta."""
    names = list(names)
    trunk = next((t for t in ("bert.", "roberta.") if any(n.startswith(t) for n in names)), "")
    ours = {}
    for name in names:
        inner = name.removeprefix(trunk)
        if name.startswith(trunk) and inner.startswith(("embeddings.", "encoder.")):
            for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
                if inner.endswith(f"LayerNorm{old}"):
                    inner = inner.removesuffix(old) + new
            ours[name] = f"bert.{inner}"
    return ours


def _tied(
    folder: Path, arguments: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """T5 with its table of words once, whichever of its names the file has it under."""
    tables = [tensors.pop(name) for name in TABLES if name in tensors]
    if not tables or any(not torch.equal(tables[0], other) for other in tables):
        raise IncompatibleArtefact(
            "the encoder and the decoder do not share one table of words",
            where=folder,
            wanted="shared.weight",
            found=f"{len(tables)} tables",
        )
    tensors["shared.weight"] = tables[0]
    own = tensors.get("lm_head.weight")
    tied = own is None or torch.equal(own, tables[0])
    if tied:
        tensors.pop("lm_head.weight", None)
    return {**arguments, "tie_word_embeddings": tied}, tensors


# What the trunks ask of their arguments


def require_activation(argument: str, name: str) -> None:
    """There is an activation of this name in transformers.

    Raises:
        UsageError: There is none.
    """
    if name not in ACT2FN:
        raise UsageError(
            "there is no such activation",
            where=argument,
            wanted="for example gelu, quick_gelu, relu",
            found=repr(name),
        )
