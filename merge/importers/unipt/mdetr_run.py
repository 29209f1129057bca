"""What an MDETR run was called with, `args` in its file, where that changes what the weights answer.

Sizes stand in the tensors; heads, and the options below, do not. https://github.com/Paranioar/UniPT, part MDETR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import IncompatibleArtefact
from ..foreign import some

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ...backbone import Backbone


class Refused(NamedTuple):
    """A form of MDETR that is not carried.

    Attributes:
        option: Its name among the arguments.
        values: What says that it is on.
        keys: How names of tensors begin, or end, that say so too.
        reason: Why.
        wanted: Instead.
    """

    option: str
    values: tuple[object, ...]
    keys: tuple[str, ...]
    reason: str
    wanted: str


FORMS = (
    Refused(
        "pass_pos_and_query",
        (False,),
        (),
        "the released code stops with an error without it: it lengthens positions that are no longer there",
        "pass_pos_and_query true, so without --no_pass_pos_and_query",
    ),
    Refused(
        "pre_norm",
        (True,),
        ("transformer.encoder.norm.",),
        "the released code has no decoder with norms in front",
        "norms behind the sums, so without --pre_norm",
    ),
    Refused(
        "contrastive_loss",
        (True,),
        ("transformer.CLS.", "contrastive_projection_"),
        "its encoder reads a token in front of the picture, which the backbone does not have",
        "a run without --contrastive_loss; that of alignment may be on",
    ),
    Refused(
        "position_embedding",
        ("learned", "v3"),
        ("row_embed.weight", "col_embed.weight"),
        "its positions are learned, and the backbone's are sines",
        "position_embedding sine",
    ),
    Refused(
        "masks",
        (True,),
        ("mask_head.", "bbox_attention."),
        "it answers with masks, from maps of the picture's trunk that are no input of the backbone",
        "boxes and their classes alone",
    ),
    Refused(
        "predict_final",
        (True,),
        ("isfinal_embed.",),
        "it answers whether a box is one of those that were asked for, beside classes and boxes",
        "boxes and their classes alone",
    ),
    Refused(
        "do_qa",
        (True,),
        ("qa_embed.", "answer_"),
        "it answers questions, by queries inside the frozen decoder that a task cannot bring",
        "boxes and their classes alone",
    ),
)


def require_carried(
    path: Path, backbone: Backbone, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> None:
    """The run was one whose answers the backbone and the tuners give.

    Raises:
        IncompatibleArtefact: It was not; the error says which option is in the way and why.
    """
    for form in FORMS:
        keys = sorted(k for k in state if k.startswith(form.keys) or k.endswith(form.keys))
        value = options.get(form.option)
        said = any(value == one and type(value) is type(one) for one in form.values)
        if keys or said:
            raise IncompatibleArtefact(
                f"this form of MDETR cannot be carried: {form.reason}",
                where=path,
                wanted=form.wanted,
                found=some(keys) if keys else f"{form.option}={value!r} in its arguments",
            )
    transformer: Any = backbone.model.transformer
    layers = {"enc_layers": transformer.encoder.layers, "dec_layers": transformer.decoder.layers}
    own = {"nheads": transformer.encoder.layers[0].self_attn.heads}
    own |= {name: len(modules) for name, modules in layers.items()}
    if other := [name for name in own if options.get(name, own[name]) != own[name]]:
        raise IncompatibleArtefact(
            "the run had another transformer than the backbone",
            where=path,
            wanted=", ".join(f"{name}={options[name]}" for name in other),
            found=", ".join(f"{name}={own[name]}" for name in other),
            do="load the backbone that it was trained on; its arguments are nhead, num_encoder_layers and "
            "num_decoder_layers",
        )
