"""The number that stands for a class which a task does not have, known to those who run without torch too."""

from __future__ import annotations

import numpy as np

NO_CLASS = float(np.finfo(np.float32).min) / 4
"""A logit; two may be summed. An engine in float16 gives that type's lowest number instead."""
