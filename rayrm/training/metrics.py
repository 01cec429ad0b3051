"""What a training run reports while it works: every metric's name and meaning, once.

Ray's agent on each node exposes them to Prometheus with ray_ before the name, and _total behind a
counter's; they go to TensorBoard as well if asked. Knows nothing of how a figure is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    pass
from rayrm.gauges import Gauges

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
    "eval_loss": "Mean loss of the held-out pairs, by the objective that is trained",
    "eval_accuracy": "Share of the held-out pairs that are ranked right",
    "eval_margin": "Mean reward of chosen less rejected over the held-out pairs",
}

# Seconds. Prometheus counts how many took at most so long.
CHECKPOINT_BOUNDS = [0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]


class TrainMetrics:
    """Reports the figures of a run, on its rank 0, with the run's name as the tag `run`.

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
        """Report a step's figures: those of TrainResult.history."""
        self.tokens.inc(figures["tokens"], self.run)
        told = {
            **figures,
            "tokens_per_second": figures["tokens"] / figures["seconds"],
            "tokens_saved": 1 - figures["tokens"] / figures["tokens_unshared"],
            "step_seconds": figures["seconds"],
        }
        self._show("train", {figure: told[figure] for figure in STEP}, figures["step"])

    def evaluation(self, figures: Mapping[str, Any]) -> None:
        """Report the held-out figures that were added to a step's."""
        self._show("eval", {figure: figures[figure] for figure in EVALUATION}, figures["step"])

    def checkpoint(self, seconds: float, step: int) -> None:
        """Report how long a checkpoint held up training."""
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
