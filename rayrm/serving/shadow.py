"""Compare the rewards of a shadow deployment with the current ones, over the same rows.

Knows nothing of models, queues or versions: it is given what both gave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from rayrm.rows import Rewards

# Chunks' rows that figures are taken over, at least: a step or two of a PPO run.
RECENT = 4096


@dataclass(frozen=True)
class Difference:
    """Over so many rows that have both rewards: tried less current on average, and Spearman's rank
    correlation; and of the pairs of responses to one prompt, the share that the two order
    differently (a tie counts one half). NaN where there is nothing to tell it by.
    """

    rows: int
    pairs: int
    mean_shift: float
    rank_correlation: float
    disagreement: float

    def __str__(self) -> str:
        return (
            f"over {self.rows} rows: mean shift {self.mean_shift:+.3f}, rank correlation "
            f"{self.rank_correlation:.3f}, {self.disagreement:.1%} of {self.pairs} pairs of "
            "responses to one prompt ordered differently"
        )


class Comparison:
    """The latest rows that both versions scored, chunk by chunk."""

    def __init__(self) -> None:
        self._chunks: deque[tuple[NDArray[np.float64], NDArray[np.float64], float, int]] = deque()
        self._rows = 0

    def add(self, prompt_of: NDArray[np.int32], current: Rewards, tried: Rewards) -> None:
        """Rewards of a chunk's rows by both; prompt_of: int32 [N], rows of one number share one."""
        both = np.isfinite(current.values) & np.isfinite(tried.values)
        a, b = current.values[both].astype(np.float64), tried.values[both].astype(np.float64)
        self._chunks.append((a, b, *disagreement(prompt_of[both], a, b)))
        self._rows += len(a)
        while self._rows - len(self._chunks[0][0]) >= RECENT:
            self._rows -= len(self._chunks.popleft()[0])

    def difference(self) -> Difference:
        if not self._rows:
            return Difference(0, 0, np.nan, np.nan, np.nan)
        a, b = (np.concatenate([chunk[k] for chunk in self._chunks]) for k in (0, 1))
        pairs = sum(chunk[3] for chunk in self._chunks)
        differ = sum(chunk[2] for chunk in self._chunks)
        return Difference(
            self._rows,
            pairs,
            float((b - a).mean()),
            rank_correlation(a, b),
            differ / pairs if pairs else np.nan,
        )


def disagreement(
    prompt_of: NDArray[np.int32], a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[float, int]:
    """Pairs of rows with one prompt that a and b order differently, ties half; and all pairs."""
    differ, pairs = 0.0, 0
    for prompt in np.unique(prompt_of):
        x, y = a[prompt_of == prompt], b[prompt_of == prompt]
        i, j = np.triu_indices(len(x), 1)
        differ += float(np.abs(np.sign(x[i] - x[j]) - np.sign(y[i] - y[j])).sum()) / 2
        pairs += len(i)
    return differ, pairs


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's; NaN where one of the two is always the same."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def merge(differences: Sequence[Difference]) -> Difference:
    """Of several replicas: means by rows and pairs."""
    rows, pairs = sum(d.rows for d in differences), sum(d.pairs for d in differences)

    def mean(figure: str, weight: str) -> float:
        told = [(getattr(d, figure), getattr(d, weight)) for d in differences]
        told = [(f, w) for f, w in told if w and not np.isnan(f)]
        return sum(f * w for f, w in told) / sum(w for _, w in told) if told else float("nan")

    return Difference(
        rows,
        pairs,
        mean("mean_shift", "rows"),
        mean("rank_correlation", "rows"),
        mean("disagreement", "pairs"),
    )
