"""Gauges that Prometheus sees for as long as a process lives.

Knows nothing of what they show.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray.util.metrics import Gauge

if TYPE_CHECKING:
    pass


# A process reports to the agent once a second or less often.
REPEAT_S = 0.5


class Gauges:
    """Gauges by figure, exposed for as long as the process lives; a value of None is not.

    Ray sends a value to the agent once, and the agent forgets it after two reports without one. So
    a thread sets each again and again: else a slow step would look like a run that has ended.
    """

    def __init__(self, gauges: Mapping[str, Gauge]) -> None:
        self._gauges = gauges
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float | None] = {}
        self._changing = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._repeat, name="gauges", daemon=True).start()

    def set(self, figures: Mapping[str, float | None], **tags: str) -> None:
        with self._changing:
            for figure, value in figures.items():
                self._values[figure, tuple(tags.items())] = value
                self._gauges[figure].set(value, tags)

    def close(self) -> None:
        """Stop exposing them."""
        self._closed.set()

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_S):
            with self._changing:
                for (figure, tags), value in self._values.items():
                    self._gauges[figure].set(value, dict(tags))
