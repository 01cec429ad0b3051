"""Pairs of one prompt → parts: nothing lost, limits kept, few responses in two parts."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rayrm.training.split_pairs import connected, split_pairs

Ints = NDArray[np.int64]
seeds = pytest.mark.parametrize("seed", range(30))


def random_pairs(seed: int) -> tuple[Ints, Ints, int]:
    """Up to 300 pairs over 2 to 400 responses, so of few or of many connected parts; the limit."""
    rng = np.random.default_rng(seed)
    responses = int(rng.integers(2, 400))
    chosen = rng.integers(0, responses, int(rng.integers(1, 300)))
    rejected = (chosen + rng.integers(1, responses, len(chosen))) % responses
    return chosen, rejected, int(rng.integers(1, 40))


def responses_of(part: Ints, chosen: Ints, rejected: Ints) -> set[int]:
    return {*chosen[part].tolist(), *rejected[part].tolist()}


@seeds
def test_every_pair_is_in_one_part_of_at_most_the_limit(seed: int) -> None:
    chosen, rejected, limit = random_pairs(seed)
    parts = split_pairs(chosen, rejected, np.arange(len(chosen)), limit)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(chosen)))
    for part in parts:
        assert 1 <= len(part) <= limit and np.all(np.diff(part) > 0)


@seeds
def test_a_response_is_in_two_parts_only_where_what_connects_it_is_above_the_limit(
    seed: int,
) -> None:
    chosen, rejected, limit = random_pairs(seed)
    parts = split_pairs(chosen, rejected, np.arange(len(chosen)), limit)
    for pairs in connected(chosen, rejected):
        where = {n for n, part in enumerate(parts) if {*pairs} & {*part.tolist()}}
        assert len(where) == 1 or len(pairs) > limit


@seeds
def test_connected_parts_share_no_response_and_cannot_be_smaller(seed: int) -> None:
    chosen, rejected, _ = random_pairs(seed)
    parts = [np.array(pairs) for pairs in connected(chosen, rejected)]
    ends = [responses_of(part, chosen, rejected) for part in parts]
    assert sum(map(len, ends)) == len(set().union(*ends))
    for part, inside in zip(parts, ends, strict=True):
        reached = {int(chosen[part[0]])}
        for _ in part:
            for a, b in zip(chosen[part].tolist(), rejected[part].tolist(), strict=True):
                if reached & {a, b}:
                    reached |= {a, b}
        assert reached == inside


@seeds
def test_choices_stay_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    best = rng.integers(0, 30, 25)  # 25 choices of 1 to 8 pairs, several of one response
    choice = np.repeat(np.arange(25), rng.integers(1, 9, 25))
    chosen = best[choice]
    rejected = (chosen + rng.integers(1, 30, len(chosen))) % 30
    parts = split_pairs(chosen, rejected, choice, 16)
    assert len(parts) > 1 and max(map(len, parts)) <= 16
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(chosen)))
    for number in range(25):
        assert sum(number in choice[part] for part in parts) == 1


def test_up_to_the_limit_a_prompt_is_one_part_and_without_one_whatever_its_size() -> None:
    chosen = np.arange(64) * 2
    for limit, count in ((64, 1), (None, 1), (63, 2)):
        parts = split_pairs(chosen, chosen + 1, np.arange(64), limit)
        assert [len(part) for part in parts] == [64] if count == 1 else [63, 1]


def test_what_is_cut_keeps_responses_together() -> None:
    """All 496 pairs of 32 responses, in any order: parts of 64 hold about 12 responses, not 32."""
    first, second = np.triu_indices(32, 1)
    order = np.random.default_rng(0).permutation(len(first))
    first, second = first[order], second[order]
    parts = split_pairs(first, second, np.arange(len(first)), 64)
    assert len(parts) == 8
    assert sum(len(responses_of(part, first, second)) for part in parts) < 8 * 24


def test_parts_are_pinned() -> None:
    """Other parts would not resume the runs of an earlier version."""
    chosen = np.array([0, 2, 0, 4, 5, 0, 8, 4, 10])
    rejected = np.array([1, 3, 5, 6, 4, 7, 9, 5, 11])
    parts = split_pairs(chosen, rejected, np.arange(9), 3)
    assert [part.tolist() for part in parts] == [[0, 2, 4], [1, 6, 8], [3, 5, 7]]
