"""Expose Prometheus gauges for as long as a process lives.

Does not know what the gauges show.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ray.util.metrics import Gauge

# Seconds between repeats. A process reports to the agent at most once a second.
REPEAT_S = 0.5


class Gauges:
    """Gauges by name, exposed until close or the end of the process.

    Ray sends a value to the agent once, and the agent drops it after two reports without it. A
    thread therefore sets every value repeatedly, so that a slow step does not look like an ended
    run.
    """

    def __init__(self, gauges: Mapping[str, Gauge]) -> None:
        self._gauges = gauges
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float | None] = {}
        self._changing = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._repeat, name="gauges", daemon=True).start()

    def set(self, figures: Mapping[str, float | None], **tags: str) -> None:
        """Set values by the gauges' names, under these tags; None stops exposing a gauge."""
        with self._changing:
            for figure, value in figures.items():
                self._values[figure, tuple(tags.items())] = value
                self._gauges[figure].set(value, tags)

    def close(self) -> None:
        """Stop repeating the values, so that the agent drops them."""
        self._closed.set()

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_S):
            with self._changing:
                for (figure, tags), value in self._values.items():
                    self._gauges[figure].set(value, dict(tags))
