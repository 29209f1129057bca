"""CLIP4Clip with UniPT: pictures (frames of a video) and captions, each to a vector in CLIP's space.

The anchor is CLIP's own projected embedding, one vector; every hidden state is a target. What a clip and a
caption have in common is computed from their vectors; see `similarity`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import IncompatibleArtefact
from ...methods.side_networks import hidden_states
from ...sites import measure
from ...tuner import Branch, Point
from ...tuners.embedding import Embedding
from ...tuners.unipt import UniPT
from ..foreign import Foreign, refuse
from .parts import Checkpoint, require_states, require_trunk

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ...backbone import Backbone
    from ...tuner import Weights

SIDES = ("image", "text")
EPS = 1e-6  # the least sum of a row of affinities


def read_clip4clip(path: Path, backbone: Backbone, state: Mapping[str, Tensor]) -> Foreign:
    """Branches of one side of a CLIP4Clip checkpoint: of text where the backbone marks an end token.

    Raises:
        IncompatibleArtefact: The file has no such side, or is of another backbone.
    """
    sites = measure(backbone)
    end = Point("end", "output")
    text = end in sites.calls
    side = "text" if text else "image"
    prefix = f"{side}_adapter."
    if not any(key.startswith(prefix) for key in state):
        raise IncompatibleArtefact(
            f"the file has no {side} side, and the backbone is one of {side}",
            where=path,
            wanted=f"tensors under {prefix}",
            found=", ".join(sorted({key.partition(".")[0] for key in state})),
            do="load the backbone of the other side",
        )
    states = hidden_states(backbone, sites)
    anchor = Point("pooled", "output")
    file = Checkpoint(path, state)
    depth = file.count(f"{prefix}downsample_layers.")
    require_states(path, states.points, depth)
    found = Foreign(f"UniPT CLIP4Clip ({side})", labels=())
    w: Weights = {"gate": file.gate(f"{prefix}gate_layer")}
    for number in range(depth):
        w |= file.linear(f"{prefix}downsample_layers.{number}.1", f"target{number}")
    w |= file.linear(f"{prefix}downsample_layer.1", "anchor")
    w |= file.linear(f"{prefix}upsample_layer.1", "up")
    first = w["target0_weight"].shape[1]
    if first != states.channels[0]:
        raise refuse(
            path,
            f"the {side} side reads other channels than the backbone has",
            found=f"{first} in the file, {states.channels[0]} in the backbone",
            do="load the backbone of that side; one of text marks its end token (states: mask=true and end=true)",
        )
    width, embedding = w["anchor_weight"].shape
    tuner = UniPT(
        widths=tuple(w[f"target{n}_weight"].shape[1] for n in range(depth)),
        anchor=embedding,
        width=width,
        out=w["up_weight"].shape[0],
        norm="none",
        relu_first=True,
        vector=True,
        own="end" if text else "first",
        guard="clamp",
        eps=EPS,
        project="none",
        onto="anchor",
        masked=text,
    )
    add = Point(backbone.classifiers[0], "input")
    others = (*states.points[1:], anchor, *((Point("mask", "output"), end) if text else ()))
    found.plant(f"{add.module}/unipt", Branch(tuner, states.points[0], add, others), w)
    answer = Branch(Embedding(tuner.out), add, Point(add.module, "output"))
    found.plant(f"{add.module}/embedding", answer, {})
    if (scale := state.get("clip.logit_scale")) is not None:
        found.notes["logit_scale"] = repr(float(scale))
    _require_trunk(path, backbone, state, found)
    file.require_seen(*(f"{other}_adapter." for other in SIDES if other != side), "clip.")
    return found


def _require_trunk(
    path: Path, backbone: Backbone, state: Mapping[str, Tensor], found: Foreign
) -> None:
    """CLIP's own tensors, in OpenAI's names, are the backbone's."""
    trunk = {key: tensor for key, tensor in state.items() if key.startswith("clip.")}
    if set(trunk) <= {"clip.logit_scale"} or backbone.identity.architecture == "states":
        require_trunk(path, backbone, {}, found)
        return
    from ...architectures.clip import from_openai

    _, tensors = from_openai(trunk, backbone.identity.architecture)
    require_trunk(path, backbone, tensors, found)
