"""The checkpoints of UniPT's release (arXiv 2308.14316): a reader per model that it was published with.

Which one is seen by the keys. A file of two sides (pictures and text) is read for the side that the backbone
is. Frozen tensors in the file must be the backbone's; where the file has none, or the backbone is `states`,
there is nothing to compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import IncompatibleArtefact
from ...tensor_files import read_saved
from ..containers import arguments_of
from ..foreign import some
from .clip4clip import read_clip4clip
from .clip_vil import read_clip_vil
from .mdetr import read_mdetr
from .parts import weights_of
from .vse import read_vse

if TYPE_CHECKING:
    from pathlib import Path

    from ...backbone import Backbone
    from ..foreign import Foreign
    from ..settings import Settings


INSIDE = (".adapter.adapters.", ".lora_As.", ".lora_Bs.")  # of --use_adapter and --use_lora
MASKS = "detr."  # in front of MDETR's names where a model that draws masks holds it
MDETR = ("transformer.side_", f"{MASKS}transformer.side_")


def read_unipt(path: Path, backbone: Backbone, settings: Settings) -> Foreign:
    """Branches of a UniPT checkpoint.

    Raises:
        IncompatibleArtefact: The file is none of UniPT's, or of another backbone.
    """
    file = read_saved(path)
    saved, options = weights_of(path, file), arguments_of(file, ("opt", "args"))
    merged = {key: tensor for state in saved for key, tensor in state.items()}
    if any(key.startswith(("image_adapter.", "text_adapter.")) for key in merged):
        return read_clip4clip(path, backbone, merged, settings)
    if any("encoder.side_" in key for key in merged):
        return read_clip_vil(path, backbone, merged)
    if any(key.startswith(MDETR) for key in merged):
        inner = {key.removeprefix(MASKS): tensor for key, tensor in merged.items()}
        return read_mdetr(path, backbone, inner, options)
    if any(key.startswith(("side_tuning_module.", "gpool.", "image_encoder.")) for key in merged):
        return read_vse(path, backbone, saved, options, settings)
    if inner := sorted(key for key in merged if any(part in key for part in INSIDE)):
        raise IncompatibleArtefact(
            "the tuners of this file stand inside CLIP-ViL's BERT, and only its side network is read",
            where=path,
            wanted="a run with --use_side_transformers",
            found=some(inner),
        )
    raise IncompatibleArtefact(
        "the file is no checkpoint of UniPT",
        where=path,
        wanted="keys such as side_tuning_module., image_adapter., encoder.side_ or transformer.side_",
        found=", ".join(list(merged)[:3]) or "no tensors",
    )
