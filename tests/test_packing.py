"""Groups → packs → shares: nothing lost, nothing twice, budgets kept. Random loops by seed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from rayrm.packing import (
    Pack,
    Segment,
    TokenGroup,
    balance,
    common_prefix,
    plan_packs,
    share_packs,
    split_group,
)
from tests.tiny import random_groups, random_ids

seeds = pytest.mark.parametrize("seed", range(30))


def ids(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def random_costs(seed: int) -> tuple[list[int], int]:
    """Up to 40 costs, some over the budget, and the budget."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 120, rng.integers(1, 40)).tolist(), int(rng.integers(20, 200))


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([ids(1, 2, 3, 4), ids(1, 2, 5, 6)], 2),
        ([ids(1, 2), ids(3, 4)], 0),
        ([ids(1, 2, 3), ids(1, 2, 3)], 2),
        ([ids(1, 2), ids(1, 2, 3)], 1),
        ([ids(1), ids(1, 2, 3)], 0),
        ([ids(1, 2, 3), ids(1, 2, 4), ids(1, 5, 6)], 1),
    ],
)
def test_the_common_prefix_leaves_every_row_its_last_token(
    rows: list[np.ndarray[tuple[int], np.dtype[np.int32]]], shared: int
) -> None:
    assert common_prefix(rows) == shared
    group = TokenGroup.from_rows(rows)
    assert len(group.prefix) == shared
    assert all(len(suffix) >= 1 for suffix in group.suffixes)
    for row, again in zip(rows, group.rows, strict=True):
        assert np.array_equal(row, again)


def test_a_lone_row_shares_nothing() -> None:
    group = TokenGroup.from_rows([ids(1, 2, 3)])
    assert len(group.prefix) == 0 and group.tokens == 3


@seeds
def test_sharing_loses_no_token(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 3, rng.integers(1, 9)).astype(np.int32) for _ in range(4)]
    group = TokenGroup.from_rows(rows)
    shared = len(group.prefix)
    assert all(np.array_equal(a, b) for a, b in zip(rows, group.rows, strict=True))
    assert group.tokens == shared + sum(len(row) - shared for row in rows)
    assert shared == min(map(len, rows)) - 1 or len({int(row[shared]) for row in rows}) > 1


def test_a_pack_lays_prefix_before_suffixes_and_continues_positions() -> None:
    pack = Pack.from_groups(
        [
            TokenGroup(ids(10, 11, 12), (ids(20), ids(30, 31))),
            TokenGroup(ids(), (ids(40, 41), ids(50))),
        ]
    )
    assert pack.input_ids.tolist() == [10, 11, 12, 20, 30, 31, 40, 41, 50]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 0, 1, 0]
    assert pack.last.tolist() == [3, 5, 7, 8]
    assert pack.segments == (
        Segment(0, 3, 0, 0),
        Segment(3, 4, 0, 3),
        Segment(4, 6, 0, 3),
        Segment(6, 8, 6, 6),
        Segment(8, 9, 6, 6),
    )
    assert {x.dtype for x in (pack.input_ids, pack.position_ids, pack.last)} == {np.dtype("int32")}


@pytest.mark.parametrize("seed", range(5))
def test_every_row_can_be_read_back_from_its_pack(seed: int) -> None:
    groups = random_groups(seed)
    pack = Pack.from_groups(groups)
    rows = [row for group in groups for row in group.rows]
    ends = {s.end - 1: s for s in pack.segments}
    assert len(pack.input_ids) == sum(group.tokens for group in groups)
    for row, last in zip(rows, pack.last, strict=True):
        s = ends[int(last)]
        at = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        assert np.array_equal(pack.input_ids[at], row)
        assert pack.position_ids[at].tolist() == list(range(len(row)))


@seeds
def test_every_group_is_in_one_pack_and_packs_keep_the_budget(seed: int) -> None:
    costs, budget = random_costs(seed)
    packs = plan_packs(costs, budget)
    assert sorted(i for pack in packs for i in pack) == list(range(len(costs)))
    for pack in packs:
        assert len(pack) == 1 or sum(costs[i] for i in pack) <= budget
    # First fit: no two packs could have been one.
    sums = sorted(sum(costs[i] for i in pack) for pack in packs)
    assert len(sums) < 2 or sums[0] + sums[1] > budget


@seeds
def test_every_group_is_in_the_first_pack_that_has_room(seed: int) -> None:
    costs, budget = random_costs(seed)
    packs: list[list[int]] = []
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        for pack in packs:
            if sum(costs[j] for j in pack) + costs[i] <= budget:
                pack.append(i)
                break
        else:
            packs.append([i])
    assert plan_packs(costs, budget) == packs
    assert plan_packs([], budget) == [] and plan_packs([budget + 1], budget) == [[0]]


@seeds
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_get_equally_many_micro_batches_within_the_budget(seed: int, world_size: int) -> None:
    costs, budget = random_costs(seed)
    shares = share_packs(costs, world_size, budget)
    assert len(shares) == world_size
    assert len({len(share) for share in shares}) == 1
    micro_batches = [batch for share in shares for batch in share]
    assert sorted(i for batch in micro_batches for i in batch) == list(range(len(costs)))
    for batch in micro_batches:
        assert len(batch) <= 1 or sum(costs[i] for i in batch) <= budget, "out of memory"


def test_balancing_does_not_break_the_budget() -> None:
    """[5 4] [5 4] [3 3 3] fit 9 each; longest first into three bins would make one of 11."""
    costs = [5, 5, 4, 4, 3, 3, 3]
    for batch in (b for share in share_packs(costs, 3, 9) for b in share):
        assert sum(costs[i] for i in batch) <= 9


def test_with_fewer_groups_than_ranks_some_micro_batches_are_empty() -> None:
    shares = share_packs([7], 3, 100)
    assert [len(share) for share in shares] == [1, 1, 1]
    assert sorted(len(batch) for share in shares for batch in share) == [0, 0, 1]


def test_equal_groups_are_shared_out_equally() -> None:
    shares = share_packs([10] * 16, 2, 40)
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4], [4, 4]]


@seeds
def test_balance_spreads_everything_costliest_first(seed: int) -> None:
    costs, _ = random_costs(seed)
    bins = balance(costs, 4)
    sums = [sum(costs[i] for i in b) for b in bins]
    assert sorted(i for b in bins for i in b) == list(range(len(costs)))
    assert sums == sorted(sums, reverse=True)
    # Longest first: the largest bin is the smallest plus one item at most.
    assert sums[0] - sums[-1] <= max(costs)


def test_plans_do_not_depend_on_anything_but_the_costs() -> None:
    costs, budget = random_costs(3)
    assert plan_packs(costs, budget) == plan_packs(list(costs), budget)
    assert share_packs(costs, 2, budget) == share_packs(list(costs), 2, budget)


@seeds
def test_splitting_a_group_covers_every_response_once_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prefix = random_ids(rng, int(rng.integers(0, 20)))
    suffixes = tuple(random_ids(rng, int(n)) for n in rng.integers(1, 15, rng.integers(1, 20)))
    group, budget = TokenGroup(prefix, suffixes), int(rng.integers(8, 60))
    parts = list(split_group(group, budget))
    assert [i for part in parts for i in part] == list(range(len(suffixes)))
    for part in parts:
        assert len(part) >= 1
        cost = len(prefix) + sum(len(suffixes[i]) for i in part)
        assert len(part) == 1 or cost <= budget


def test_a_group_that_fits_stays_whole() -> None:
    group = TokenGroup(ids(1, 2), (ids(3), ids(4), ids(5)))
    assert list(split_group(group, 5)) == [range(3)]
    assert list(split_group(group, 4)) == [range(2), range(2, 3)]


def test_packing_needs_no_torch() -> None:
    code = "import sys, rayrm.packing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
