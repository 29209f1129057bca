"""Vision models of transformers, read onto timm's: the names of their tensors, and what only their folder says."""
