"""Compute statistics of recent rewards that show whether a policy exploits the reward model.

An over-optimized policy shows in them before anyone reads its text: rewards leave the range of the
held-out ones, become all alike or follow response length, or one response answers every prompt
(Gao et al. 2022, arXiv:2210.10760; Singhal et al. 2023, arXiv:2310.03716). Does not know about
prompts, models or alert thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)

# Number of latest rows that the statistics cover.
RECENT = 1024


@dataclass(frozen=True)
class Drift:
    """Statistics of the latest rows that have a reward.

    response_tokens: mean response length, tokens. reward_length_correlation: Pearson correlation of
    reward and response length, 0 if either is constant. repeated_responses: share of responses that
    equal an earlier one.
    """

    reward_mean: float
    reward_std: float
    response_tokens: float
    reward_length_correlation: float
    repeated_responses: float


class RecentRewards:
    """The latest rewards of one version, and the responses that got them."""

    def __init__(self) -> None:
        self._rewards: NDArray[np.float64] = np.empty(0)
        self._tokens: NDArray[np.float64] = np.empty(0)
        self._responses: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def add(
        self,
        rewards: NDArray[np.float32],
        tokens: NDArray[np.float64],
        responses: NDArray[np.int64],
    ) -> None:
        """Add rows: rewards [N], NaN for none; lengths (tokens) and hashes of the responses [N]."""
        scored = np.isfinite(rewards)
        self._rewards = keep_recent(self._rewards, rewards[scored])
        self._tokens = keep_recent(self._tokens, tokens[scored])
        self._responses = keep_recent(self._responses, responses[scored])

    def drift(self) -> Drift | None:
        """Return the statistics, None before the first reward."""
        rows = len(self._rewards)
        if rows == 0:
            return None
        reward, tokens = self._rewards.mean(), self._tokens.mean()
        spread = self._rewards.std() * self._tokens.std()
        product = ((self._rewards - reward) * (self._tokens - tokens)).mean()
        return Drift(
            reward_mean=float(reward),
            reward_std=float(self._rewards.std()),
            response_tokens=float(tokens),
            reward_length_correlation=float(product / spread) if spread else 0.0,
            repeated_responses=1 - len(np.unique(self._responses)) / rows,
        )


def keep_recent(before: NDArray[T], new: NDArray[Any]) -> NDArray[T]:
    """Append `new` to `before`, and return the last RECENT values."""
    return np.concatenate([before, new], dtype=before.dtype)[-RECENT:]
