"""Adapters of Hugging Face PEFT: a folder with `adapter_config.json` and its tensors.

One that was trained on a transformers model is read onto timm's; see `counterparts`.
Every kind is reduced exactly to branches of the law; products and differences are taken in float64. A
layer whose weight is read by the module around it (`qkv` of timm's EVA, BEiT and Swin V2) is meant as
PEFT merges it: while PEFT runs unmerged, its adapter of such a layer does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...backbone.transformers.processor import PROCESSOR, read_processor
from ...errors import IncompatibleArtefact
from ...parallel import read_inside
from ...sites import measure
from .adapter import Adapter
from .ia3 import read_ia3
from .lora import read_adalora, read_lora, read_vera
from .lycoris import read_loha, read_lokr
from .orthogonal import read_boft, read_oft
from .saved import read_heads, read_ln_tuning, read_saved

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...backbone import Backbone
    from ...preprocessing import Preprocessing
    from ..foreign import Foreign
    from ..settings import Settings

KINDS: dict[str, Callable[[Adapter], None]] = {
    "LORA": read_lora,
    "ADALORA": read_adalora,
    "VERA": read_vera,
    "LOHA": read_loha,
    "LOKR": read_lokr,
    "IA3": read_ia3,
    "OFT": read_oft,
    "BOFT": read_boft,
    "LN_TUNING": read_ln_tuning,
}
PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
)


def read_peft(path: Path, backbone: Backbone, settings: Settings | None = None) -> Foreign:
    """Branches of a PEFT adapter.

    Args:
        path: The adapter's folder, or the file of tensors in it.
        backbone: The frozen backbone that it was trained on.
        settings: Not asked for: the folder says everything.

    Raises:
        UsageError: The folder lacks a file.
        IncompatibleArtefact: A kind, variant or layer that cannot be carried, a tensor of no known place or
            of the wrong shape, or no head.
    """
    adapter = Adapter.open(path, backbone)
    kind = str(adapter.config["peft_type"])
    if kind not in KINDS:
        raise IncompatibleArtefact(
            "this kind of PEFT adapter cannot be carried",
            where=path,
            wanted=f"one of {', '.join(KINDS)}",
            found=kind,
            do="train prefixes or deep prompts here: PEFT's stand in front of text"
            if kind in PROMPTS
            else "merge it into the weights with PEFT (merge_and_unload) as a backbone of its own",
        )
    adapter.load()
    KINDS[kind](adapter)
    read_saved(adapter)
    read_heads(adapter)
    _note_read_layers(adapter)
    adapter.found.preprocessing = _prepared(adapter)
    return adapter.found


def _prepared(adapter: Adapter) -> Preprocessing | None:
    """How the adapter's folder says that its pictures were prepared.

    Raises:
        IncompatibleArtefact: In another size than the backbone reads.
    """
    prepared = read_processor(adapter.path)
    if prepared is not None and prepared.size != adapter.backbone.image_size:
        raise IncompatibleArtefact(
            "the adapter's pictures have another size than the backbone reads",
            where=adapter.path / PROCESSOR,
            wanted=list(adapter.backbone.image_size),
            found=list(prepared.size),
            do="load the backbone with --backbone-arg img_size=..., as it was trained",
        )
    return prepared


def _note_read_layers(adapter: Adapter) -> None:
    """Say where the task is not what PEFT runs before a merge."""
    places = {branch.add.module for branch in adapter.found.branches.values()}
    if not read_inside(adapter.backbone.model, places):
        return
    read = sorted(places & measure(adapter.backbone).read)
    if read:
        more = f" and {len(read) - 1} more" if read[1:] else ""
        adapter.found.notes["read as merged"] = (
            f"{read[0]}{more}: the backbone reads these layers without calling them, so PEFT's adapter does "
            "nothing there until it is merged; this task answers as the merged model does"
        )
