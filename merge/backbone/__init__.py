"""The frozen backbone: a timm model, or one of `architectures`, and where it came from.

`wrap` freezes a model that is in memory, `create` makes one with random weights, `load` and `save` are files.
"""

from .folder import load, save
from .frozen import Backbone, Identity, create, dtype_of, fingerprint, wrap

__all__ = ["Backbone", "Identity", "create", "dtype_of", "fingerprint", "load", "save", "wrap"]
