"""SHELF: the tuner types. A new one is a file here and a line in this table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bias import Bias
from .bottleneck import Bottleneck
from .bypass import Bypass
from .class_and_mean import ClassAndMean
from .difference import Difference
from .embedding import Embedding
from .gain import Gain
from .gpo import Gpo
from .head import Head
from .kronecker import Kronecker
from .ladder import Ladder
from .norm import Norm
from .perceptron import Perceptron
from .prefix import Prefix
from .prompt import Prompt
from .rotation import Rotation
from .side_network import SideNetwork
from .unipt import UniPT
from .unipt_pyramid import UniPTPyramid

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
        UniPT,
        UniPTPyramid,
        Ladder,
        Gpo,
        Difference,
        Head,
        ClassAndMean,
        Perceptron,
        Embedding,
    )
}
