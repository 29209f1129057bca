"""The life of tasks while they are served: what comes packed, where it is kept, which of it stands in the bank."""
