"""Compare the rewards of a shadow deployment with the current ones, over the same rows.

Does not know about models, queues or versions: it receives the rewards of both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from rayrm.rows import Rewards

# Minimum number of latest rows that figures cover, in whole chunks: a step or two of a PPO run.
RECENT = 4096


@dataclass(frozen=True)
class Difference:
    """How the rewards of a version on trial differ from those of the current one.

    rows: number of rows that have both rewards. pairs: number of pairs of responses to one prompt
    among them. mean_shift: mean of tried minus current. rank_correlation: Spearman's. disagreement:
    share of the pairs that the two order differently; a tie in one counts one half. NaN if
    undefined.
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


class _Chunk(NamedTuple):
    """Rewards [N] of a chunk's rows by both versions, and its pairs of responses to one prompt."""

    current: NDArray[np.float64]
    tried: NDArray[np.float64]
    differ: float
    pairs: int


class Comparison:
    """The latest rows that both versions scored, chunk by chunk."""

    def __init__(self) -> None:
        self._chunks: deque[_Chunk] = deque()
        self._rows = 0

    def add(self, prompt_of: NDArray[np.int32], current: Rewards, tried: Rewards) -> None:
        """Add a chunk's rewards by both versions; prompt_of: int32 [N], equal for one prompt."""
        both = np.isfinite(current.values) & np.isfinite(tried.values)
        a = current.values[both].astype(np.float64)
        b = tried.values[both].astype(np.float64)
        differ, pairs = disagreement(prompt_of[both], a, b)
        self._chunks.append(_Chunk(a, b, differ, pairs))
        self._rows += len(a)
        while self._rows - len(self._chunks[0].current) >= RECENT:
            self._rows -= len(self._chunks.popleft().current)

    def difference(self) -> Difference:
        """Return how the rewards of the latest rows differ."""
        if not self._rows:
            return Difference(0, 0, np.nan, np.nan, np.nan)
        current = np.concatenate([chunk.current for chunk in self._chunks])
        tried = np.concatenate([chunk.tried for chunk in self._chunks])
        pairs = sum(chunk.pairs for chunk in self._chunks)
        differ = sum(chunk.differ for chunk in self._chunks)
        return Difference(
            rows=self._rows,
            pairs=pairs,
            mean_shift=float((tried - current).mean()),
            rank_correlation=rank_correlation(current, tried),
            disagreement=differ / pairs if pairs else np.nan,
        )


def disagreement(
    prompt_of: NDArray[np.int32], a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[float, int]:
    """Count the pairs of rows of one prompt: those that a and b order differently, and all.

    A tie in a or b alone counts one half.
    """
    differ, pairs = 0.0, 0
    for prompt in np.unique(prompt_of):
        x, y = a[prompt_of == prompt], b[prompt_of == prompt]
        i, j = np.triu_indices(len(x), 1)
        differ += float(np.abs(np.sign(x[i] - x[j]) - np.sign(y[i] - y[j])).sum()) / 2
        pairs += len(i)
    return differ, pairs


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Spearman's correlation; NaN for fewer than two rows, or if a or b is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def merge(differences: Sequence[Difference]) -> Difference:
    """Merge the differences of several replicas: means, weighted by rows or pairs."""

    def mean(figure: str, weight: str) -> float:
        weighted: list[tuple[float, int]]
        weighted = [(getattr(d, figure), getattr(d, weight)) for d in differences]
        weighted = [(f, w) for f, w in weighted if w and not np.isnan(f)]
        if not weighted:
            return float("nan")
        return sum(f * w for f, w in weighted) / sum(w for _, w in weighted)

    return Difference(
        rows=sum(d.rows for d in differences),
        pairs=sum(d.pairs for d in differences),
        mean_shift=mean("mean_shift", "rows"),
        rank_correlation=mean("rank_correlation", "rows"),
        disagreement=mean("disagreement", "pairs"),
    )
