"""Statistics of the latest rewards that show whether a policy exploits the reward model.

Rewards that leave the range of the held-out ones or all become the same, rewards that go with the
length of a response, one response to everything: an over-optimized policy shows these before its
text is read (Gao et al. 2022, arXiv:2210.10760; Singhal et al. 2023, arXiv:2310.03716). Knows
nothing of prompts, of models, or of what would be too much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)

# Rows that figures are taken over.
RECENT = 1024


@dataclass(frozen=True)
class Drift:
    """Over the latest rows that have a reward.

    response_tokens: mean length of the responses. reward_length_correlation: Pearson's, 0 where one
    of the two is always the same. repeated_responses: the share of responses that are equal to one
    before them.
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
        """Rewards [N], NaN where there is none; the responses' lengths, and hashes of them, [N]."""
        scored = np.isfinite(rewards)
        self._rewards = keep_recent(self._rewards, rewards[scored])
        self._tokens = keep_recent(self._tokens, tokens[scored])
        self._responses = keep_recent(self._responses, responses[scored])

    def drift(self) -> Drift | None:
        """None before the first reward."""
        if not (rows := len(self._rewards)):
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
    return np.concatenate([before, new], dtype=before.dtype)[-RECENT:]
