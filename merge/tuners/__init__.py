"""SHELF: the tuner types. A new one is a file here and a line in this table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bias import Bias
from .bottleneck import Bottleneck
from .bypass import Bypass
from .difference import Difference
from .gain import Gain
from .head import Head
from .kronecker import Kronecker
from .norm import Norm
from .prefix import Prefix
from .prompt import Prompt
from .rotation import Rotation
from .side_network import SideNetwork

if TYPE_CHECKING:
    from ..tuner import Tuner

TUNERS: dict[str, type[Tuner]] = {
    tuner.kind: tuner
    for tuner in (
        Bottleneck,
        Kronecker,
        Rotation,
        Gain,
        Bias,
        Norm,
        Prefix,
        Prompt,
        SideNetwork,
        Bypass,
        Difference,
        Head,
    )
}
