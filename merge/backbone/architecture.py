"""The model of an architecture: one of timm's, or of `architectures`, as its arguments say."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from ..architectures import ARCHITECTURES, find
from ..errors import UsageError
from .transformers.config import EPS, set_eps

if TYPE_CHECKING:
    from collections.abc import Mapping


def make(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model with random initial weights.

    Args:
        architecture: timm's name, or that of `architectures`.
        arguments: What it is created with; `layer_norm_eps` is taken by all of timm's.

    Raises:
        UsageError: There is no such architecture, or it refuses the arguments.
    """
    own = known(architecture)
    try:
        if own is not None:
            return own(**arguments)
        arguments = dict(arguments)
        eps = arguments.pop(EPS, None)
        model = timm.create_model(architecture, pretrained=False, **arguments)
        if eps is not None:
            set_eps(model, float(eps))
        return model
    except (TypeError, ValueError, AssertionError) as cause:
        raise UsageError(
            f"{'timm' if own is None else own.__name__} cannot create the backbone with these arguments",
            where=architecture,
            found=f"{arguments}: {cause}",
            do="check the --backbone-arg values"
            if own is None
            else f"it takes {', '.join(inspect.signature(own).parameters)}",
        ) from cause


def known(architecture: str) -> type[nn.Module] | None:
    """The class of one of our architectures; None for timm's.

    Raises:
        UsageError: There is no such architecture.
    """
    own = find(architecture)
    if own is None and not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, [*ARCHITECTURES, *timm.list_models()], n=5)
        raise UsageError(
            "there is no such architecture, neither in timm nor in merge/architectures",
            found=architecture,
            do=f"for example {', '.join(close)}"
            if close
            else f"see timm.list_models(), or {', '.join(ARCHITECTURES)}",
        )
    return own


def features_of(model: nn.Module) -> int | None:
    """How many features timm's classifier reads, where the model says it."""
    return getattr(model, "head_hidden_size", getattr(model, "num_features", None))


def classifiers_of(model: nn.Module, architecture: str) -> tuple[str, ...]:
    """Paths of the modules that turn features into logits.

    One of ours may be more than a linear layer: a head stands in for what the module gives, whatever it is.

    Raises:
        UsageError: There is none, or timm's is not a linear layer.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    classifiers = (named,) if isinstance(named, str) else tuple(named or ())
    if not classifiers:
        raise UsageError(
            "the backbone has no classifier for the tasks' heads to replace",
            where=architecture,
            wanted="a classifier in timm's configuration of the architecture",
            found=named,
        )
    for classifier in () if architecture in ARCHITECTURES else classifiers:
        if not isinstance(model.get_submodule(classifier), nn.Linear | nn.Identity):
            raise UsageError(
                "the backbone's classifier is not one linear layer, which is what a task's head replaces",
                where=f"{architecture}: {classifier}",
                found=type(model.get_submodule(classifier)).__name__,
            )
    return classifiers
