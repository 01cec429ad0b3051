"""Define and report the metrics of a training run.

Ray's agent on each node exposes them to Prometheus, with the prefix ray_ and, for counters, the
suffix _total. They also go to TensorBoard if enabled. Does not know how a metric is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from rayrm.gauges import Gauges

# Help text of the gauges rayrm_train_<figure>, which show the latest step or evaluation. A figure
# that is None (grad_norm under ZeRO 0) is not exposed.
STEP = {
    "step": "Optimizer steps taken",
    "loss": "Mean loss of the step's pairs",
    "accuracy": "Share of the step's pairs ranked correctly before its update",
    "margin": "Mean reward margin (chosen - rejected) of the step's pairs",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
    "tokens_per_second": "Tokens computed per second by all workers",
    "tokens_saved": "Share of the tokens of all rows saved by computing each prompt once",
    "step_seconds": "Duration of the step in seconds",
}
EVALUATION = {
    "eval_loss": "Mean loss of the held-out pairs under the trained objective",
    "eval_accuracy": "Share of the held-out pairs ranked correctly",
    "eval_margin": "Mean reward margin (chosen - rejected) of the held-out pairs",
}

# Upper bounds of the histogram's buckets, in seconds.
CHECKPOINT_BOUNDS = [0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]


class TrainMetrics:
    """A reporter of a run's metrics, on its rank 0, with the run's name as the tag `run`.

    tensorboard: directory for event files; None writes none. step: the step at which this attempt
    starts; events that an earlier attempt wrote for later steps are discarded.
    """

    def __init__(self, run: str, tensorboard: str | None = None, step: int = 0) -> None:
        self.run = {"run": run}
        tag = ("run",)
        self.gauges = Gauges(
            {
                figure: Gauge(f"rayrm_train_{figure}", meaning, tag)
                for figure, meaning in {**STEP, **EVALUATION}.items()
            }
        )
        self.tokens = Counter("rayrm_train_tokens", "Tokens computed by all workers", tag)
        self.checkpoint_seconds = Histogram(
            "rayrm_train_checkpoint_seconds",
            "Seconds that training waited for a checkpoint",
            CHECKPOINT_BOUNDS,
            tag,
        )
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional dependency

            self.events = SummaryWriter(tensorboard, purge_step=step + 1, flush_secs=10)

    def step(self, figures: Mapping[str, Any]) -> None:
        """Report the figures of a step, an entry of TrainResult.history."""
        self.tokens.inc(figures["tokens"], self.run)
        reported = {
            **figures,
            "tokens_per_second": figures["tokens"] / figures["seconds"],
            "tokens_saved": 1 - figures["tokens"] / figures["tokens_unshared"],
            "step_seconds": figures["seconds"],
        }
        self._show("train", {figure: reported[figure] for figure in STEP}, figures["step"])

    def evaluation(self, figures: Mapping[str, Any]) -> None:
        """Report the held-out figures in a step's entry of the history."""
        self._show("eval", {figure: figures[figure] for figure in EVALUATION}, figures["step"])

    def checkpoint(self, seconds: float, step: int) -> None:
        """Report how long training waited for a checkpoint."""
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
