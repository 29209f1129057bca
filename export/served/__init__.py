"""Graphs that a server runs without code of ours: `serving` hands them to a Triton repository."""

from .names import task_names
from .pictures import picture_graph
from .wrapping import serve_graph

__all__ = ["picture_graph", "serve_graph", "task_names"]
