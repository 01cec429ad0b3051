"""How good rewards are, against preferences: accuracy, best-of-N, margins, calibration, length.

summarize is arithmetic on rewards already computed; score computes them for groups of text, and
evaluate is both. Also the averages of RM-Bench and RewardBench for data of their shape. Knows
nothing of training or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrm.data.records import Group
from rayrm.model.engine import RewardModel
from rayrm.packing import Ids, by_group
from rayrm.rows import Row

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

# Domains of RM-Bench, by how the name of a subset begins: safety has two.
RM_BENCH = ("chat", "math", "code", "safety")
# Sections of RewardBench (Lambert et al. 2024) and what each subset weighs in its section: its
# number of pairs, but for math-prm, which weighs as much as all code.
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
    """One group's rewards [K] (NaN: not scored), lengths in tokens [K], pairs [N, 2], labels [N].

    Lengths may count the prompt too, if they all do: only differences within the group matter.
    pairs are (chosen, rejected) indices of responses; a label is the probability that chosen wins.
    styles are RM-Bench's of chosen and rejected [N, 2], if the data has them; truncated counts the
    responses whose prompt was cut.
    """

    rewards: Floats
    lengths: NDArray[np.number]
    pairs: Ints
    labels: Floats
    subset: str
    styles: Ints | None = None
    truncated: int = 0


@dataclass(frozen=True)
class Judged:
    """The pairs of all groups that have a winner (a label of a half has none) and both rewards.

    Columns [M]: the pair's group and its place among the group's pairs; winner and loser by the
    label, as indices of responses; their rewards, fp64; how many tokens the winner is longer; the
    group's subset. styles: [M, 2] of winner and loser, -1 without.
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
        columns: list[list[NDArray[Any]]] = []
        for place, group in enumerate(groups):
            pairs = group.pairs.reshape(-1, 2)
            known = np.isfinite(group.rewards[pairs]).all(axis=1) & (group.labels != 0.5)
            turned = group.labels[known, None] < 0.5
            ends = np.where(turned, pairs[known, ::-1], pairs[known])
            styles = np.full_like(pairs, -1) if group.styles is None else group.styles
            rewards, lengths = group.rewards.astype(np.float64)[ends], group.lengths[ends]
            columns.append(
                [
                    np.full(len(ends), place),
                    np.flatnonzero(known),
                    *ends.T,
                    *rewards.T,
                    lengths[:, 0] - lengths[:, 1],
                    np.full(len(ends), group.subset, dtype=object),
                    np.where(turned, styles[known, ::-1], styles[known]),
                ]
            )
        return cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def __len__(self) -> int:
        return len(self.group)

    @property
    def margins(self) -> Floats:
        """Reward of the winner minus the loser's."""
        return self.winner_reward - self.loser_reward

    @property
    def right(self) -> Floats:
        """1 where the winner has the higher reward, 0 where the loser has, a tie is half right."""
        return _right(self.margins)


@dataclass(frozen=True)
class Bin:
    """The pairs with a value in [low, high]: how many, their mean value, the share ranked right."""

    low: float
    high: float
    pairs: int
    mean: float
    accuracy: float


def evaluate(
    model: RewardModel, groups: Sequence[Group], *, progress: bool = False
) -> dict[str, Any]:
    """Score groups of text and summarize; responses that cannot be scored are counted as failed."""
    return summarize(score(model, groups, progress=progress))


def score(
    model: RewardModel, groups: Sequence[Group], *, progress: bool = False
) -> list[ScoredGroup]:
    """Each group of text with its rewards; NaN where a response cannot be scored."""
    rows = [
        Row(g.prompt, r, f, g.tools)
        for g in groups
        for r, f in zip(g.responses, g.finished, strict=True)
    ]
    encoded = model.encode(rows)
    rewards = model.collect(encoded, model.score_groups(encoded.groups, progress=progress)).values
    for group, owners in zip(encoded.groups, encoded.owners, strict=True):
        rewards[owners] = equal_for_equals(group.rows, rewards[owners])
    sizes = [len(g.responses) for g in groups]
    columns = (by_group(column, sizes) for column in (rewards, encoded.tokens, encoded.truncated))
    return [
        ScoredGroup(
            r,
            n,
            np.array([(p.chosen, p.rejected) for p in g.preferences], dtype=np.int64),
            np.array([p.label for p in g.preferences]),
            g.subset,
            np.array([p.styles or (-1, -1) for p in g.preferences], dtype=np.int64),
            int(t.sum()),
        )
        for g, r, n, t in zip(groups, *columns, strict=True)
    ]


def equal_for_equals(rows: Sequence[Ids], rewards: Floats) -> Floats:
    """Rewards of which rows of the same ids have the same: packed, they differ by rounding."""
    first: dict[bytes, int] = {}
    return rewards[[first.setdefault(row.tobytes(), i) for i, row in enumerate(rows)]]


def summarize(groups: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Figures over all pairs whose responses both have rewards.

    accuracy: share of pairs whose preferred response has the higher reward (a tie is half right).
    best_of_n: share of groups whose highest reward is on a response that no other is preferred to,
    over groups of three and more (equal rewards count by their share). margin: mean of preferred
    minus other. loss: Bradley-Terry.
    ece: expected calibration error of sigmoid(margin), ten bins of equal width (Guo et al. 2017).
    length_correlation: Pearson's, of reward and response tokens within groups.
    reward_mean, reward_std: over all responses. truncated: responses whose prompt was cut.
    subsets: accuracy and pairs of each. rm_bench, reward_bench: see there.
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
    """|confidence - accuracy| over bins of confidence in the winner, weighted by pairs."""
    if not len(margins):
        return None
    gaps = [b.pairs * abs(b.mean - b.accuracy) for b in reliability(margins, bins)]
    return float(sum(gaps) / len(margins))


def reliability(margins: Floats, bins: int = 10) -> list[Bin]:
    """Pairs by confidence in whichever response has the higher reward, sigmoid(|margin|).

    Bins of equal width over [0.5, 1]; those without pairs are left out.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    edges = np.linspace(0.5, 1, bins + 1)
    return [
        _bin(confidence[place == b], _right(margins)[place == b], edges[b], edges[b + 1])
        for b in np.unique(place)
    ]


def equal_bins(values: NDArray[np.number], right: Floats, bins: int) -> list[Bin]:
    """Pairs by value, in at most `bins` bins of about as many pairs; equal values share a bin."""
    if not len(values):
        return []
    place = np.searchsorted(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]), values, "left")
    parts = [(values[place == b], right[place == b]) for b in np.unique(place)]
    return [_bin(v, r, v.min(), v.max()) for v, r in parts]


def signed_bins(values: NDArray[np.number], right: Floats, bins: int) -> list[Bin]:
    """equal_bins of the negative values, of zero, and of the positive values."""
    parts = [(values < 0, bins), (values == 0, 1), (values > 0, bins)]
    return [b for part, count in parts for b in equal_bins(values[part], right[part], count)]


def interval(accuracy: float, pairs: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy, taking pairs as independent (Wilson 1927)."""
    z2 = 1.959964**2
    centre = accuracy + z2 / (2 * pairs)
    half = math.sqrt(z2 * (accuracy * (1 - accuracy) / pairs + z2 / (4 * pairs**2)))
    return (centre - half) / (1 + z2 / pairs), (centre + half) / (1 + z2 / pairs)


def rm_bench(judged: Judged) -> dict[str, Any] | None:
    """Accuracy by style, if every pair has styles (Liu et al. 2024, and its repository's utils.py).

    matrix[c][r]: share of pairs of a chosen response in style c and a rejected one in style r in
    which chosen has the higher reward (a tie is wrong, as there). easy: the mean of the cells in
    which chosen has the fancier style; normal: the same style; hard: rejected has the fancier.
    mean: of these three. domains: the same of each; their matrices are averaged into the first,
    so that a domain weighs the same however many prompts it has. Other subsets are domains too.
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
    """RewardBench's section scores from margins by subset, if any subset is one of its own.

    sections: score, and accuracy (a tie is wrong, as there) and weight of the section's subsets
    that have pairs; a score is their weighted mean. mean: of the four sections (without "prior
    sets"), None unless every subset is there.
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
    """The matrix with its averages; None for a cell without pairs and what would need it."""
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
    """Lengths in tokens and rewards of the scored responses, each minus the mean of its group.

    Groups with one scored response are left out.
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
