"""How good rewards are, against preferences: accuracy, best-of-N, margins, calibration, length.

summarize is arithmetic on rewards already computed; evaluate scores groups of text first. Knows
nothing of training or Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrm.data import Group
from rayrm.engine import RewardModel
from rayrm.template import Row

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class ScoredGroup:
    """One group's rewards [K] (NaN: not scored), lengths in tokens [K], pairs [N, 2], labels [N].

    Lengths may count the prompt too, if they all do: only differences within the group matter.
    pairs are (chosen, rejected) indices of responses; a label is the probability that chosen wins.
    """

    rewards: Floats
    lengths: NDArray[np.number]
    pairs: NDArray[np.int64]
    labels: Floats
    subset: str


def evaluate(
    model: RewardModel, groups: Sequence[Group], *, progress: bool = False
) -> dict[str, Any]:
    """Score groups of text and summarize; responses that cannot be scored are counted as failed."""
    rows = [
        Row(g.prompt, r, f) for g in groups for r, f in zip(g.responses, g.finished, strict=True)
    ]
    encoded = model.encode(rows)
    rewards = model.collect(encoded, model.score_groups(encoded.groups, progress=progress)).values
    ends = np.cumsum([len(g.responses) for g in groups])[:-1]
    scored = [
        ScoredGroup(
            r,
            n,
            np.array([(p.chosen, p.rejected) for p in g.preferences], dtype=np.int64),
            np.array([p.label for p in g.preferences]),
            g.subset,
        )
        for g, r, n in zip(
            groups, np.split(rewards, ends), np.split(encoded.tokens, ends), strict=True
        )
    ]
    return summarize(scored) | {"truncated": int(encoded.truncated.sum())}


def summarize(groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Figures over all pairs whose responses both have rewards.

    accuracy: share of pairs whose preferred response has the higher reward (a tie is half right).
    best_of_n: share of groups whose highest reward is on a response that no other is preferred to,
    over groups of three and more (equal rewards count by their share). margin: mean of preferred
    minus other. loss: Bradley-Terry.
    ece: expected calibration error of sigmoid(margin), ten bins of equal width (Guo et al. 2017).
    length_correlation: Pearson's, of reward and response tokens within groups.
    reward_mean, reward_std: over all responses. subsets: accuracy and pairs of each.
    """
    subsets: dict[str, list[Floats]] = {}
    for group in groups:
        subsets.setdefault(group.subset, []).append(_margins(group))
    margins = np.concatenate([m for parts in subsets.values() for m in parts])
    rewards = np.concatenate([g.rewards for g in groups]).astype(np.float64)
    finite = np.isfinite(rewards)
    asked = sum(int((g.labels != 0.5).sum()) for g in groups)
    return {
        "accuracy": _accuracy(margins),
        "pairs": len(margins),
        "groups": len(groups),
        "failed_responses": int((~finite).sum()),
        "failed_pairs": asked - len(margins),
        "best_of_n": _best_of_n(groups),
        "margin": float(margins.mean()) if len(margins) else None,
        "loss": float(np.logaddexp(0, -margins).mean()) if len(margins) else None,
        "ece": calibration_error(margins),
        "length_correlation": _length_correlation(groups),
        "reward_mean": float(rewards[finite].mean()) if finite.any() else None,
        "reward_std": float(rewards[finite].std()) if finite.any() else None,
        "subsets": {
            name: {"accuracy": _accuracy(m), "pairs": len(m)}
            for name, m in sorted((n, np.concatenate(p)) for n, p in subsets.items())
        },
    }


def calibration_error(margins: Floats, bins: int = 10) -> float | None:
    """|confidence - accuracy| over bins of confidence in the winner, weighted by pairs."""
    if not len(margins):
        return None
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs((confidence - right)[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(margins))


def _margins(group: ScoredGroup) -> Floats:
    """Reward of the response more likely preferred, minus the other's; float64."""
    if not len(group.pairs):
        return np.empty(0)
    rewards = group.rewards.astype(np.float64)
    margins = rewards[group.pairs[:, 0]] - rewards[group.pairs[:, 1]]
    margins = np.where(group.labels < 0.5, -margins, margins)[group.labels != 0.5]
    return margins[np.isfinite(margins)]


def _accuracy(margins: Floats) -> float | None:
    return float(np.where(margins == 0, 0.5, margins > 0).mean()) if len(margins) else None


def _best_of_n(groups: Sequence[ScoredGroup]) -> float | None:
    hits = []
    for group in groups:
        if len(group.rewards) < 3 or not np.isfinite(group.rewards).all():
            continue
        chosen, rejected = group.pairs.T
        beaten = [*rejected[group.labels > 0.5], *chosen[group.labels < 0.5]]
        best = np.flatnonzero(group.rewards == group.rewards.max())
        hits.append(1 - np.isin(best, beaten).mean())
    return float(np.mean(hits)) if hits else None


def _length_correlation(groups: Sequence[ScoredGroup]) -> float | None:
    rewards, lengths = [], []
    for group in groups:
        known = np.isfinite(group.rewards)
        if known.sum() >= 2:
            rewards.append(group.rewards[known] - group.rewards[known].mean())
            lengths.append(group.lengths[known] - group.lengths[known].mean())
    if not rewards:
        return None
    r, n = np.concatenate(rewards), np.concatenate(lengths)
    return float(np.corrcoef(r, n)[0, 1]) if r.std() > 0 and n.std() > 0 else None
