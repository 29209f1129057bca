"""The counters' series as Prometheus reads them; the text is written by Prometheus' own client library.

A collector reads the counters when it is asked; `series.py` says what there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .series import COUNTER, METRICS, SUFFIXES, BankFacts, Family, Model, bank_facts, samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["METRICS", "SUFFIXES", "BankFacts", "Family", "Model", "bank_facts", "exposition"]


def exposition(models: Sequence[Model], accept: str = "") -> tuple[bytes, str]:
    """The metrics of all models as text.

    Args:
        models: What is served, under different names.
        accept: The request's `Accept` header: OpenMetrics where it is asked for, else Prometheus' own text.

    Returns:
        The body and its content type.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(models))
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none: the library stumbles over it
        encode, content_type = choose_encoder("")
    body = encode(registry)
    if content_type.startswith("text/plain"):
        body = body.replace(b" untyped\n", b" counter\n")  # see `_begin`; labels hold no line's end
    return body, content_type


class _Collector(Collector):
    """Reads the models once per scrape."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Every family that has a series."""
        families = {name: _begin(name, family) for name, family in METRICS.items()}
        for model in self._models:
            for family, name, labels, value in samples(model):
                families[family].add_sample(name, labels, value)
        return (metric for metric in families.values() if metric.samples)


def _begin(name: str, family: Family) -> Metric:
    """The family without series.

    A counter of OpenMetrics must end in `_total`, and the library appends that to its name. Triton's
    counters do not, and keep their name only as `unknown`, which is what they are in OpenMetrics.
    """
    if family.kind == COUNTER and not name.endswith("_total"):
        return Metric(name, family.text, "unknown")
    return Metric(name.removesuffix("_total"), family.text, family.kind)
