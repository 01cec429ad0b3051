"""Evaluate rewards against preferences: accuracy, best-of-N, margins, calibration, length.

score computes the rewards of groups of text, summarize computes the figures from rewards, and
evaluate does both. Includes the averages of RM-Bench and RewardBench for data of their shape. Does
not know about training or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrm.data.records import Group
from rayrm.model.engine import RewardModel
from rayrm.packing import Ids, by_group
from rayrm.rows import Row

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

# Domains of RM-Bench. A subset's name starts with its domain; safety has two subsets.
RM_BENCH = ("chat", "math", "code", "safety")
# Sections of RewardBench (Lambert et al. 2024) with each subset's weight: its number of pairs,
# except for math-prm, which weighs as much as all code subsets together.
REWARD_BENCH = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}


@dataclass(frozen=True)
class ScoredGroup:
    """One group's rewards, with the pairs that they are compared on.

    rewards: [K], NaN if not scored. lengths: [K], tokens; all may include the prompt, since only
    differences within the group matter. pairs: [N, 2], (chosen, rejected) indices of responses.
    labels: [N], the probability that chosen wins. styles: [N, 2], RM-Bench's styles of chosen and
    rejected, if the data has them. truncated: number of responses whose prompt was cut.
    """

    rewards: Floats
    lengths: NDArray[np.number]
    pairs: Ints
    labels: Floats
    subset: str
    styles: Ints | None = None
    truncated: int = 0

    @classmethod
    def of(
        cls,
        rows: Sequence[Ids | None],
        rewards: Floats,
        lengths: NDArray[np.number],
        chosen: Sequence[int] | Ints,
        rejected: Sequence[int] | Ints,
        labels: Sequence[float] | Floats,
        subset: str,
        **more: Any,
    ) -> ScoredGroup:
        """Return the group of responses with these ids [K], None for one that was not scored.

        Rows of equal ids get the reward of the first.
        """
        pairs = np.stack([chosen, rejected], axis=1).astype(np.int64)
        rewards = equal_for_equals(rows, rewards)
        return cls(rewards, lengths, pairs, np.asarray(labels), subset, **more)


@dataclass(frozen=True)
class Judged:
    """The pairs of all groups that have a winner (label other than 0.5) and both rewards.

    Columns [M]. group: index of the pair's group. pair: its index among the group's pairs. winner,
    loser: by the label, as indices of responses. winner_reward, loser_reward: fp64. longer: tokens
    that the winner is longer than the loser. subset: the group's. styles: [M, 2], of winner and
    loser, -1 if unknown.
    """

    group: Ints
    pair: Ints
    winner: Ints
    loser: Ints
    winner_reward: Floats
    loser_reward: Floats
    longer: NDArray[np.number]
    subset: NDArray[np.object_]
    styles: Ints

    @classmethod
    def of(cls, groups: Sequence[ScoredGroup]) -> Judged:
        parts: list[dict[str, NDArray[Any]]] = []
        for place, group in enumerate(groups):
            pairs = group.pairs.reshape(-1, 2)
            known = np.isfinite(group.rewards[pairs]).all(axis=1) & (group.labels != 0.5)
            rejected_wins = group.labels[known, None] < 0.5
            ends = np.where(rejected_wins, pairs[known, ::-1], pairs[known])  # winner, loser
            styles = np.full_like(pairs, -1) if group.styles is None else group.styles
            rewards, lengths = group.rewards.astype(np.float64)[ends], group.lengths[ends]
            parts.append(
                {
                    "group": np.full(len(ends), place),
                    "pair": np.flatnonzero(known),
                    "winner": ends[:, 0],
                    "loser": ends[:, 1],
                    "winner_reward": rewards[:, 0],
                    "loser_reward": rewards[:, 1],
                    "longer": lengths[:, 0] - lengths[:, 1],
                    "subset": np.full(len(ends), group.subset, dtype=object),
                    "styles": np.where(rejected_wins, styles[known, ::-1], styles[known]),
                }
            )
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([part[name] for part in parts]) for name in names})

    def __len__(self) -> int:
        return len(self.group)

    @property
    def margins(self) -> Floats:
        """The winner's reward minus the loser's."""
        return self.winner_reward - self.loser_reward

    @property
    def right(self) -> Floats:
        """1 where the winner has the higher reward, 0 where the loser has it, 0.5 for a tie."""
        return _right(self.margins)


@dataclass(frozen=True)
class Bin:
    """The pairs with a value in [low, high]: their number, mean value and share ranked right."""

    low: float
    high: float
    pairs: int
    mean: float
    accuracy: float


def evaluate(
    model: RewardModel, groups: Sequence[Group], *, progress: bool = False
) -> dict[str, Any]:
    """Score groups of text and summarize them; responses that cannot be scored count as failed."""
    return summarize(score(model, groups, progress=progress))


def score(
    model: RewardModel, groups: Sequence[Group], *, progress: bool = False
) -> list[ScoredGroup]:
    """Score groups of text; the reward of a response that cannot be scored is NaN."""
    rows = [
        Row(g.prompt, response, finished, g.tools)
        for g in groups
        for response, finished in zip(g.responses, g.finished, strict=True)
    ]
    encoded = model.encode(rows)
    rewards = model.collect(encoded, model.score_groups(encoded.groups, progress=progress)).values
    ids: list[Ids | None] = [None] * len(rows)
    for tokens, owners in zip(encoded.groups, encoded.owners, strict=True):
        for row, owner in zip(tokens.rows, owners, strict=True):
            ids[owner] = row
    sizes = [len(g.responses) for g in groups]
    ends = np.cumsum(sizes)
    return [
        ScoredGroup.of(
            ids[end - len(g.responses) : end],
            group_rewards,
            lengths,
            [p.chosen for p in g.preferences],
            [p.rejected for p in g.preferences],
            [p.label for p in g.preferences],
            g.subset,
            styles=np.array([p.styles or (-1, -1) for p in g.preferences], dtype=np.int64),
            truncated=int(truncated.sum()),
        )
        for g, end, group_rewards, lengths, truncated in zip(
            groups,
            ends,
            by_group(rewards, sizes),
            by_group(encoded.tokens, sizes),
            by_group(encoded.truncated, sizes),
            strict=True,
        )
    ]


def equal_for_equals(rows: Sequence[Ids | None], rewards: Floats) -> Floats:
    """Give rows of equal ids the reward of the first; in packs they differ by rounding."""
    first: dict[bytes, int] = {}
    sources = [
        i if row is None else first.setdefault(row.tobytes(), i) for i, row in enumerate(rows)
    ]
    return rewards[sources]


def summarize(groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Compute the figures over all pairs that have a winner and both rewards.

    accuracy: share of pairs whose preferred response has the higher reward (a tie is half right).
    best_of_n: share of groups of three or more in which no response is preferred to the one with
    the highest reward (equal rewards count by their share). margin: mean reward of the preferred
    response minus that of the other. loss: Bradley-Terry.
    ece: expected calibration error of sigmoid(margin), ten bins of equal width (Guo et al. 2017).
    length_correlation: Pearson's, of reward and response tokens within groups.
    reward_mean, reward_std: over all responses. truncated: responses whose prompt was cut.
    subsets: accuracy and pairs of each. rm_bench, reward_bench: see the functions of these names.
    """
    judged = Judged.of(groups)
    margins = judged.margins
    names = sorted({group.subset for group in groups})
    of_subset = {name: margins[judged.subset == name] for name in names}
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
        "truncated": sum(g.truncated for g in groups),
        "subsets": {n: {"accuracy": _accuracy(m), "pairs": len(m)} for n, m in of_subset.items()},
        "rm_bench": rm_bench(judged),
        "reward_bench": reward_bench(of_subset),
    }


def calibration_error(margins: Floats, bins: int = 10) -> float | None:
    """Return the mean |confidence - accuracy| over bins of confidence, weighted by pairs."""
    if not len(margins):
        return None
    gaps = [b.pairs * abs(b.mean - b.accuracy) for b in reliability(margins, bins)]
    return float(sum(gaps) / len(margins))


def reliability(margins: Floats, bins: int = 10) -> list[Bin]:
    """Bin pairs by confidence in the response with the higher reward, sigmoid(|margin|).

    Bins have equal width over [0.5, 1]; empty bins are left out.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    edges = np.linspace(0.5, 1, bins + 1)
    return [
        _bin(confidence[place == b], _right(margins)[place == b], edges[b], edges[b + 1])
        for b in np.unique(place)
    ]


def equal_bins(values: NDArray[np.number], right: Floats, bins: int) -> list[Bin]:
    """Bin pairs by value, at most `bins` bins of about equal size; equal values share a bin."""
    if not len(values):
        return []
    place = np.searchsorted(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]), values, "left")
    parts = [(values[place == b], right[place == b]) for b in np.unique(place)]
    return [_bin(v, r, v.min(), v.max()) for v, r in parts]


def signed_bins(values: NDArray[np.number], right: Floats, bins: int) -> list[Bin]:
    """Apply equal_bins to the negative values, zero and the positive values separately."""
    parts = [(values < 0, bins), (values == 0, 1), (values > 0, bins)]
    return [b for part, count in parts for b in equal_bins(values[part], right[part], count)]


def interval(accuracy: float, pairs: int) -> tuple[float, float]:
    """Return an accuracy's 95 % confidence interval for independent pairs (Wilson 1927)."""
    z2 = 1.959964**2
    centre = accuracy + z2 / (2 * pairs)
    half = math.sqrt(z2 * (accuracy * (1 - accuracy) / pairs + z2 / (4 * pairs**2)))
    return (centre - half) / (1 + z2 / pairs), (centre + half) / (1 + z2 / pairs)


def rm_bench(judged: Judged) -> dict[str, Any] | None:
    """Compute RM-Bench's accuracy by style; None unless every pair has styles.

    Follows Liu et al. 2024 and utils.py of its repository. matrix[c][r]: among pairs with chosen in
    style c and rejected in style r, the share in which chosen has the higher reward (a tie is
    wrong, as in RM-Bench). easy: mean of the cells in which chosen has the fancier style. normal:
    both have the same style. hard: rejected has the fancier style. mean: over all cells. domains:
    the same figures for each domain; the overall matrix is the mean of theirs, so that each domain
    weighs the same however many prompts it has. Subsets outside RM-Bench are domains too.
    """
    if not len(judged) or (judged.styles < 0).any():
        return None
    domains = np.array([_domain(name) for name in judged.subset], dtype=object)
    matrices = {}
    for name in sorted(set(domains)):
        here = domains == name
        won = judged.margins[here] > 0
        cells = [[_in_cell(judged.styles[here], c, r) for r in range(3)] for c in range(3)]
        pairs = np.array([[cell.sum() for cell in row] for row in cells])
        wins = np.array([[won[cell].sum() for cell in row] for row in cells])
        matrices[name] = (wins / np.where(pairs, pairs, np.nan), pairs)
    return _by_style(
        np.mean([matrix for matrix, _ in matrices.values()], axis=0),
        np.sum([pairs for _, pairs in matrices.values()], axis=0),
    ) | {"domains": {name: _by_style(*both) for name, both in matrices.items()}}


def reward_bench(subsets: dict[str, Floats]) -> dict[str, Any] | None:
    """Compute RewardBench's section scores from margins by subset; None without its subsets.

    sections: each section's score, and accuracy (a tie is wrong, as in RewardBench) and weight of
    its subsets that have pairs; the score is their weighted mean. mean: over the four sections
    (without "prior sets"), None unless every subset has pairs.
    """
    sections: dict[str, Any] = {}
    for section, weights in REWARD_BENCH.items():
        found = {
            name: {"accuracy": float((subsets[name] > 0).mean()), "weight": weights[name]}
            for name in weights
            if len(subsets.get(name, ()))
        }
        if found:
            weight = sum(s["weight"] for s in found.values())
            won = sum(s["weight"] * s["accuracy"] for s in found.values())
            sections[section] = {"score": won / weight, "subsets": found}
    if not sections:
        return None
    whole = all(len(subsets.get(n, ())) for weights in REWARD_BENCH.values() for n in weights)
    mean = float(np.mean([section["score"] for section in sections.values()]))
    return {"sections": sections, "mean": mean if whole else None}


def _right(margins: Floats) -> Floats:
    return np.where(margins == 0, 0.5, margins > 0)


def _accuracy(margins: Floats) -> float | None:
    return float(_right(margins).mean()) if len(margins) else None


def _bin(values: NDArray[np.number], right: Floats, low: float, high: float) -> Bin:
    return Bin(float(low), float(high), len(values), float(values.mean()), float(right.mean()))


def _domain(subset: str) -> str:
    return next((domain for domain in RM_BENCH if subset.startswith(domain)), subset)


def _in_cell(styles: Ints, chosen: int, rejected: int) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (styles[:, 0] == chosen) & (styles[:, 1] == rejected)
    return inside


def _by_style(matrix: Floats, pairs: Ints) -> dict[str, Any]:
    """Return the matrix and its averages; None for cells without pairs and averages over them."""
    below, above = np.tril_indices(3, -1), np.triu_indices(3, 1)
    means = {
        "easy": matrix[below].mean(),
        "normal": matrix.diagonal().mean(),
        "hard": matrix[above].mean(),
        "mean": matrix.mean(),
    }
    return {
        "matrix": [[_known(cell) for cell in row] for row in matrix],
        "pairs": pairs.tolist(),
        **{name: _known(value) for name, value in means.items()},
    }


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


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


def within_groups(groups: Sequence[ScoredGroup]) -> tuple[Floats, Floats]:
    """Return lengths (tokens) and rewards of scored responses, each minus its group's mean.

    Groups with fewer than two scored responses are left out.
    """
    lengths, rewards = [np.empty(0)], [np.empty(0)]
    for group in groups:
        known = np.isfinite(group.rewards)
        if known.sum() >= 2:
            rewards.append(group.rewards[known] - group.rewards[known].mean())
            lengths.append(group.lengths[known] - group.lengths[known].mean())
    return np.concatenate(lengths), np.concatenate(rewards)


def _length_correlation(groups: Sequence[ScoredGroup]) -> float | None:
    lengths, rewards = within_groups(groups)
    varied = len(rewards) > 0 and rewards.std() > 0 and lengths.std() > 0
    return float(np.corrcoef(rewards, lengths)[0, 1]) if varied else None
