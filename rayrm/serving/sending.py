"""Send a step's chunks, and resend each until it is answered.

Decides what is resent and when. Does not know about how a chunk is transported.
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

# Maximum number of resends of a chunk whose replica died: its rows may be the cause.
RETRIES = 5

# First and longest pause between attempts in seconds; doubled each time.
BACKOFF = (0.2, 5.0)

# Refused chunks of a step up to which each is resent after retry_after_s; with more, all wait
# proportionally longer, so that a caller's rate of requests does not grow with its step.
RESENDS_AT_ONCE = 16

Named = dict[str, Rewards]
"""Rewards of the same rows, by the reward's name."""

OnArrival = Callable[["NDArray[Any]", Any], None]


class Sending:
    """One attempt to score a step, or one part of a step that comes in several requests.

    step: id of the step. patience_s: seconds without any answer after which a refused chunk raises
    Overloaded. part: prefix of the chunks' numbers. outstanding: approximate number of tokens of
    the whole step without an answer, if it is more than this part.
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
        """Send the step's chunks, a few per replica in flight, and return its rewards by name.

        on_arrival: called for each chunk with its rows' indices and rewards by name. Raises
        Overloaded, VersionGone, UnknownReward or ServiceError; the other chunks are then cancelled.
        """
        self.answered_at = asyncio.get_running_loop().time()
        cut = step.cut(self.target.replicas, self.target.tokens_per_pack)
        chunks = [step.chunk(keys, tokenizer) for keys in cut]
        tokens = sum(map(self._cost, chunks))
        self.elsewhere = max(0, self.outstanding - tokens)
        self.outstanding = self.waiting = tokens
        self.spread = len(chunks) > 1 or self.elsewhere > 0

        slots = asyncio.Semaphore(CHUNKS_PER_REPLICA * self.target.replicas)

        async def score(part: int) -> dict[str, Arrival]:
            chunk = chunks[part]
            async with slots:
                self.waiting -= self._cost(chunk)
                await asyncio.sleep(0)  # other chunks that got a slot leave `waiting` too
                reply = await self.send_chunk(part, chunk)
            arrived = {name: step.arrived(cut[part], of) for name, of in reply.items()}
            self.outstanding -= self._cost(chunk)
            if on_arrival:
                rows, _ = next(iter(arrived.values()))
                on_arrival(rows, {name: of for name, (_, of) in arrived.items()})
            return arrived

        # If the version is unknown, the first chunk goes out alone; its answer pins the others.
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
        """Return the approximate tokens to compute: every reward takes a separate forward pass."""
        return chunk.cost * len(self.target.rewards)

    async def send_chunk(self, part: int, chunk: Chunk) -> Named:
        """Send one chunk until a replica answers it; return its rewards by name."""
        lost = full = away = 0
        while True:
            try:
                answer = await self.transport.call(self.target, chunk, self._ticket(part))
            except Overloaded as refusal:
                await self._wait_for_room(refusal, self._cost(chunk))
                continue
            except NoRoom as error:
                full += 1
                wait = backoff(full)
                self._warn(part, "found no room in the object store", error)
            except Away as error:
                away += 1
                wait = backoff(away)
                self._warn(part, "did not reach the service", error)
            except Lost as error:
                lost += 1
                wait = backoff(lost)
                self._warn(part, f"lost its replica ({lost} so far)", error)
                if lost > RETRIES:
                    raise ServiceError(
                        f"{lost} replicas of {self.transport.name} died while scoring the same "
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
        """Wait a random time, so that callers do not return together; raise after patience_s."""
        if asyncio.get_running_loop().time() - self.answered_at > self.patience_s:
            raise refusal
        self.refused += 1
        self.waiting += tokens
        self.spread = True
        rounds = max(1.0, self.refused / RESENDS_AT_ONCE)
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
    """Return the seconds to wait after that many failed attempts."""
    first, most = BACKOFF
    return min(first * 2.0 ** (attempt - 1), most)
