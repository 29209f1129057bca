"""SHELF: the tuner types. A new one is a file here and a line in this table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bias import Bias
from .bottleneck import Bottleneck
from .head import Head
from .prefix import Prefix
from .prompt import Prompt

if TYPE_CHECKING:
    from ..tuner import Tuner

TUNERS: dict[str, type[Tuner]] = {
    Bottleneck.kind: Bottleneck,
    Prefix.kind: Prefix,
    Prompt.kind: Prompt,
    Bias.kind: Bias,
    Head.kind: Head,
}
