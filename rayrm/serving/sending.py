"""One attempt at a step: its chunks on their way, each sent until it is answered.

What is sent again, and when, is decided here. Knows nothing of how a chunk travels.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from rayrm.errors import Overloaded, ServiceError
from rayrm.rows import Rewards
from rayrm.serving.chunk import CHUNKS_PER_REPLICA, Arrival, Chunk, Step
from rayrm.serving.ticket import Caller, Ticket
from rayrm.serving.transports import Away, Lost, NoRoom, Target, Transport

logger = logging.getLogger("rayrm")

# How often a chunk is sent again after its replica died: rows that kill every replica must not go
# round for ever.
RETRIES = 5

# Seconds between attempts, doubled each time up to the second.
BACKOFF = (0.2, 5.0)

# Refused chunks of a step that knock again within the time they were told to wait; the others wait
# for longer, so that how often a caller knocks does not grow with its step.
KNOCKS = 16

Named = dict[str, Rewards]
"""Rewards of the same rows, by the reward's name."""

OnArrival = Callable[["NDArray[Any]", Any], None]


class Sending:
    """A step on its way to a target, or a part of one that comes in several requests.

    part: the part's number, in front of those of its chunks. outstanding: tokens of the whole step,
    about, that have no answer yet, where they are more than the part's own.
    """

    def __init__(
        self,
        transport: Transport,
        target: Target,
        step: str,
        caller: Caller,
        *,
        patience_s: float = math.inf,
        part: str = "",
        outstanding: int = 0,
    ) -> None:
        self.transport = transport
        self.target = target
        self.step = step
        self.caller = caller
        self.patience_s = patience_s
        self.part = part
        self.outstanding = outstanding
        self.elsewhere = 0
        self.waiting = 0
        self.spread = False
        self.refused = 0
        self.answered_at = math.inf

    async def send(self, step: Step, tokenizer: str | None, on_arrival: OnArrival | None) -> Named:
        """Cut the step, keep a few chunks a replica in flight, collect what arrives."""
        self.answered_at = asyncio.get_running_loop().time()
        cut = step.cut(self.target.replicas, self.target.tokens_per_pack)
        chunks = [step.chunk(keys, tokenizer) for keys in cut]
        tokens = sum(map(self._cost, chunks))
        self.elsewhere = max(0, self.outstanding - tokens)
        self.outstanding = self.waiting = tokens
        self.spread = len(chunks) > 1 or self.elsewhere > 0

        places = asyncio.Semaphore(CHUNKS_PER_REPLICA * self.target.replicas)

        async def score(part: int) -> dict[str, Arrival]:
            chunk = chunks[part]
            async with places:
                self.waiting -= self._cost(chunk)
                await asyncio.sleep(0)  # the others that have a place do not wait either
                reply = await self.send_chunk(part, chunk)
            arrived = {name: step.arrived(cut[part], of) for name, of in reply.items()}
            self.outstanding -= self._cost(chunk)
            if on_arrival:
                rows, _ = next(iter(arrived.values()))
                on_arrival(rows, {name: of for name, (_, of) in arrived.items()})
            return arrived

        # Where nobody knows which version is served, the first answer tells: alone.
        first = 0 if self.target.version else 1
        arrivals = [await score(part) for part in range(len(chunks))[:first]]
        tasks = [asyncio.ensure_future(score(part)) for part in range(len(chunks))[first:]]
        try:
            arrivals += await asyncio.gather(*tasks)
            return {name: step.collect([a[name] for a in arrivals]) for name in self.target.rewards}
        finally:
            for task in tasks:
                task.cancel()

    def _cost(self, chunk: Chunk) -> int:
        """Tokens to compute, about: every reward takes a forward of its own."""
        return chunk.cost * len(self.target.rewards)

    async def send_chunk(self, part: int, chunk: Chunk) -> Named:
        """One chunk's rewards, from whichever replica is alive and has room."""
        lost = full = away = 0
        while True:
            try:
                answer = await self.transport.call(self.target, chunk, self._ticket(part))
            except Overloaded as refusal:
                await self._wait_for_room(refusal, self._cost(chunk))
                continue
            except NoRoom as error:
                wait = backoff(full := full + 1)
                self._warn(part, "found no room in the object store", error)
            except Away as error:
                wait = backoff(away := away + 1)
                self._warn(part, "did not reach the service", error)
            except Lost as error:
                wait = backoff(lost := lost + 1)
                self._warn(part, f"lost its replica, time {lost}", error)
                if lost > RETRIES:
                    raise ServiceError(
                        f"{lost} replicas of {self.transport.name} died while they scored the same "
                        f"{len(chunk.finished)} rows of step {self.step}; the last: {error}"
                    ) from error
            else:
                self.answered_at = asyncio.get_running_loop().time()
                self.target = replace(self.target, version=answer.version)
                return dict(answer.rewards)
            await asyncio.sleep(wait)

    def _ticket(self, part: int) -> Ticket:
        return Ticket(
            self.step,
            f"{self.part}{part}",
            self.caller,
            version=self.target.version,
            outstanding=self.outstanding + self.elsewhere,
            waiting=self.waiting,
            replicas=self.target.replicas,
            spread=self.spread,
            rewards=self.target.rewards,
        )

    async def _wait_for_room(self, refusal: Overloaded, tokens: int) -> None:
        """At random, so that callers do not come back together."""
        if asyncio.get_running_loop().time() - self.answered_at > self.patience_s:
            raise refusal
        self.refused += 1
        self.waiting += tokens
        self.spread = True
        rounds = max(1.0, self.refused / KNOCKS)
        try:
            await asyncio.sleep(refusal.retry_after_s * rounds * random.uniform(0.5, 1.5))
        finally:
            self.refused -= 1
            self.waiting -= tokens

    def _warn(self, part: int, what: str, error: Exception) -> None:
        version, caller = self.target.version, self.caller.name
        logger.warning(
            f"step={self.step} part={self.part}{part} caller={caller} version={version} {what}: "
            f"{error}"
        )


def backoff(attempt: int) -> float:
    """Seconds to wait before that attempt."""
    first, most = BACKOFF
    return min(first * 2.0 ** (attempt - 1), most)
