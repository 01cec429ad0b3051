"""What a run and a replica tell while they work: every metric's name and meaning, once.

Ray's agent on each node shows them in Prometheus' text format with ray_ before the name, and _total
behind a counter's; a run's figures go to TensorBoard as well if asked. Knows nothing of how a
figure is come by.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.util.metrics import Counter, Gauge, Histogram

from rayrm.drift import RECENT, Latest

if TYPE_CHECKING:
    from rayrm.chunk import Chunk
    from rayrm.engine import RewardModel, Rewards
    from rayrm.shadow import Difference
    from rayrm.versions import Trial

# Gauges of a run by the figure they show, as rayrm_train_<figure>: the latest step's, or the latest
# evaluation's. One whose figure is None (grad_norm under ZeRO 0) is not shown.
STEP = {
    "step": "Optimizer steps taken",
    "loss": "Mean loss of the step's pairs",
    "accuracy": "Share of the step's pairs that were ranked right before its update",
    "margin": "Mean reward of chosen less rejected over the step's pairs",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
    "tokens_per_second": "Tokens computed in a second by all workers",
    "tokens_saved": "Share of separate rows' tokens saved by computing each prompt once",
    "step_seconds": "Seconds of the step",
}
EVALUATION = {
    "eval_loss": "Mean loss of the held-out pairs",
    "eval_accuracy": "Share of the held-out pairs that are ranked right",
    "eval_margin": "Mean reward of chosen less rejected over the held-out pairs",
}

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

# Seconds. Prometheus counts how many took at most so long.
CHECKPOINT_BOUNDS = [0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]
LATENCY_BOUNDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]

# A process reports to the agent once a second or less often.
REPEAT_S = 0.5


class Gauges:
    """Gauges by figure, shown for as long as the process lives; one that is None is not shown.

    Ray sends a value to the agent once, and that forgets it after two reports without one: a thread
    sets each again and again, or a slow step would look like a run that has ended.
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
        """Show nothing any more."""
        self._closed.set()

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_S):
            with self._changing:
                for (figure, tags), value in self._values.items():
                    self._gauges[figure].set(value, dict(tags))


class TrainMetrics:
    """Figures of a run, told by its rank 0 with the run's name as the tag `run`.

    tensorboard: directory for event files, none are written without it. Events that another
    attempt wrote for steps after `step`, where this one begins, are withdrawn.
    """

    def __init__(self, run: str, tensorboard: str | None = None, step: int = 0) -> None:
        self.run = {"run": run}
        tag = tuple(self.run)
        self.gauges = Gauges(
            {
                figure: Gauge(f"rayrm_train_{figure}", meaning, tag)
                for figure, meaning in {**STEP, **EVALUATION}.items()
            }
        )
        self.tokens = Counter("rayrm_train_tokens", "Tokens computed by all workers", tag)
        self.checkpoint_seconds = Histogram(
            "rayrm_train_checkpoint_seconds",
            "Seconds that training stood still for a checkpoint",
            CHECKPOINT_BOUNDS,
            tag,
        )
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # only now: an optional dependency

            self.events = SummaryWriter(tensorboard, purge_step=step + 1, flush_secs=10)

    def step(self, figures: Mapping[str, Any]) -> None:
        """Tell a step's figures: those of TrainResult.history."""
        self.tokens.inc(figures["tokens"], self.run)
        told = {
            **figures,
            "tokens_per_second": figures["tokens"] / figures["seconds"],
            "tokens_saved": 1 - figures["tokens"] / figures["tokens_unshared"],
            "step_seconds": figures["seconds"],
        }
        self._show("train", {figure: told[figure] for figure in STEP}, figures["step"])

    def evaluation(self, figures: Mapping[str, Any]) -> None:
        """Tell the held-out figures that were added to a step's."""
        self._show("eval", {figure: figures[figure] for figure in EVALUATION}, figures["step"])

    def checkpoint(self, seconds: float, step: int) -> None:
        """Tell how long a checkpoint held up training."""
        self.checkpoint_seconds.observe(seconds, self.run)
        if self.events:
            self.events.add_scalar("train/checkpoint_seconds", seconds, step)

    def close(self) -> None:
        self.gauges.close()
        if self.events:
            self.events.close()

    def _show(self, section: str, figures: Mapping[str, float | None], step: int) -> None:
        self.gauges.set(figures, **self.run)
        for figure, value in figures.items():
            if self.events and value is not None:
                self.events.add_scalar(f"{section}/{figure.removeprefix('eval_')}", value, step)


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
        self._latest: dict[tuple[str, str], Latest] = {}

    @contextmanager
    def request(self, rows: int) -> Iterator[None]:
        """Tell of a request that is answered when the block is left; what it raises, too."""
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
        """Tell of tokens that are waited for until the block is left; then they are computed.

        unshared: what they would be with every row by itself.
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
        """Tell how many rows in all were found."""
        if rows > self._found:
            self.rows_found.inc(rows - self._found)
        self._found = rows

    def compared(self, difference: Difference) -> None:
        """Tell how the rewards of a version in the shadow differ; what cannot be told is not."""
        told = {figure: getattr(difference, figure.removeprefix("shadow_")) for figure in SHADOW}
        self.gauges.set({k: None if np.isnan(v) else v for k, v in told.items()})

    def holds(
        self, models: Iterable[RewardModel], current: RewardModel, shadow: Trial | None
    ) -> None:
        """Tell which versions of each reward are held, and which one answers."""
        answering = {(name, of.version) for name, of in current.rewards.items()}
        held = {(name, of.version): of.export for m in models for name, of in m.rewards.items()}
        for which, export in held.items():
            self._tell(which, {"current": float(which in answering)})
            if export:
                means = {"held_out_mean": export.reward_mean, "held_out_std": export.reward_std}
                self._tell(which, means)
        for which in self._latest.keys() - held.keys():
            self._tell(which, dict.fromkeys(VERSION | DRIFT))
        self._latest = {which: self._latest.get(which) or Latest() for which in held}
        if shadow != self._shadow:
            self.gauges.set(dict.fromkeys(SHADOW))
        self._shadow = shadow

    def scored(self, reward: str, rewards: Rewards, chunk: Chunk) -> None:
        """Tell of a chunk's rewards of that name."""
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
