"""Report a replica's metrics; each one's name and meaning is defined here.

Ray's agent on each node exposes them to Prometheus with the prefix ray_, counters with the suffix
_total. Does not know how a figure is computed.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

# Gauges of each reward's versions that a replica holds.
VERSION = {
    "current": "1 for the version that answers, 0 for any other that the replica holds",
    "held_out_mean": "Mean reward of the export's held-out responses",
    "held_out_std": "Standard deviation of the rewards of the export's held-out responses",
}

# Gauges of each reward's versions, over the latest rows that this replica scored: drift.Drift.
DRIFT = {
    "reward_mean": f"Mean of the latest {RECENT} rewards",
    "reward_std": f"Standard deviation of the latest {RECENT} rewards",
    "response_tokens": f"Approximate mean response length over the latest {RECENT} rewards, tokens",
    "reward_length_correlation": (
        f"Pearson correlation of reward and response length over the latest {RECENT} rewards"
    ),
    "repeated_responses": f"Share of the latest {RECENT} responses that equal an earlier one",
}

# Gauges of the shadow deployment, over the latest rows: shadow.Difference.
SHADOW = {
    "shadow_mean_shift": "Mean reward of the shadow minus that of the current version",
    "shadow_rank_correlation": "Spearman rank correlation of the shadow's and the current rewards",
    "shadow_disagreement": (
        "Share of pairs of responses to one prompt that the shadow orders differently"
    ),
}
LATENCY_BOUNDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]


class ServeMetrics:
    """The metrics of a replica, which Serve tags with application, deployment and replica."""

    def __init__(self) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram  # here: training does without Serve

        self.requests = Counter("rayrm_serve_requests", "Requests: chunks of callers' steps")
        self.rows = Counter("rayrm_serve_rows", "Rows of all requests, failed rows included")
        self.tokens = Counter("rayrm_serve_tokens", "Tokens of scored rows, each prompt once")
        self.tokens_unshared = Counter(
            "rayrm_serve_tokens_unshared", "Tokens of scored rows, the prompt once for every row"
        )
        self.latency = Histogram(
            "rayrm_serve_latency_seconds",
            "Seconds from a request's arrival to its answer",
            LATENCY_BOUNDS,
        )
        self.errors = Counter(
            "rayrm_serve_errors", "Rows without a reward, by type of error", ("kind",)
        )
        self.refusals = Counter(
            "rayrm_serve_refusals", "Requests refused, to be sent again, by reason", ("kind",)
        )
        self.rows_found = Counter(
            "rayrm_serve_rows_found",
            "Rows not computed, since their reward was known or in flight",
        )
        self.unshadowed = Counter(
            "rayrm_serve_unshadowed_rows", "Rows that the shadow had no time to score"
        )
        gauges = {
            figure: Gauge(f"rayrm_serve_{figure}", meaning)
            for figure, meaning in (QUEUE | SHADOW).items()
        }
        version_tags: Any = ("reward", "version")  # Ray's annotation allows only one tag
        for figure, meaning in (VERSION | DRIFT).items():
            gauges[figure] = Gauge(f"rayrm_serve_{figure}", meaning, version_tags)
        self.gauges = Gauges(gauges)
        self._shadow: Trial | None = None
        self._found = 0
        self._waiting = 0
        self._latest: dict[tuple[str, str], RecentRewards] = {}

    @contextmanager
    def request(self, rows: int) -> Iterator[None]:
        """Count a request, time it until the block is left, and count an error it raises."""
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

        unshared: number of tokens if every row was computed alone.
        """
        self._waiting += tokens
        self.gauges.set({"waiting_tokens": self._waiting})
        try:
            yield
            if tokens:  # Counter.inc raises for 0
                self.tokens.inc(tokens)
                self.tokens_unshared.inc(unshared)
        finally:
            self._waiting -= tokens
            self.gauges.set({"waiting_tokens": self._waiting})

    def refused(self, refusal: Exception) -> None:
        """Count a refused request by the type of the refusal."""
        self.refusals.inc(1, {"kind": type(refusal).__name__})

    def found(self, rows: int) -> None:
        """Report the number of rows answered from the cache since the replica started."""
        if rows > self._found:
            self.rows_found.inc(rows - self._found)
        self._found = rows

    def compared(self, difference: Difference) -> None:
        """Report how the shadow's rewards differ; a figure that is NaN is not exposed."""
        values = {name: getattr(difference, name.removeprefix("shadow_")) for name in SHADOW}
        self.gauges.set({k: None if np.isnan(v) else v for k, v in values.items()})

    def holds(
        self, models: Iterable[RewardModel], current: RewardModel, shadow: Trial | None
    ) -> None:
        """Report which versions of each reward are loaded, and which one answers."""
        answering = {(name, reward.version) for name, reward in current.rewards.items()}
        held = {
            (name, reward.version): reward.export
            for model in models
            for name, reward in model.rewards.items()
        }
        for tags, export in held.items():
            self._set(tags, {"current": 1.0 if tags in answering else 0.0})
            if export:
                held_out = {"held_out_mean": export.reward_mean, "held_out_std": export.reward_std}
                self._set(tags, held_out)
        for tags in self._latest.keys() - held.keys():
            self._set(tags, dict.fromkeys(VERSION | DRIFT))
        self._latest = {tags: self._latest.get(tags) or RecentRewards() for tags in held}
        if shadow != self._shadow:
            self.gauges.set(dict.fromkeys(SHADOW))
        self._shadow = shadow

    def failed(self, scored: Sequence[Rewards]) -> None:
        """Count a chunk's rows that lack one of their rewards, by the first error."""
        of_rows = zip(*(rewards.errors for rewards in scored), strict=True)
        first = (next(filter(None, errors), None) for errors in of_rows)
        for kind, count in Tally(type(error).__name__ for error in first if error).items():
            self.errors.inc(count, {"kind": kind})

    def scored(self, reward: str, rewards: Rewards, chunk: Chunk) -> None:
        """Report a chunk's rewards under that name."""
        tags = reward, rewards.versions[0]
        latest = self._latest.get(tags)
        if latest:  # None: the version was dropped while it scored its last chunk
            rows = np.repeat(np.arange(len(rewards)), chunk.copies)
            responses = chunk.responses
            latest.add(rewards.values[rows], responses.tokens[rows], responses.hashes[rows])
            drift = latest.drift()
            if drift:
                self._set(tags, asdict(drift))

    def _set(self, tags: tuple[str, str], figures: Mapping[str, float | None]) -> None:
        reward, version = tags
        self.gauges.set(figures, reward=reward, version=version)
