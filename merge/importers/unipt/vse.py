"""VSE-infinity with UniPT: BERT or a CNN, the side network, GPO pooling, a vector of unit length.

`model_best.pth` holds two states, of pictures and of text. The side network of the text reads the embeddings
and every layer of BERT, the last as the anchor; that of the pictures the four stages of a CNN. Both release
their epsilons in the code: 1e-8 in the L1 norms and in the length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import IncompatibleArtefact
from ...methods.side_networks import hidden_states
from ...sites import measure
from ...tuner import Branch, Point
from ...tuners.embedding import Embedding
from ...tuners.gpo import BACK, GRU, Gpo
from ...tuners.unipt import UniPT
from ...tuners.unipt_pyramid import UniPTPyramid
from ..foreign import Foreign, refuse
from .parts import Checkpoint, made, require_states, require_trunk

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
DOWNS = f"{SIDE}downsample_layers.0.0."
COPIES = ("backbone.base.", "backbone.top.")  # of modules under backbone.resnet
POOLER = "bert.pooler."  # which nothing reads
EPS = 1e-8


def read_vse(
    path: Path,
    backbone: Backbone,
    saved: Sequence[Mapping[str, Tensor]],
    options: Mapping[str, Any],
    settings: Settings,
) -> Foreign:
    """Branches of one side of a VSE-infinity checkpoint.

    Args:
        path: The file.
        backbone: The text's or the pictures' trunk; it decides which side is read.
        saved: The states in the file.
        options: Of the run. `no_txtnorm` leaves the length of a text's vector as it is; that of a picture's is always
            one, whatever `no_imgnorm` says.
        settings: `no_norm`, in place of the options.

    Raises:
        IncompatibleArtefact: The file has no such side, or is of another backbone.
    """
    sites = measure(backbone)
    states = hidden_states(backbone, sites)
    maps = bool(states.cells)
    side = "image" if maps else "text"
    state = _side(path, saved, side)
    file = Checkpoint(path, state)
    found = Foreign(f"UniPT VSE-infinity ({side})", labels=())
    add = Point(backbone.classifiers[0], "input")
    out, tap = states.channels[-1], states.points[-1]
    if any(key.startswith(SIDE) for key in state):
        out, tap = _side_network(file, states, add, found), add
    pool = next((p for p in POOLS.values() if f"{p}.linear.weight" in state), POOLS[side])
    _gpo(file, pool, states, tap, add, found)
    said = {"no_norm": options.get("no_txtnorm")} if side == "text" else {}
    unit = not (settings.get("no_norm", bool, said) or False)
    answer = Branch(Embedding(out, unit, EPS), add, Point(add.module, "output"))
    found.plant(f"{add.module}/embedding", answer, {})
    trunk = {
        key.removeprefix("backbone.resnet."): tensor
        for key, tensor in state.items()
        if key.startswith(TRUNKS[side]) and not key.startswith(COPIES)
    }
    require_trunk(path, backbone, trunk, found, outside=(POOLER,))
    file.require_seen(TRUNKS[side])
    if maps:
        found.notes["pictures"] = (
            "the release stretches pictures to the backbone's size, without keeping their shape"
        )
    return found


def _side(path: Path, saved: Sequence[Mapping[str, Tensor]], side: str) -> Mapping[str, Tensor]:
    """The state of a side: by its pooling's name where there is one, by the form of its layers otherwise."""
    pools = tuple(f"{pool}." for pool in POOLS.values())
    found = []
    for state in saved:
        downs = (key for key in state if key.startswith(DOWNS) and key.endswith(".weight"))
        first = next(downs, None)
        if first is None and any(key.startswith(pools) for key in state):
            return state  # pooling alone
        if first is not None:
            found.append("image" if state[first].dim() == 4 else "text")
            if found[-1] == side:
                return state
    raise IncompatibleArtefact(
        f"the file has no {side} side, and the backbone is one of {side}",
        where=path,
        wanted=f"a state of the {side} side",
        found=" and ".join(found) or "no side network",
        do="load the backbone of the other side",
    )


def _side_network(file: Checkpoint, states: States, add: Point, found: Foreign) -> int:
    """Plant the network; the channels that it gives."""
    depth = file.count(f"{SIDE}downsample_layers.")
    require_states(file.path, states.points, depth)
    if not states.cells and states.mask is None:
        raise refuse(
            file.path,
            "captions are padded, and the backbone has no mask of what is real",
            found="hidden states alone",
            do="add --backbone-arg mask=true",
        )
    w: Weights = {"gate": file.gate(f"{SIDE}gate_layer")}
    batch = bool(states.cells)
    names = [*(f"target{n}" for n in range(depth - 1)), "anchor"]
    for number, name in enumerate(names):
        down = f"{SIDE}downsample_layers.{number}"
        w |= file.linear(f"{down}.0", name, norm=f"{down}.1", batch=batch)
    project = f"{SIDE}projection_layer"
    w |= file.linear(f"{project}.0", "project", norm=f"{project}.1", batch=batch)
    w |= file.linear(f"{SIDE}upsample_layer.1", "up")
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
            w |= file.linear(f"{SIDE}identity_layers.{number}.0", f"cell{number}")
        tuner: UniPT = made(
            file.path,
            UniPTPyramid,
            **fields,
            norm="batch",
            cells=states.cells,
            channels_last=states.channels_last,
        )
    else:
        tuner = made(file.path, UniPT, **fields, masked=states.mask is not None)
        others = (*others, *([states.mask] if states.mask else []))
    found.plant(f"{add.module}/unipt", Branch(tuner, states.points[0], add, others), w)
    return w["up_weight"].shape[0]


def _gpo(
    file: Checkpoint,
    pool: str,
    states: States,
    tap: Point,
    add: Point,
    found: Foreign,
) -> None:
    """Plant the pooling."""
    axes = {name: [None] * (2 if name.startswith("weight") else 1) for name in GRU}
    w = {
        f"{name}{end}": file.take(f"{pool}.gru.{name}_l0{end}", *axes[name])
        for name in GRU
        for end in ("", BACK)
    }
    w["score"] = file.gate(f"{pool}.linear")
    three, positions = w["weight_ih"].shape
    sizes = states.tokens, positions, three // 3
    tuner = made(file.path, Gpo, *sizes, masked=states.mask is not None)
    others = () if states.mask is None else (states.mask,)
    found.plant(f"{add.module}/gpo", Branch(tuner, tap, add, others), w)
