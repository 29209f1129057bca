"""MDETR with UniPT: boxes and their classes from a picture's map and a text's tokens.

Two side networks: one on the encoder, whose answer is the memory of the other, on the decoder. The release
reads the states in front of layers 1, 3 and 5, and its evaluation uses the averaged weights. The three
other outputs of its decoder side are for training only and are not computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import IncompatibleArtefact
from ...tuner import Branch, Point
from ...tuners.perceptron import Perceptron
from ...tuners.unipt import UniPT
from ..foreign import Foreign
from .mdetr_run import require_carried
from .parts import Checkpoint, made, outputs, require_trunk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ...backbone import Backbone
    from ...tuner import Weights

SIDE = "transformer.side_"
LAYERS = (1, 3, 5)  # the states in front of these are targets
EPS = 1e-7
HEADS = ("class_embed.", "bbox_embed.")
TRUNK = ("transformer.", "query_embed.", "input_proj.", "backbone.")
TRAINING = ("contrastive_align_",)  # projections that only its losses read


def read_mdetr(
    path: Path, backbone: Backbone, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Foreign:
    """Branches of an MDETR checkpoint with its side networks.

    Args:
        path: The file.
        backbone: MDETR's trunk.
        state: Tensors of the file.
        options: Of the run.

    Raises:
        IncompatibleArtefact: The file lacks a part, is of another backbone, or of a run that cannot be carried.
    """
    model = backbone.model
    if not hasattr(model, "decoder_hidden_states"):
        raise IncompatibleArtefact(
            "the file belongs to an encoder and a decoder, and the backbone has none",
            where=path,
            wanted="mdetr",
            found=backbone.identity.architecture,
            do="load the backbone that it was trained on",
        )
    require_carried(path, backbone, state, options)
    found = Foreign("UniPT MDETR", labels=())
    mask, memory = Point("encoder_mask", "output"), Point("side_memory", "output")
    encoder = outputs(model.hidden_states)  # type: ignore[arg-type]
    decoder = outputs(model.decoder_hidden_states)  # type: ignore[arg-type]
    file = Checkpoint(path, state)
    w = _network(file, "encoder")
    targets = _targets(path, encoder)
    tuner = _tuner(path, w, len(targets), masked=True)
    found.plant(
        "side_memory/unipt",
        Branch(tuner, targets[0], memory, (*targets[1:], encoder[-1], mask)),
        {name: w[name] for name in tuner.shapes},
    )
    w = _network(file, "decoder")
    for number in range(len(LAYERS)):
        crosser = f"{SIDE}projection_crosser.{number}"
        w |= file.linear(f"{crosser}.0", f"cross{number}", norm=f"{crosser}.1")
    final = f"{SIDE}final_upsample"
    w |= file.linear(f"{final}.1", "up", norm=f"{final}.2")
    targets = _targets(path, decoder)
    tuner = _tuner(path, w, len(targets), crossed=True)
    found.plant(
        "features/unipt",
        Branch(
            tuner,
            targets[0],
            Point("features", "output"),
            (*targets[1:], decoder[-1], memory, mask),
        ),
        {name: w[name] for name in tuner.shapes},
    )
    _heads(file, backbone, found)
    trunk = {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith((SIDE, *HEADS, *TRAINING, "backbone."))
    }
    require_trunk(path, backbone, trunk, found)
    file.require_seen(*TRUNK, *TRAINING, own=SIDE)
    return found


def _targets(path: Path, states: Sequence[Point]) -> list[Point]:
    """The states in front of `LAYERS`, as far as there are such layers; the last state is the anchor.

    Raises:
        IncompatibleArtefact: There is none.
    """
    targets = [states[layer] for layer in LAYERS if layer < len(states) - 1]
    if not targets:
        raise IncompatibleArtefact(
            "the backbone has no layer whose input the side network reads",
            where=path,
            wanted=f"at least {LAYERS[0] + 1} layers in the encoder, and in the decoder",
            found=len(states) - 1,
            do="load the backbone that it was trained on",
        )
    return targets


def _network(file: Checkpoint, half: str) -> Weights:
    """Down, projection and gate of one half."""
    w: Weights = {"gate": file.gate(f"{SIDE}gate_layer_{half}")}
    anchor = f"{SIDE}downsample0_{half}"
    w |= file.linear(f"{anchor}.0", "anchor", norm=f"{anchor}.1")
    for number in range(len(LAYERS)):
        down = f"{SIDE}downsamples_{half}.{number}"
        w |= file.linear(f"{down}.0", f"target{number}", norm=f"{down}.1")
    project = f"{SIDE}projection_{half}"
    w |= file.linear(f"{project}.0", "project_in")
    return w | file.linear(f"{project}.2", "project", norm=f"{project}.3")


def _tuner(
    path: Path, w: Weights, depth: int, *, masked: bool = False, crossed: bool = False
) -> UniPT:
    width, hidden = w["anchor_weight"].shape
    up = w.get("up_weight")
    return made(
        path,
        UniPT,
        widths=(hidden,) * depth,
        anchor=hidden,
        width=width,
        out=width if up is None else up.shape[0],
        eps=EPS,
        project="mlp",
        inner=w["project_in_weight"].shape[0],
        up="none" if up is None else "relu",
        up_norm=up is not None,
        masked=masked,
        crossed=crossed,
    )


def _heads(file: Checkpoint, backbone: Backbone, found: Foreign) -> None:
    """Classes, one linear layer, and boxes, several with a ReLU between them."""
    classes = file.linear("class_embed", "classes")
    found.plant_head(backbone, classes["classes_weight"], classes["classes_bias"])
    depth = file.count("bbox_embed.layers.")
    layers: Weights = {}
    for number in range(depth):
        layers |= file.linear(f"bbox_embed.layers.{number}", f"layer{number}")
    hidden = tuple(layers[f"layer{n}_weight"].shape[0] for n in range(depth - 1))
    boxes = Point("bbox_embed", "input"), Point("bbox_embed", "output")
    found.plant("bbox_embed/head", Branch(Perceptron(hidden), *boxes), layers)
