"""Our series in Triton's own exposition, beside its `nv_` ones.

Triton's Python backend has counters and gauges that are pushed, so a thread pushes once a second what has grown.
A histogram is a counter there for each of its buckets, with the name and the label `le` that it has elsewhere:
queries read the same numbers, and only the exposition's `# TYPE` lines differ. A series cannot be taken back
there: that of a removed task stays as it was, and goes on from there when a task of its name comes.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from ..watching.series import GAUGE, LATE, METRICS, late_samples, samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..watching.series import Model, Sample

log = logging.getLogger(__name__)

SECONDS = 1.0
_OF_TRITON = "nv_"  # families that Triton counts itself: a second one of that name is not to be had


class PushedMetrics:
    """A model's series, pushed until `close`."""

    def __init__(self, triton: Any, model: Model, *, seconds: float = SECONDS) -> None:
        """Start the thread.

        Args:
            triton: The module `triton_python_backend_utils`.
            model: Whose series they are.
            seconds: From one push to the next.
        """
        self._triton = triton
        self._model = model
        self._seconds = seconds
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, ...], tuple[Any, float]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._push_always, name="utune-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Push a last time and end."""
        self._closing.set()
        self._thread.join()

    def _push_always(self) -> None:
        while True:
            last = self._closing.wait(self._seconds)
            try:
                self.push()
            except Exception:  # requests are answered without metrics too
                log.exception("the metrics could not be pushed")
                return
            if last:
                return

    def push(self) -> None:
        """Bring Triton's numbers to where the model's are."""
        there = set()
        for sample in self._samples():
            key = (sample.name, *(part for pair in sample.labels.items() for part in pair))
            there.add(key)
            known, value = self._series.get(key, (None, 0.0))
            if known is None:
                known = self._family(sample).Metric(labels=sample.labels)
            if self._kind(sample) == GAUGE:
                if sample.value != value:
                    known.set(sample.value)
            else:
                value = value if sample.value >= value else 0.0  # a task went and came again
                if sample.value > value:
                    known.increment(sample.value - value)
            self._series[key] = known, sample.value
        for key in self._series.keys() - there:
            self._series[key] = self._series[key][0], 0.0

    def _samples(self) -> Iterator[Sample]:
        for sample in (*samples(self._model), *late_samples(self._model)):
            if not sample.name.startswith(_OF_TRITON):
                yield sample

    def _kind(self, sample: Sample) -> str:
        return (METRICS.get(sample.family) or LATE[sample.family]).kind

    def _family(self, sample: Sample) -> Any:
        family = self._families.get(sample.name)
        if family is None:
            kinds = self._triton.MetricFamily
            family = kinds(
                name=sample.name,
                description=(METRICS.get(sample.family) or LATE[sample.family]).text,
                kind=kinds.GAUGE if self._kind(sample) == GAUGE else kinds.COUNTER,
            )
            self._families[sample.name] = family  # without it the series would go
        return family
