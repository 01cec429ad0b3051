"""A replica computes a row once, while it remembers it."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from rayrm.errors import RowFailed
from rayrm.packing import TokenGroup
from rayrm.serving.queue import Scored
from rayrm.serving.reward_cache import ENTRY_BYTES, RewardCache


class Adding:
    """Scores a row by the sum of its ids, when the gate is open; remembers what it was asked."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[list[list[int]]] = []
        self.bad: set[int] = set()

    async def __call__(self, groups: Sequence[TokenGroup]) -> list[Scored]:
        self.asked += [[row.tolist() for row in group.rows] for group in groups]
        await asyncio.sleep(0)
        await self.gate.wait()
        scored = []
        for group in groups:
            sums = [int(row.sum()) for row in group.rows]
            errors = {r: RowFailed(f"{s}") for r, s in enumerate(sums) if s in self.bad}
            values = [np.nan if s in self.bad else s for s in sums]
            scored.append(Scored(np.array(values, dtype=np.float32), errors))
        return scored

    def rows(self) -> list[list[int]]:
        return [row for group in self.asked for row in group]


def group(*rows: list[int]) -> TokenGroup:
    return TokenGroup.from_rows([np.array(row, dtype=np.int32) for row in rows])


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, timeout=120))


def test_a_row_is_computed_once_in_a_call_between_calls_and_later() -> None:
    async def test() -> None:
        known, adding = RewardCache(10**6), Adding()
        adding.gate.clear()
        first = asyncio.create_task(
            known.score("v", [group([1, 2], [1, 3], [1, 2]), group([1, 3])], adding)
        )
        await asyncio.sleep(0)
        second = asyncio.create_task(known.score("v", [group([1, 3], [1, 4])], adding))
        await asyncio.sleep(0)
        adding.gate.set()
        assert [s.values.tolist() for s in await first] == [[3, 4, 3], [4]]
        assert [s.values.tolist() for s in await second] == [[4, 5]]
        third = await known.score("v", [group([1, 4], [1, 5], [1, 2])], adding)
        assert third[0].values.tolist() == [5, 6, 3]
        assert sorted(adding.rows()) == [[1, 2], [1, 3], [1, 4], [1, 5]]
        assert known.rows_found == 1 + 2

    run(test())


def test_another_version_has_rewards_of_its_own() -> None:
    async def test() -> None:
        known, adding = RewardCache(10**6), Adding()
        for version in ("a", "b", "a"):
            await known.score(version, [group([1, 2])], adding)
        assert adding.rows() == [[1, 2], [1, 2]]

    run(test())


def test_rows_are_told_apart_whatever_they_share() -> None:
    async def test() -> None:
        known, adding = RewardCache(10**6), Adding()
        rows = [[1, 2, 3], [1, 2], [1, 2, 3, 0], [258], [1, 1]]
        for row in rows:
            (scored,) = await known.score("v", [group(row, [*row, 9])], adding)
            assert scored.values.tolist() == [sum(row), sum(row) + 9]

    run(test())


def test_what_failed_is_not_remembered() -> None:
    async def test() -> None:
        known, adding = RewardCache(10**6), Adding()
        adding.bad = {3}
        (scored,) = await known.score("v", [group([1, 2], [1, 3], [1, 2])], adding)
        assert sorted(scored.errors) == [0, 2] and scored.values[1] == 4
        adding.bad = set()
        (scored,) = await known.score("v", [group([1, 2])], adding)
        assert scored.values.tolist() == [3] and not scored.errors

    run(test())


def test_a_caller_that_leaves_does_not_take_its_rows_from_others() -> None:
    async def test() -> None:
        known, adding = RewardCache(10**6), Adding()
        adding.gate.clear()
        leaving = asyncio.create_task(known.score("v", [group([1, 2], [1, 3])], adding))
        await asyncio.sleep(0)
        staying = asyncio.create_task(known.score("v", [group([1, 3])], adding))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        adding.gate.set()
        assert (await staying)[0].values.tolist() == [4]

    run(test())


def test_without_memory_only_rows_on_their_way_are_shared() -> None:
    async def test() -> None:
        known, adding = RewardCache(0), Adding()
        both = (known.score("v", [group([1, 2])], adding) for _ in range(2))
        assert [s[0].values.tolist() for s in await asyncio.gather(*both)] == [[3], [3]]
        assert len(adding.asked) == 1 and len(known) == 0
        await known.score("v", [group([1, 2])], adding)
        assert len(adding.asked) == 2

    run(test())


def test_the_least_used_go_first_and_memory_is_bounded() -> None:
    async def test() -> None:
        adding = Adding()
        known = RewardCache(3 * ENTRY_BYTES)
        for row in ([1], [2], [3], [1], [4]):
            await known.score("v", [group(row)], adding)
        assert len(known) == 3
        await known.score("v", [group([1])], adding)
        assert adding.rows() == [[1], [2], [3], [4]]
        await known.score("v", [group([2])], adding)
        assert adding.rows()[-1] == [2]

        rows = 5_000
        known = RewardCache(rows * ENTRY_BYTES)
        tracemalloc.start()
        for start in range(0, 2 * rows, 1000):
            part = [group([start + i]) for i in range(1000)]
            await known.score("v", part, adding)
            adding.asked.clear()
        del part
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(known) == rows
        assert 0.5 < held / (rows * ENTRY_BYTES) <= 1

    run(test())
