"""What a replica reports while it works: every metric's name and meaning, once.

Ray's agent on each node exposes them to Prometheus with ray_ before the name, and _total behind a
counter's. Knows nothing of how a figure is computed.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrm.serving.drift import RECENT, RecentRewards

if TYPE_CHECKING:
    from rayrm.model.engine import RewardModel
    from rayrm.rows import Rewards
    from rayrm.serving.chunk import Chunk
    from rayrm.serving.record import Trial
    from rayrm.serving.shadow import Difference
from rayrm.gauges import Gauges

# Gauge of a replica.
QUEUE = {
    "waiting_tokens": "Tokens of rows that callers wait for: held back, queued or being computed",
}

# Gauges of a reward's version that a replica holds.
VERSION = {
    "current": "1 for the version that answers, 0 for one that is held besides",
    "held_out_mean": "Mean reward of the held-out responses, as the export says",
    "held_out_std": "Standard deviation of the held-out responses' rewards, as the export says",
}

# Gauges of a reward's version, over its latest rows that this replica scored: those of drift.Drift.
DRIFT = {
    "reward_mean": f"Mean of the latest {RECENT} rewards",
    "reward_std": f"Standard deviation of the latest {RECENT} rewards",
    "response_tokens": "Mean length of the responses that got them, about",
    "reward_length_correlation": "Pearson's correlation of reward and length over them",
    "repeated_responses": "Share of them whose response is equal to one before",
}

# Gauges of a version in the shadow, over the latest rows: those of shadow.Difference.
SHADOW = {
    "shadow_mean_shift": "Mean reward in the shadow less that of the current version",
    "shadow_rank_correlation": "Spearman's rank correlation of its rewards with the current ones",
    "shadow_disagreement": "Share of pairs of responses to one prompt ordered differently",
}
LATENCY_BOUNDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]


class ServeMetrics:
    """Figures of a replica, which Serve tags with its application, deployment and name."""

    def __init__(self) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram  # only now: training has no Serve

        self.requests = Counter("rayrm_serve_requests", "Requests: chunks of callers' steps")
        self.rows = Counter("rayrm_serve_rows", "Rows of all requests, those with an error too")
        self.tokens = Counter("rayrm_serve_tokens", "Tokens of scored rows, each prompt once")
        self.tokens_unshared = Counter(
            "rayrm_serve_tokens_unshared", "Tokens of the same rows, each row by itself"
        )
        self.latency = Histogram(
            "rayrm_serve_latency_seconds",
            "Seconds from a request's arrival to its answer",
            LATENCY_BOUNDS,
        )
        self.errors = Counter(
            "rayrm_serve_errors", "Rows without a reward, by the error's type", ("kind",)
        )
        self.refusals = Counter(
            "rayrm_serve_refusals", "Requests sent back to be sent again, by reason", ("kind",)
        )
        self.rows_found = Counter(
            "rayrm_serve_rows_found", "Rows not computed, since their reward was known or coming"
        )
        self.unshadowed = Counter(
            "rayrm_serve_unshadowed_rows", "Rows that a version in the shadow had no time to score"
        )
        of_version: Any = ("reward", "version")  # Ray's type says a tuple of one
        self.gauges = Gauges(
            {
                figure: Gauge(f"rayrm_serve_{figure}", meaning, tags)
                for tags, figures in ((None, {**QUEUE, **SHADOW}), (of_version, VERSION | DRIFT))
                for figure, meaning in figures.items()
            }
        )
        self._shadow: Trial | None = None
        self._found = 0
        self._waiting = 0
        self._latest: dict[tuple[str, str], RecentRewards] = {}

    @contextmanager
    def request(self, rows: int) -> Iterator[None]:
        """Count a request and time it until the block is left; count what it raises."""
        started = time.perf_counter()
        self.requests.inc()
        self.rows.inc(rows)
        try:
            yield
        except Exception as error:
            self.errors.inc(rows, {"kind": type(error).__name__})
            raise
        finally:
            self.latency.observe(time.perf_counter() - started)

    @contextmanager
    def waiting(self, tokens: int, unshared: int) -> Iterator[None]:
        """Report tokens as waiting until the block is left, then count them as computed.

        unshared: how many they would be with every row by itself.
        """
        self._waiting += tokens
        self.gauges.set({"waiting_tokens": self._waiting})
        try:
            yield
            if tokens:  # a counter refuses 0
                self.tokens.inc(tokens)
                self.tokens_unshared.inc(unshared)
        finally:
            self._waiting -= tokens
            self.gauges.set({"waiting_tokens": self._waiting})

    def refused(self, refusal: Exception) -> None:
        self.refusals.inc(1, {"kind": type(refusal).__name__})

    def found(self, rows: int) -> None:
        """Report how many rows were answered from the cache since the replica started."""
        if rows > self._found:
            self.rows_found.inc(rows - self._found)
        self._found = rows

    def compared(self, difference: Difference) -> None:
        """Report how the rewards of the shadow differ; a figure that is NaN is not shown."""
        told = {figure: getattr(difference, figure.removeprefix("shadow_")) for figure in SHADOW}
        self.gauges.set({k: None if np.isnan(v) else v for k, v in told.items()})

    def holds(
        self, models: Iterable[RewardModel], current: RewardModel, shadow: Trial | None
    ) -> None:
        """Report which versions of each reward are loaded, and which one answers."""
        answering = {(name, of.version) for name, of in current.rewards.items()}
        held = {(name, of.version): of.export for m in models for name, of in m.rewards.items()}
        for which, export in held.items():
            self._tell(which, {"current": float(which in answering)})
            if export:
                means = {"held_out_mean": export.reward_mean, "held_out_std": export.reward_std}
                self._tell(which, means)
        for which in self._latest.keys() - held.keys():
            self._tell(which, dict.fromkeys(VERSION | DRIFT))
        self._latest = {which: self._latest.get(which) or RecentRewards() for which in held}
        if shadow != self._shadow:
            self.gauges.set(dict.fromkeys(SHADOW))
        self._shadow = shadow

    def scored(self, reward: str, rewards: Rewards, chunk: Chunk) -> None:
        """Report a chunk's rewards of that name."""
        for kind, count in Tally(type(e).__name__ for e in rewards.errors if e).items():
            self.errors.inc(count, {"kind": kind})
        which = reward, rewards.versions[0]
        if latest := self._latest.get(which):  # a version may be dropped while it scores the last
            rows = np.repeat(np.arange(len(rewards)), chunk.copies)
            responses = chunk.responses
            latest.add(rewards.values[rows], responses.tokens[rows], responses.hashes[rows])
            if drift := latest.drift():
                self._tell(which, asdict(drift))

    def _tell(self, which: tuple[str, str], figures: Mapping[str, float | None]) -> None:
        self.gauges.set(figures, reward=which[0], version=which[1])
