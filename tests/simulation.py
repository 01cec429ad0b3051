"""A cluster of replicas and callers in virtual time: real planning, sending, routing and queueing.

What runs is Step, Sending, Replica.score, TokenQueue and the router class of Ray Serve. Simulated
are the clock, the network between a router and a replica, and the seconds that a pack takes. Knows
nothing of tokenizing, serialisation, the object store, a busy event loop, the cache of known
rewards, or deaths: a real cluster is slower by those.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, groupby
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    TimeStampedValue,
)
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from rayrm.config import OWN
from rayrm.model.engine import RewardModel
from rayrm.packing import Ids, TokenGroup
from rayrm.rows import Rewards, Row
from rayrm.serving.application import MAX_ONGOING_REQUESTS
from rayrm.serving.autoscale import add_up
from rayrm.serving.chunk import Chunk, Step
from rayrm.serving.demand import Demand
from rayrm.serving.queue import Scored, TokenQueue, Values, _Place, _tokens
from rayrm.serving.replica import Replica
from rayrm.serving.sending import Sending
from rayrm.serving.ticket import Caller, Ticket
from rayrm.serving.transports import Answer, Target, Transport

TOKENS_PER_PACK = 8192
MAX_QUEUE_TOKENS = 1_000_000

# One way between a router and a replica, seconds.
LATENCY_S = 0.001

# A pack of SmolLM2-135M (bfloat16, groups of a prompt and eight responses as below) took 0.24 s at
# 355 tokens, 1.02 s at 1998, 2.03 s at 4161 and 4.40 s at 8643, on two AMD EPYC cores: these two
# numbers give all ten that were measured to 5 %, but for one that was 20 % slower.
SECONDS_PER_PACK = 0.06
SECONDS_PER_TOKEN = 1 / 2000

# Mean and standard deviation of the logarithm of tokens, and what to cut off: the least and most of
# 1790 prompts and 3580 responses of hh-rlhf's harmless test rows, in SmolLM2's tokens and template.
PROMPTS = 4.33, 1.06, 8, 844
RESPONSES = 3.59, 0.77, 6, 561
RESPONSES_PER_PROMPT = 8


def pack_seconds(tokens: float) -> float:
    return SECONDS_PER_PACK + SECONDS_PER_TOKEN * tokens


class Jump(selectors.SelectSelector):
    """Where an event loop would wait, its clock moves on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits for something that never comes"
        self.now += max(0.0, timeout)
        return []


class NumberedTask(asyncio.Task[Any]):
    """A task with the same hash, and so the same place in the router's sets, in every run."""

    numbers = count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.number = next(self.numbers)  # before asyncio's set of all tasks hashes it
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose seconds take no time. What other threads do never reaches it."""

    def __init__(self) -> None:
        self.jump = Jump()
        super().__init__(self.jump)
        NumberedTask.numbers = count()
        self.set_task_factory(lambda loop, main, **given: NumberedTask(main, loop=loop, **given))

    def time(self) -> float:
        return self.jump.now


def run_virtually(main: Coroutine[Any, Any, Any]) -> Any:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


class SimulatedQueue(TokenQueue):
    """The queue of a replica whose packs only take their time."""

    def __init__(self, speed: float) -> None:
        super().__init__(TOKENS_PER_PACK, MAX_QUEUE_TOKENS)
        self.speed = speed
        self.packs: list[int] = []

    async def _compute(self, pack: Sequence[_Place]) -> list[Scored]:
        self.packs.append(_tokens(pack))
        await asyncio.sleep(pack_seconds(_tokens(pack)) / self.speed)
        return [Scored(np.zeros(len(place.group.suffixes), np.float32)) for place in pack]


@dataclass(frozen=True)
class NumberedID:
    """A ReplicaID with the same hash, and so the same place in the router's sets, in every run."""

    number: int

    @property
    def unique_id(self) -> str:
        return str(self.number)


class SimulatedReplica(Replica):
    """Our replica, whose model takes its time and gives 0; and what a router knows of it."""

    node_id = "node"
    availability_zone = "zone"
    multiplexed_model_ids: frozenset[str] = frozenset()
    max_ongoing_requests = MAX_ONGOING_REQUESTS
    queue: SimulatedQueue

    def __init__(self, number: int, speed: float = 1.0) -> None:
        self.replica_id = cast(ReplicaID, NumberedID(number))
        self.queue = SimulatedQueue(speed)
        self.demand = Demand()
        self.ongoing = self.calls = self.refused = 0
        # Of virtual seconds no thread hears: callers do not die here, and nobody scrapes.
        self.in_progress = cast(Any, SimpleNamespace(call=lambda _: nullcontext()))
        self.models = cast(Any, SimpleNamespace(get=held, shadow=None))
        self.metrics = cast(Any, SimpleNamespace(refused=lambda _: None))

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(2 * LATENCY_S)
        return self.ongoing

    async def _answer(self, model: RewardModel, chunk: Chunk, ticket: Ticket) -> dict[str, Rewards]:
        scored = await self.queue.score(to_groups(chunk), no_model, ticket.caller)
        return {OWN: to_rewards(np.concatenate([group.values for group in scored]))}


async def held(version: str) -> None:
    """The model of any version, which is none."""


def no_model(groups: Sequence[TokenGroup]) -> Sequence[Values]:
    raise AssertionError("a simulated queue computes nothing")


def to_groups(chunk: Chunk) -> list[TokenGroup]:
    """A chunk's rows, which stand prompt by prompt, as a model would encode them."""
    responses = cast(list[Ids], chunk.responses.unpack())
    by_prompt = groupby(zip(chunk.prompt_of, responses, strict=True), key=lambda row: row[0])
    prompts = cast(list[Ids], chunk.prompts.unpack())
    return [
        TokenGroup(prompts[p], tuple(response for _, response in rows)) for p, rows in by_prompt
    ]


def to_rewards(values: Values) -> Rewards:
    n = len(values)
    nothing = np.zeros(n, dtype=np.bool_)
    return Rewards(values, [None] * n, nothing, nothing, [""] * n)


class SimulatedHandle(Transport):
    """One caller's handle: chooses a replica as Serve's router does, and asks it."""

    name = "simulated"

    def __init__(self, replicas: Sequence[SimulatedReplica]) -> None:
        self.replicas = len(replicas)
        self.router = PowerOfTwoChoicesRequestRouter(
            deployment_id=DeploymentID("Replica", "simulated"),
            handle_source=DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            get_curr_time_s=asyncio.get_running_loop().time,
        )
        self.router.update_replicas(cast(list[RunningReplica], list(replicas)))
        self.numbers = count()

    def caller(self, name: str | None) -> Caller:
        return Caller(name or "caller", "job", "")

    async def find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        return Target(self.replicas, TOKENS_PER_PACK, "simulated")

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        reply = await asyncio.ensure_future(self._request(chunk, ticket))
        if isinstance(reply, Exception):
            raise reply
        return Answer(reply, target.version)

    async def _request(self, chunk: Chunk, ticket: Ticket) -> dict[str, Rewards] | Exception:
        """What ray/serve/_private/router.py does around a request, rejections excepted."""
        name = f"{ticket.step}-{ticket.part}"
        metadata = RequestMetadata(name, f"{name}-{next(self.numbers)}", call_method="score")
        pending = PendingRequest(args=[], kwargs={}, metadata=metadata)
        chosen = await self.router._choose_replica_for_request(pending)
        replica, id = cast(SimulatedReplica, chosen), chosen.replica_id
        self.router.on_send_request(id)
        await asyncio.sleep(LATENCY_S)
        assert replica.ongoing < replica.max_ongoing_requests
        replica.ongoing += 1
        loop = asyncio.get_running_loop()
        loop.call_later(LATENCY_S, self.router.on_new_queue_len_info, id, replica.ongoing)
        try:
            reply = await replica.score(chunk, ticket)
        finally:
            replica.ongoing -= 1
            loop.call_later(LATENCY_S, self.router.decrement_queue_len_cache, id)
        await asyncio.sleep(LATENCY_S)
        return reply


def make_rows(draw: np.random.Generator, prompts: int) -> list[Row]:
    """Token ids of real lengths, prompts and responses all different."""
    rows: list[Row] = []
    for length in _lengths(draw, PROMPTS, prompts):
        prompt = _ids(draw, length)
        responses = _lengths(draw, RESPONSES, RESPONSES_PER_PROMPT)
        rows += [Row(prompt, _ids(draw, length)) for length in responses]
    return rows


def _lengths(
    draw: np.random.Generator, fit: tuple[float, float, int, int], n: int
) -> NDArray[np.int64]:
    mean, std, least, most = fit
    return draw.lognormal(mean, std, n).round().clip(least, most).astype(np.int64)


def _ids(draw: np.random.Generator, length: int) -> Ids:
    return draw.integers(49152, size=length, dtype=np.int32)


def tokens_of(rows: Sequence[Row]) -> int:
    """Tokens to compute, each prompt once."""
    prompts = {id(row.prompt): len(row.prompt) for row in rows}
    return sum(prompts.values()) + sum(len(row.response) for row in rows)


@dataclass(frozen=True)
class Outcome:
    """Virtual seconds until the last reward, and at best.

    reported: outstanding tokens as the autoscaling policy adds them up, each second and at the end.
    """

    makespan: float
    ideal: float
    reported: Sequence[float] = field(repr=False)
    replicas: Sequence[SimulatedReplica] = field(repr=False)

    @property
    def refused(self) -> int:
        return sum(replica.refused for replica in self.replicas)

    @property
    def packs(self) -> list[int]:
        """Tokens of each."""
        return [tokens for replica in self.replicas for tokens in replica.queue.packs]

    @property
    def ratio(self) -> float:
        return self.makespan / self.ideal

    def __str__(self) -> str:
        calls = sum(replica.calls for replica in self.replicas)
        return (
            f"{self.makespan:.1f} s of {self.ideal:.1f}: {self.ratio:.3f}; {calls} calls, "
            f"{self.refused} refused, {len(self.packs)} packs of {np.mean(self.packs):.0f} tokens"
        )


def simulate(
    steps: Sequence[Sequence[Sequence[Row]]], speeds: Sequence[float], at_once: bool = False
) -> Outcome:
    """Each caller's steps, one after the other or at once, on replicas of such speeds.

    All rewards came.
    """
    random.seed(0)
    makespan, reported, replicas = run_virtually(_simulate(steps, speeds, at_once))
    tokens = sum(tokens_of(step) for caller in steps for step in caller)
    packs = tokens / TOKENS_PER_PACK
    ideal = packs * pack_seconds(TOKENS_PER_PACK) / sum(speeds)
    return Outcome(makespan, ideal, reported, replicas)


async def _simulate(
    steps: Sequence[Sequence[Sequence[Row]]], speeds: Sequence[float], at_once: bool
) -> tuple[float, Sequence[float], Sequence[SimulatedReplica]]:
    replicas = [SimulatedReplica(number, speed) for number, speed in enumerate(speeds)]
    reported: list[float] = []

    async def call(number: int, steps: Sequence[Sequence[Row]]) -> None:
        handle = SimulatedHandle(replicas)
        caller = handle.caller(f"caller {number}")
        target = await handle.find(caller, (OWN,), "")

        async def score(s: int, rows: Sequence[Row]) -> None:
            sending = Sending(handle, target, f"{number}-{s}", caller)
            rewards = (await sending.send(Step(rows), None, None))[OWN]
            assert len(rewards) == len(rows) and not np.isnan(rewards.values).any()

        if at_once:
            await asyncio.gather(*(score(*numbered) for numbered in enumerate(steps)))
        else:
            for numbered in enumerate(steps):
                await score(*numbered)

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            reported.append(outstanding(replicas))

    watching = asyncio.ensure_future(watch())
    await asyncio.gather(*(call(*numbered) for numbered in enumerate(steps)))
    watching.cancel()
    makespan = asyncio.get_running_loop().time()
    return makespan, [*reported, outstanding(replicas)], replicas


def outstanding(replicas: Sequence[SimulatedReplica]) -> float:
    """Tokens by the reports of all, taken at the same time."""
    reports: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica in replicas:
        for name, value in replica.demand.report().items():
            reports.setdefault(name, {})[replica.replica_id] = [TimeStampedValue(0.0, value)]
    return cast(float, add_up(reports))
