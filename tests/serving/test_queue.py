"""The queue of a replica: what it takes, in which order, and what a failing row does to others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Hashable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrm.errors import Overloaded, RowFailed
from rayrm.model.engine import RewardModel
from rayrm.packing import TokenGroup
from rayrm.rows import make_rows
from rayrm.serving.queue import (
    GATHER_S,
    PACKS_WAITING,
    RETRY_AFTER,
    ModelBroken,
    Scored,
    TokenQueue,
    Values,
    compute_apart,
)

PACK = 200
LIMIT = int(PACKS_WAITING * PACK)


class Gate:
    """The local model, one forward for each time the gate is opened."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.open = threading.Semaphore(0)
        self.packs: list[int] = []

    def __call__(self, groups: Sequence[TokenGroup]) -> Sequence[Values]:
        assert self.open.acquire(timeout=60)
        self.packs.append(len(groups))
        return self.model.score_groups(groups)


@pytest.fixture(scope="module")
def local(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, "cpu", "float32")


def groups(n: int, tokens: int = 20, first: int = 5) -> list[TokenGroup]:
    """So many groups of one row, of so many tokens."""
    rows = [np.array([first + g, *[7] * (tokens - 1)], dtype=np.int32) for g in range(n)]
    return [TokenGroup.from_rows([row]) for row in rows]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, timeout=120))


async def settle() -> None:
    await asyncio.sleep(2 * GATHER_S)
    for _ in range(10):
        await asyncio.sleep(0)


def test_chunks_that_arrive_one_after_the_other_are_one_pack(local: RewardModel) -> None:
    async def test() -> None:
        gate = Gate(local)
        queue = TokenQueue(tokens_per_pack=100, max_tokens=1000)
        calls = []
        for _ in range(4):
            calls.append(asyncio.create_task(queue.score(groups(1), gate)))
            await asyncio.sleep(GATHER_S / 8)
        gate.open.release()
        await asyncio.gather(*calls)
        assert gate.packs == [4]

    run(test())


def test_a_pack_takes_what_fits_and_the_oldest_first(local: RewardModel) -> None:
    async def test() -> None:
        gate = Gate(local)
        queue = TokenQueue(tokens_per_pack=100, max_tokens=1000)
        sizes = [100, 60, 60, 30, 10, 150]
        calls = [asyncio.create_task(queue.score(groups(1, n), gate)) for n in sizes]
        await settle()
        gate.open.release(4)
        await asyncio.gather(*calls)
        assert gate.packs == [1, 3, 1, 1]

    run(test())


def test_a_caller_with_little_does_not_wait_for_one_with_much(local: RewardModel) -> None:
    async def test() -> None:
        served: list[int] = []

        def compute(taken: Sequence[TokenGroup]) -> Sequence[Values]:
            served.extend(int(group.suffixes[0][0]) for group in taken)
            return local.score_groups(taken)

        queue = TokenQueue(tokens_per_pack=40, max_tokens=10_000)
        much = asyncio.create_task(queue.score(groups(40), compute, "much"))
        await asyncio.sleep(0)
        little = asyncio.create_task(queue.score(groups(4, first=105), compute, "little"))
        await asyncio.gather(much, little)
        # A pack holds two: "little" is through after twice its own four, though "much" came first.
        assert sorted(served[:8])[-4:] == [105, 106, 107, 108]
        # Who was away is owed nothing: it shares from now on.
        served.clear()
        again = [
            asyncio.create_task(queue.score(groups(10, first=first), compute, caller))
            for first, caller in ((5, "little"), (105, "much"), (205, "new"))
        ]
        await asyncio.gather(*again)
        for first in (5, 105, 205):
            assert 4 <= len([id for id in served[:18] if first <= id < first + 100]) <= 8

    run(test())


def test_what_nobody_waits_for_is_computed_last(local: RewardModel) -> None:
    async def test() -> None:
        gate, queue = Gate(local), TokenQueue(PACK, LIMIT)
        order: list[str] = []

        async def score(name: str, caller: str | None, first: int) -> None:
            await queue.score(groups(10, first=first), gate, caller)
            order.append(name)

        calls = [asyncio.create_task(score("begun", "a", 5))]
        await asyncio.sleep(GATHER_S * 5)
        calls.append(asyncio.create_task(score("idle", None, 25)))
        await asyncio.sleep(0)
        calls += [asyncio.create_task(score(f"{c} {n}", c, 45)) for n in (1, 2) for c in "ab"]
        for _ in range(6):
            gate.open.release()
            await asyncio.sleep(0.05)
        await asyncio.gather(*calls)
        assert order[0] == "begun" and order[-1] == "idle"

    run(test())


def test_a_replica_alone_leaves_no_small_pack_for_the_end(local: RewardModel) -> None:
    def packs(outstanding: float, share: float) -> list[int]:
        gate, queue = Gate(local), TokenQueue(PACK, LIMIT)
        queue.outstanding, queue.share = outstanding, share
        for _ in range(9):
            gate.open.release()
        asyncio.run(queue.score(groups(15, 20), gate))
        return gate.packs

    assert packs(300, float("inf")) == [15]
    assert packs(3000, float("inf")) == [10, 5], "more will come, while this pack is computed"
    assert packs(300, 2 * PACK) == [10, 5], "others may take the rest"


def test_models_do_not_share_a_pack(local: RewardModel) -> None:
    async def test() -> None:
        gates = [Gate(local), Gate(local)]
        queue = TokenQueue(tokens_per_pack=100, max_tokens=1000)
        calls = [asyncio.create_task(queue.score(groups(1), gates[i % 2])) for i in range(4)]
        for gate in gates:
            gate.open.release(2)
        await asyncio.gather(*calls)
        assert [gate.packs for gate in gates] == [[2], [2]]

    run(test())


def test_work_between_packs_disturbs_none(local: RewardModel) -> None:
    async def test() -> None:
        gate = Gate(local)
        queue = TokenQueue(tokens_per_pack=20, max_tokens=1000)
        call = asyncio.create_task(queue.score(groups(2), gate))
        await settle()
        seen: list[int] = []
        alone = asyncio.create_task(
            asyncio.to_thread(queue.between_packs, lambda: seen.extend(gate.packs))
        )
        await asyncio.sleep(0.05)
        assert not seen
        gate.open.release(2)
        await asyncio.gather(call, alone)
        assert seen == [1]

    run(test())


def test_a_full_queue_says_no_at_once_and_when_to_come_back() -> None:
    queue = TokenQueue(tokens_per_pack=PACK, max_tokens=10_000)
    with ExitStack() as held:
        for caller in "abcd":
            held.enter_context(queue.admit(caller, LIMIT // 4))
        with pytest.raises(Overloaded, match=f"limit of {LIMIT}") as full:
            held.enter_context(queue.admit("e", LIMIT // 4))
        assert full.value.retry_after_s == RETRY_AFTER[1]  # nothing is known of its speed yet
        assert queue.admitted_tokens == LIMIT
    assert queue.admitted_tokens == 0
    with queue.admit("d", LIMIT // 4):
        assert queue.admitted_tokens == LIMIT // 4


@pytest.mark.parametrize(
    ("limits_a_second", "seconds"), [(1.0, RETRY_AFTER[1]), (5.0, 0.15), (1000.0, RETRY_AFTER[0])]
)
def test_a_refused_caller_comes_back_when_half_is_computed(
    limits_a_second: float, seconds: float
) -> None:
    """With another quarter three quarters of the limit are above its half, at that speed."""
    queue = TokenQueue(tokens_per_pack=PACK, max_tokens=LIMIT)
    queue.tokens_per_second = limits_a_second * LIMIT
    with ExitStack() as held:
        for caller in "abcd":
            held.enter_context(queue.admit(caller, LIMIT // 4))
        with pytest.raises(Overloaded) as full:
            held.enter_context(queue.admit("e", LIMIT // 4))
    assert full.value.retry_after_s == pytest.approx(seconds)


def test_memory_bounds_the_queue_whatever_the_speed(local: RewardModel) -> None:
    queue = TokenQueue(tokens_per_pack=100, max_tokens=150)
    with queue.admit("a", 75), pytest.raises(Overloaded), queue.admit("a", 76):
        pass


def test_how_long_to_wait_follows_from_the_measured_speed(local: RewardModel) -> None:
    async def test() -> None:
        gate = Gate(local)
        queue = TokenQueue(tokens_per_pack=PACK, max_tokens=LIMIT)
        call = asyncio.create_task(queue.score(groups(1, 100), gate))
        await asyncio.sleep(0.25)
        gate.open.release()
        await call
        assert 200 < queue.tokens_per_second < 440  # 100 tokens in a quarter of a second
        queue.tokens_per_second = 10 * LIMIT
        with queue.admit("a", LIMIT // 2), queue.admit("b", LIMIT // 2):
            with pytest.raises(Overloaded) as full, queue.admit("c", LIMIT // 4):
                pass
            # Until as much has been computed as is over half of the room.
            assert full.value.retry_after_s == pytest.approx((1 / 2 + 1 / 4) / 10, rel=0.01)

    run(test())


def test_a_replica_takes_less_where_little_is_left_to_share() -> None:
    queue = TokenQueue(tokens_per_pack=8192, max_tokens=10**6)
    sizes = []
    for share in (float("inf"), 20_000, 6_000, 100):
        queue.share = share
        sizes.append((queue.limit, queue.pack))
    assert sizes == [(4 * 8192, 8192), (10_000, 8192), (3_000, 3_000), (2048, 1024)]


def test_what_is_nearly_computed_leaves_room_for_what_comes_next() -> None:
    async def test() -> None:
        def compute(taken: Sequence[TokenGroup]) -> Sequence[Values]:
            time.sleep(0.4)
            return [np.zeros(1, np.float32) for _ in taken]

        queue = TokenQueue(tokens_per_pack=PACK, max_tokens=LIMIT)
        await queue.score(groups(1, PACK), compute)  # from here on its speed is known
        with queue.admit("a", PACK):
            call = asyncio.create_task(queue.score(groups(1, PACK), compute))
            await settle()
            with pytest.raises(Overloaded), queue.admit("a", LIMIT // 3):
                pass
            await asyncio.sleep(0.33)
            with queue.admit("a", LIMIT // 3):
                pass
            await call

    run(test())


def test_one_caller_cannot_take_all_the_room() -> None:
    queue = TokenQueue(tokens_per_pack=PACK, max_tokens=10_000)

    def fill(caller: Hashable, held: ExitStack) -> int:
        taken = 0
        while True:
            try:
                held.enter_context(queue.admit(caller, 10))
            except Overloaded:
                return taken
            taken += 10

    with ExitStack() as held:
        assert fill("greedy", held) == LIMIT / 2
        assert fill("second", held) >= LIMIT / 5
        assert fill("third", held) > 0


def test_what_is_larger_than_the_queue_gets_in_by_itself() -> None:
    queue = TokenQueue(tokens_per_pack=PACK, max_tokens=10_000)
    with (
        queue.admit("a", 20),
        queue.admit("b", 5 * LIMIT),
        pytest.raises(Overloaded),
        queue.admit("c", 20),
    ):
        pass


def test_the_groups_of_a_cancelled_caller_are_not_computed(local: RewardModel) -> None:
    async def test() -> None:
        gate = Gate(local)
        queue = TokenQueue(tokens_per_pack=20, max_tokens=100)
        first, second, third = (
            asyncio.create_task(queue.score(groups(n), gate)) for n in (1, 5, 1)
        )
        await settle()
        second.cancel()
        await settle()
        assert queue.queued_tokens == 20
        gate.open.release(2)
        await asyncio.gather(first, third)
        assert gate.packs == [1, 1]

    run(test())


class Picky:
    """The local model, which raises for packs with such ids in them."""

    def __init__(self, model: RewardModel, refused: set[int]) -> None:
        self.model = model
        self.refused = refused
        self.forwards = 0

    def __call__(self, groups: Sequence[TokenGroup]) -> Sequence[Values]:
        self.forwards += 1
        for group in groups:
            if self.refused & set(np.concatenate(group.rows).tolist()):
                raise RuntimeError("the kernel gave up")
        return self.model.score_groups(groups)


def test_one_bad_row_never_touches_its_neighbours(local: RewardModel) -> None:
    rows = make_rows([[5, 6]] * 8 + [[9]] * 8, [[20 + r, 30 + r % 3] for r in range(16)])
    encoded = local.encode(rows, local.template.spec.fingerprint)
    expected = local.score_groups(encoded.groups)
    picky = Picky(local, {23, 27, 35})  # the fourth and eighth of the first group, of the other two
    scored = compute_apart(picky, encoded.groups)
    assert [sorted(group.errors) for group in scored] == [[3, 7], [7]]
    for group, values in zip(scored, expected, strict=True):
        failed = [r in group.errors for r in range(8)]
        assert np.isnan(group.values).tolist() == failed
        np.testing.assert_allclose(
            group.values[~np.array(failed)], values[~np.array(failed)], atol=1e-5
        )
    assert isinstance(scored[0].errors[3], RowFailed)
    assert "the kernel gave up" in str(scored[0].errors[3])
    rewards = local.collect(encoded, [s.values for s in scored], [s.errors for s in scored])
    failed_rows = [i for i, error in enumerate(rewards.errors) if isinstance(error, RowFailed)]
    assert failed_rows == [3, 7, 15]


def test_a_model_that_raises_for_every_row_is_broken(local: RewardModel) -> None:
    picky = Picky(local, set(range(1000)))
    with pytest.raises(ModelBroken, match="gave up"):
        compute_apart(picky, groups(64))
    assert picky.forwards < 10  # and that is found out soon


def test_a_broken_model_reaches_exactly_the_callers_in_the_pack(local: RewardModel) -> None:
    async def test() -> None:
        broken = Picky(local, set(range(1000)))
        queue = TokenQueue(tokens_per_pack=40, max_tokens=1000)
        calls = [queue.score(groups(2), compute) for compute in (broken, local.score_groups)]
        failed, scored = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(failed, ModelBroken)
        assert isinstance(scored, list) and isinstance(scored[0], Scored)

    run(test())
