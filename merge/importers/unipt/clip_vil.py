"""CLIP-ViL with UniPT: a BERT over text and picture tokens, answers to questions (VQA, GQA).

The side network's answer is read at the first token only, so that only this one is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...methods.side_networks import hidden_states
from ...sites import measure
from ...tuner import Branch, Point
from ...tuners.perceptron import Perceptron
from ...tuners.unipt import UniPT
from ..foreign import Foreign
from .parts import Checkpoint, made, require_states, require_trunk

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ...backbone import Backbone
    from ...tuner import Weights

TRUNK = "lxrt_encoder.model.bert."
SIDE = f"{TRUNK}encoder.side_"
PICTURES = f"{TRUNK}encoder.visual_model."  # the picture's trunk, which is no part of ours
POSITIONS = f"{TRUNK}encoder.visual_pos."  # where the visual features come with their positions
HEAD = "logit_fc."
EPS = 1e-6
NORM_EPS = 1e-5  # of the side network; BERT's own are 1e-12
HEAD_EPS = 1e-12


def read_clip_vil(path: Path, backbone: Backbone, state: Mapping[str, Tensor]) -> Foreign:
    """Branches of a CLIP-ViL checkpoint with its side network.

    Raises:
        IncompatibleArtefact: The file lacks a part, or is of another backbone.
    """
    state = _full_names(state)
    sites = measure(backbone)
    states = hidden_states(backbone, sites)
    found = Foreign("UniPT CLIP-ViL")
    file = Checkpoint(path, state)
    depth = file.count(f"{SIDE}downsamples_l.")
    require_states(path, states.points, depth + 1)
    first = f"{SIDE}first_downsample_l"
    w: Weights = {"gate": file.gate(f"{SIDE}gate_layer_l")}
    w |= file.linear(f"{first}.0", "target0", norm=f"{first}.1")
    for number in range(depth):
        down = f"{SIDE}downsamples_l.{number}"
        name = "anchor" if number == depth - 1 else f"target{number + 1}"
        w |= file.linear(f"{down}.0", name, norm=f"{down}.1")
    project = f"{SIDE}projection_l"
    w |= file.linear(f"{project}.0", "project_in")
    w |= file.linear(f"{project}.2", "project", norm=f"{project}.3")
    w |= file.linear(f"{SIDE}final_upsample_l.0", "up")
    width, hidden = w["anchor_weight"].shape
    tuner = made(
        path,
        UniPT,
        widths=(hidden,) * depth,
        anchor=hidden,
        width=width,
        out=w["up_weight"].shape[0],
        norm_eps=NORM_EPS,
        eps=EPS,
        project="mlp",
        inner=w["project_in_weight"].shape[0],
        up="linear",
        gives="first",
        masked=True,
    )
    add = Point("features", "output")
    others = (*states.points[1:], Point("mask", "output"))
    found.plant("features/unipt", Branch(tuner, states.points[0], add, others), w)
    head = {
        **file.linear(f"{HEAD}0", "layer0", norm=f"{HEAD}2"),
        **file.linear(f"{HEAD}3", "layer1"),
    }
    classifier = backbone.classifiers[0]
    answers = Perceptron((head["layer0_weight"].shape[0],), "gelu", HEAD_EPS)
    branch = Branch(answers, Point(classifier, "input"), Point(classifier, "output"))
    found.plant(f"{classifier}/head", branch, head)
    trunk = {k: v for k, v in state.items() if k.startswith(TRUNK) and not k.startswith(SIDE)}
    require_trunk(path, backbone, trunk, found, outside=(PICTURES, POSITIONS))
    own = backbone.model.state_dict()
    if any(key.startswith(POSITIONS) and key not in own for key in state):
        found.notes["pictures"] = (
            "the file adds positions to visual features, and the backbone takes them as they come"
        )
    file.require_seen(TRUNK, own=SIDE)
    return found


def _full_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the whole model, also of a file that holds the inner part alone."""
    return {
        f"lxrt_encoder.model.{key}" if key.startswith("bert.") else key: tensor
        for key, tensor in state.items()
    }
