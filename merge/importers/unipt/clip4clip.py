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
from ..foreign import Foreign, refuse, some
from .parts import Checkpoint, made, require_states, require_trunk

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ...backbone import Backbone
    from ...tuner import Weights
    from ..settings import Settings

SIDES = ("image", "text")
HEADERS = {"seqTransf": "transformerClip.", "seqLSTM": "lstm_visual."}  # by `sim_header`
TEMPORAL = ("frame_position_embeddings.", *HEADERS.values())  # layers over the frames of a video
TIGHT = ("cross.", "similarity_dense.")  # of `tightTransf`, and of a run without `loose_type`
EPS = 1e-6  # the least sum of a row of affinities


def read_clip4clip(
    path: Path, backbone: Backbone, state: Mapping[str, Tensor], settings: Settings
) -> Foreign:
    """Branches of one side of a CLIP4Clip checkpoint: of text where the backbone marks an end token.

    Args:
        path: The file.
        backbone: CLIP's tower of that side, or its states.
        state: Tensors of the file.
        settings: `frames_alone` reads the vectors of single frames of a file that has layers over them.

    Raises:
        IncompatibleArtefact: The file has no such side, is of another backbone, or scores videos by more than the
            vectors of their frames.
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
    over = _layers_over_frames(path, side, state, settings, found)
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
    tuner = made(
        path,
        UniPT,
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
        if scale.numel() != 1:
            raise refuse(path, "clip.logit_scale is no number", found=list(scale.shape))
        found.notes["logit_scale"] = repr(float(scale))
    _require_trunk(path, backbone, state, found)
    file.require_seen(*(f"{other}_adapter." for other in SIDES if other != side), "clip.", *over)
    return found


def _layers_over_frames(
    path: Path, side: str, state: Mapping[str, Tensor], settings: Settings, found: Foreign
) -> tuple[str, ...]:
    """How the names of layers over the frames begin, which a caption's vector does not depend on.

    Raises:
        IncompatibleArtefact: There are some behind the vectors that are to be read, or layers that read caption and
            video together.
    """
    if tight := sorted(key for key in state if key.startswith(TIGHT)):
        raise refuse(
            path,
            "the checkpoint scores a caption and a video by a transformer over both, and has no vectors to compare",
            found=f"{some(tight)} (sim_header tightTransf, or no loose_type)",
            do="wanted: a run with loose_type, whose sim_header is meanP",
        )
    layers = sorted(key for key in state if key.startswith(TEMPORAL))
    if not layers:
        return ()
    settings.allow("frames_alone")
    named = (name for name, prefix in HEADERS.items() if layers[-1].startswith(prefix))
    name = next(named, " or ".join(HEADERS))
    if side == "image" and not settings.get("frames_alone", bool):
        raise refuse(
            path,
            f"the checkpoint has layers over the frames of a video (sim_header {name}): they read all frames of one "
            "video at once, and what is imported answers for one picture",
            found=some(layers),
            do="the vectors of single frames, which these layers read, can be imported as they are: --set "
            "frames_alone=true, and run the layers on them; or train with sim_header meanP",
        )
    found.notes["frames"] = (
        f"the layers of sim_header {name} over the frames of a video are not part of it; "
        + (
            "the vectors are those of single frames"
            if side == "image"
            else "captions do not read them"
        )
    )
    return TEMPORAL


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
