"""What callers wait for, added up over replicas: every token once, and none after its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue

from rayrm.errors import Overloaded, VersionGone
from rayrm.serving.autoscale import OUTSTANDING, WAITING, add_up
from rayrm.serving.demand import HEARD_S, NAMED, Demand
from rayrm.serving.queue import PACKS_WAITING, TokenQueue
from rayrm.serving.ticket import Caller, Ticket
from tests.simulation import run_virtually

HTTP = Caller("http 10.0.0.7", "job", "endpoint")
REPLICAS = 4
PACK = 8192


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        run_virtually(test())

    run.__name__ = test.__name__
    return run


def one_row(step: str, tokens: int) -> Ticket:
    return Ticket(step, "0", HTTP, outstanding=tokens, replicas=REPLICAS)


def outstanding(replicas: Sequence[Demand]) -> float | None:
    """What the policy makes of the replicas' reports."""
    reports: dict[str, dict[int, list[TimeStampedValue]]] = {}
    for r, replica in enumerate(replicas):
        for name, value in replica.report().items():
            reports.setdefault(name, {})[r] = [TimeStampedValue(1.0, value)]
    return add_up(reports)


def refuse(replica: Demand, ticket: Ticket, tokens: int) -> None:
    with pytest.raises(Overloaded), replica.chunk(ticket, tokens):
        raise Overloaded("full", 0.1)


def full_queue(replica: Demand) -> TokenQueue:
    queue = TokenQueue(PACK, 10**6)
    queue.own, queue.share, queue.outstanding = replica.wanted()
    return queue


@in_loop
async def test_many_steps_of_one_row_are_all_counted_and_fill_packs() -> None:
    replicas = [Demand() for _ in range(REPLICAS)]
    with ExitStack() as here:
        for n in range(500):
            here.enter_context(replicas[n % REPLICAS].chunk(one_row(f"{n}", 400), 400))
        assert outstanding(replicas) == 200_000
        for replica in replicas:
            assert full_queue(replica).pack == PACK
            assert full_queue(replica).limit == PACKS_WAITING * PACK
    assert outstanding(replicas) == 0
    assert full_queue(replicas[0]).pack < PACK


@in_loop
async def test_steps_that_all_replicas_hear_of_count_once() -> None:
    replicas = [Demand() for _ in range(REPLICAS)]
    with ExitStack() as here:
        for n in range(8):
            step = Ticket(f"{n}", "0", HTTP, "", 50_000, 46_000, REPLICAS, spread=True)
            for replica in replicas:
                here.enter_context(replica.chunk(step, 1000))
        assert outstanding(replicas) == 8 * 50_000
        own, share, _ = replicas[0].wanted()
        assert (own, share) == (0, 8 * 50_000 / REPLICAS)


@in_loop
async def test_a_step_ends_where_its_last_answer_leaves() -> None:
    replicas = [Demand() for _ in range(2)]
    with replicas[0].chunk(Ticket("s", "0", HTTP, "", 3000, 2000, 2, spread=True), 1000):
        with replicas[1].chunk(Ticket("s", "1", HTTP, "", 3000, 1000, 2, spread=True), 1000):
            assert outstanding(replicas) == 3000  # the second knows best what waits
        last = Ticket("s", "2", HTTP, "", 2000, 0, 2, spread=True)
        with replicas[1].chunk(last, 1000):
            assert outstanding(replicas) == 2000
    assert outstanding(replicas) == 0
    assert replicas[1].wanted().share == 0


@in_loop
async def test_who_never_hears_of_a_steps_end_does_not_believe_in_it_for_ever() -> None:
    replica = Demand()
    with replica.chunk(Ticket("s", "0", HTTP, "", 9000, 8000, 2, spread=True), 1000):
        pass
    assert outstanding([replica]) == 8000
    await asyncio.sleep(HEARD_S + 0.1)
    assert outstanding([replica]) == 0
    assert replica.wanted() == (0, 0, 0)


@in_loop
async def test_what_waits_stands_while_a_slow_pack_computes() -> None:
    replica = Demand()
    with replica.chunk(Ticket("s", "0", HTTP, "", 9000, 8000, 2, spread=True), 1000):
        await asyncio.sleep(10 * HEARD_S)
        assert outstanding([replica]) == 9000
        # Others may have taken it all by now: packs go by what is surely wanted.
        assert replica.wanted().share == 500


@in_loop
async def test_a_refused_step_still_waits_and_counts_once_wherever_it_knocks() -> None:
    replicas = [Demand() for _ in range(REPLICAS)]
    ticket = one_row("s", 400)
    for replica in replicas:
        refuse(replica, ticket, 400)
        ticket = replace(ticket, spread=True)
    assert outstanding(replicas) == 400
    with replicas[2].chunk(ticket, 400):
        assert outstanding(replicas) == 400
    assert outstanding(replicas) == 0


@in_loop
async def test_who_gave_up_after_refusals_is_forgotten() -> None:
    replicas = [Demand() for _ in range(REPLICAS)]
    for n in range(500):
        refuse(replicas[n % REPLICAS], one_row(f"{n}", 400), 400)
    assert outstanding(replicas) == 200_000
    await asyncio.sleep(HEARD_S + 0.1)
    assert outstanding(replicas) == 0
    assert not replicas[0]._steps


@pytest.mark.parametrize("error", [asyncio.CancelledError(), VersionGone("gone"), RuntimeError()])
def test_a_step_that_is_cancelled_or_fails_waits_for_nothing(error: BaseException) -> None:
    async def test() -> None:
        replica = Demand()
        ticket = Ticket("s", "0", HTTP, "v", 9000, 8000, 2, spread=True)
        with pytest.raises(type(error)), replica.chunk(ticket, 1000):
            raise error
        assert outstanding([replica]) == 0

    run_virtually(test())


@in_loop
async def test_a_step_that_begins_again_counts_again() -> None:
    replica = Demand()
    old = Ticket("s", "0", HTTP, "old", 9000, 8000, 2, spread=True)
    with pytest.raises(VersionGone), replica.chunk(old, 1000):
        raise VersionGone("gone")
    with replica.chunk(replace(old, version="new"), 1000):
        assert outstanding([replica]) == 9000


@in_loop
async def test_steps_of_one_name_by_two_callers_are_two() -> None:
    replica = Demand()
    for caller in (HTTP, Caller("other", "job", "")):
        refuse(replica, replace(one_row("s", 400), caller=caller), 400)
    assert outstanding([replica]) == 800


@in_loop
async def test_a_report_is_small_however_many_wait_and_names_the_largest() -> None:
    replica = Demand()
    for n in range(2 * NAMED):
        refuse(replica, one_row("x" * 1000 + str(n), 100 + n), 100 + n)
    report = replica.report()
    waiting = [tokens for name, tokens in report.items() if name.startswith(WAITING)]
    assert sorted(waiting) == [100 + n for n in range(NAMED, 2 * NAMED)]
    assert max(map(len, report)) < 40
    assert report[OUTSTANDING] == 0


@in_loop
async def test_a_replica_alone_leaves_nothing_to_others() -> None:
    replica = Demand()
    with replica.chunk(Ticket("s", "0", HTTP, "", 9000, 8000, replicas=1, spread=True), 1000):
        assert replica.wanted() == (0, float("inf"), 9000)
        assert full_queue(replica).pack == PACK
