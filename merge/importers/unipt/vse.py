"""VSE-infinity with UniPT: BERT or a CNN, the side network, GPO pooling, a vector of unit length.

`model_best.pth` holds two states, of pictures and of text. The side network of the text reads the embeddings
and every layer of BERT, the last as the anchor; that of the pictures the four stages of a CNN. Both release
their epsilons in the code: 1e-8 in the L1 norms and in the length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...methods.side_networks import hidden_states
from ...sites import measure
from ...tuner import Branch, Point
from ...tuners.embedding import Embedding
from ...tuners.gpo import BACK, GRU, Gpo
from ...tuners.unipt import UniPT
from ...tuners.unipt_pyramid import UniPTPyramid
from ..foreign import Foreign, refuse
from .parts import linear, require_known, require_states, require_trunk, take

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ...backbone import Backbone
    from ...methods.side_networks import States
    from ...tuner import Weights
    from ..settings import Settings

SIDE = "side_tuning_module."
POOLS = {"image": "image_encoder", "text": "gpool"}
TRUNKS = {"image": "backbone.", "text": "bert."}
COPIES = ("backbone.base.", "backbone.top.")  # of modules under backbone.resnet
EPS = 1e-8


def read_vse(
    path: Path, backbone: Backbone, saved: Sequence[Mapping[str, Tensor]], settings: Settings
) -> Foreign:
    """Branches of one side of a VSE-infinity checkpoint.

    Args:
        path: The file.
        backbone: The text's or the pictures' trunk; it decides which side is read.
        saved: The states in the file.
        settings: `no_norm`: the vector's length is left as it is.

    Raises:
        IncompatibleArtefact: The file has no such side, or is of another backbone.
    """
    sites = measure(backbone)
    states = hidden_states(backbone, sites)
    maps = bool(states.cells)
    side = "image" if maps else "text"
    state = _side(path, saved, side)
    found = Foreign(f"UniPT VSE-infinity ({side})", labels=())
    add = Point(backbone.classifiers[0], "input")
    out, tap = states.channels[-1], states.points[-1]
    if any(key.startswith(SIDE) for key in state):
        out, tap = _side_network(path, state, states, add, found), add
    pool = next((p for p in POOLS.values() if f"{p}.linear.weight" in state), POOLS[side])
    _gpo(path, state, pool, states, tap, add, found)
    unit = not (settings.get("no_norm", bool) or False)
    answer = Branch(Embedding(out, unit, EPS), add, Point(add.module, "output"))
    found.plant(f"{add.module}/embedding", answer, {})
    trunk = {
        key.removeprefix("backbone.resnet."): tensor
        for key, tensor in state.items()
        if key.startswith(TRUNKS[side]) and not key.startswith(COPIES)
    }
    require_trunk(path, backbone, trunk, found)
    require_known(path, state, (SIDE, *(f"{pool}." for pool in POOLS.values()), *TRUNKS.values()))
    if maps:
        found.notes["pictures"] = (
            "the release stretches pictures to the backbone's size, without keeping their shape"
        )
    return found


def _side(path: Path, saved: Sequence[Mapping[str, Tensor]], side: str) -> Mapping[str, Tensor]:
    """The state of a side: by its pooling's name where there is one, by the form of its layers otherwise."""
    wanted = {"image": 4, "text": 2}[side]
    for state in saved:
        downs = [v.dim() for k, v in state.items() if k.startswith(f"{SIDE}downsample_layers.0.0.w")]
        if downs and downs[0] == wanted:
            return state
        if not downs and any(key.startswith(tuple(f"{p}." for p in POOLS.values())) for key in state):
            return state
    raise refuse(
        path,
        f"the file has no {side} side, and the backbone is one of {side}",
        found=f"{len([s for s in saved if s])} states",
        do="load the backbone of the other side",
    )


def _side_network(
    path: Path,
    state: Mapping[str, Tensor],
    states: States,
    add: Point,
    found: Foreign,
) -> int:
    """Plant the network; the channels that it gives."""
    depth = len({key.split(".")[2] for key in state if key.startswith(f"{SIDE}downsample_layers.")})
    require_states(path, states.points, depth)
    w: Weights = {"gate": take(path, state, f"{SIDE}gate_layer.weight")[0]}
    names = [*(f"target{n}" for n in range(depth - 1)), "anchor"]
    for number, name in enumerate(names):
        down = f"{SIDE}downsample_layers.{number}"
        w |= linear(path, state, f"{down}.0", name, norm=f"{down}.1")
    project = f"{SIDE}projection_layer"
    w |= linear(path, state, f"{project}.0", "project", norm=f"{project}.1")
    w |= linear(path, state, f"{SIDE}upsample_layer.1", "up")
    fields = {
        "widths": tuple(w[f"target{n}_weight"].shape[1] for n in range(depth - 1)),
        "anchor": w["anchor_weight"].shape[1],
        "width": w["anchor_weight"].shape[0],
        "out": w["up_weight"].shape[0],
        "eps": EPS,
    }
    others = states.points[1:]
    if states.cells:
        for number in range(depth - 1):
            w |= linear(path, state, f"{SIDE}identity_layers.{number}.0", f"cell{number}")
        tuner: UniPT = UniPTPyramid(
            **fields, norm="batch", cells=states.cells, channels_last=states.channels_last
        )
    else:
        tuner = UniPT(**fields, masked=states.mask is not None)
        others = (*others, *([states.mask] if states.mask else []))
    found.plant(f"{add.module}/unipt", Branch(tuner, states.points[0], add, others), w)
    return w["up_weight"].shape[0]


def _gpo(
    path: Path,
    state: Mapping[str, Tensor],
    pool: str,
    states: States,
    tap: Point,
    add: Point,
    found: Foreign,
) -> None:
    """Plant the pooling."""
    w = {
        f"{name}{end}": take(path, state, f"{pool}.gru.{name}_l0{end}")
        for name in GRU
        for end in ("", BACK)
    }
    w["score"] = take(path, state, f"{pool}.linear.weight")[0]
    three, positions = w["weight_ih"].shape
    tuner = Gpo(states.tokens, positions, three // 3, masked=states.mask is not None)
    others = () if states.mask is None else (states.mask,)
    found.plant(f"{add.module}/gpo", Branch(tuner, tap, add, others), w)
