"""Queue the groups of many callers, and decide what a replica computes next.

The queue is bounded in tokens and fair between callers. A pack that fails is split until only the
rows that cannot be scored are left. Does not know about Serve, versions or text.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayrm.errors import Overloaded, RowFailed
from rayrm.packing import TokenGroup

Values = NDArray[np.float32]
Compute = Callable[[Sequence[TokenGroup]], Sequence[Values]]


@dataclass(frozen=True)
class Scored:
    """Rewards of a group.

    values: float32 [responses], NaN for a response with an error. errors: by index of the response.
    """

    values: Values
    errors: Mapping[int, RowFailed] = field(default_factory=dict)


# Seconds that an idle queue waits before its first pack: a step's chunks arrive within milliseconds
# of each other, and the first alone would be a small pack, on CPU on one thread.
GATHER_S = 0.01

# Limit of what may wait, in packs and in seconds of work, whichever is more: a full pack is then
# ready when the current one ends.
PACKS_WAITING = 4
SECONDS_WAITING = 0.5

# Near the end of steps, what waits and a pack are also limited to half of this replica's share of
# outstanding tokens: no other replica computes what one has admitted, and all should end together
# (guided self-scheduling, Polychronopoulos and Kuck, IEEE Trans. Computers 1987). The lower bounds,
# in tokens and seconds of work, outweigh the cost of a call. Steps held entirely may wait in full.
SHARE_WAITING = 0.5
SHARE_PACK = 0.5
LEAST_WAITING = 2048
LEAST_SECONDS = 0.25

# If the only replica has queued NEARLY_ALL of the outstanding tokens, it computes PACKS_AT_THE_END
# packs together: no small one is left over, and on CPU no thread idles between two.
PACKS_AT_THE_END = 2
NEARLY_ALL = 0.75

# Bounds of retry_after_s. Another replica may have room sooner, and near the end of a step no
# replica should idle while a chunk waits to be resent.
RETRY_AFTER = (0.05, 0.25)

# Weight of the latest pack in the measured speed.
SMOOTHING = 0.3


class ModelBroken(Exception):
    """The model raises for every row. Never reaches a caller: the replica exits."""


@dataclass(eq=False)
class _Call:
    """One call of TokenQueue.score: its groups, their rewards so far, and the future of all.

    caller: None for background work, which is computed last. scored: by index of the group.
    """

    caller: Hashable
    compute: Compute
    groups: Sequence[TokenGroup]
    done: asyncio.Future[list[Scored]]
    scored: dict[int, Scored] = field(default_factory=dict)

    def deliver(self, g: int, scored: Scored) -> None:
        self.scored[g] = scored
        if len(self.scored) == len(self.groups) and not self.done.done():
            self.done.set_result([self.scored[g] for g in range(len(self.groups))])

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, eq=False)
class _Place:
    """The group with index g of a call, waiting in the queue."""

    call: _Call
    g: int
    group: TokenGroup


class TokenQueue:
    """Queues groups of many callers and computes them pack by pack on a separate thread.

    admit() is the admission control: it refuses tokens above the limit, or above the caller's share
    once half of the limit is taken. A caller with nothing admitted gets one chunk of any size in if
    there is room at all. A pack starts with the oldest group of the caller that was served least
    (start-time fair queueing, Goyal, Vin and Cheng, SIGCOMM 1996), is filled with what fits, and
    holds groups of one compute function only. Groups of a cancelled call are not computed.

    tokens_per_pack: token budget of a pack. max_tokens: upper bound of the limit. queued_tokens:
    tokens that wait for a pack. tokens_per_second: measured speed, 0 if unknown. own, share,
    outstanding: set from demand.Wanted by the owner.
    """

    def __init__(self, tokens_per_pack: int, max_tokens: int) -> None:
        self.tokens_per_pack = tokens_per_pack
        self.max_tokens = max_tokens
        self.queued_tokens = 0
        self.computed_tokens = 0
        self.tokens_per_second = 0.0
        self.own = 0
        self.share = math.inf
        self.outstanding = math.inf
        self._admitted: dict[Hashable, int] = defaultdict(int)
        self._waiting: list[_Place] = []
        self._served: dict[Hashable, float] = {}
        self._now_served = 0.0
        self._draining: asyncio.Task[None] | None = None
        self._computing = ThreadPoolExecutor(1, "compute")
        self._pack_since: tuple[float, int] | None = None

    @contextmanager
    def admit(self, caller: Hashable, tokens: int) -> Iterator[None]:
        """Admit that many tokens until the block is left. Raises Overloaded if there is no room."""
        self._refuse(caller, tokens)
        self._admitted[caller] += tokens
        try:
            yield
        finally:
            self._admitted[caller] -= tokens
            if not self._admitted[caller]:
                del self._admitted[caller]

    async def score(
        self, groups: Sequence[TokenGroup], compute: Compute, caller: Hashable = None
    ) -> list[Scored]:
        """Compute the rewards of every group; without a caller, after those of all callers.

        Raises ModelBroken if the model raises for every row.
        """
        if not groups:
            return []
        call = _Call(caller, compute, groups, asyncio.get_running_loop().create_future())
        places = [_Place(call, g, group) for g, group in enumerate(groups)]
        self._waiting += places
        self.queued_tokens += _tokens(places)
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        try:
            return await call.done
        finally:
            self._remove([place for place in self._waiting if place.call is call])

    def between_packs(self, what: Callable[[], None]) -> None:
        """Run a function between two packs; block until it returns, and pass on what it raises."""
        self._computing.submit(what).result()

    @property
    def limit(self) -> int:
        """Maximum number of admitted tokens; the only caller gets half of it.

        `own`, which no other replica will get, counts twice, so that it fits into that half.
        """
        most = max(PACKS_WAITING * self.tokens_per_pack, SECONDS_WAITING * self.tokens_per_second)
        least = max(LEAST_WAITING, LEAST_SECONDS * self.tokens_per_second)
        wanted = 2 * self.own + SHARE_WAITING * self.share
        return int(min(self.max_tokens, most, max(least, wanted)))

    @property
    def pack(self) -> int:
        """Token budget of the next pack; less if little is left, so that replicas end together."""
        wanted = self.own + SHARE_PACK * self.share
        return int(min(self.tokens_per_pack, max(LEAST_WAITING / 2, wanted)))

    @property
    def admitted_tokens(self) -> int:
        return sum(self._admitted.values())

    @property
    def seconds_per_pack(self) -> float:
        """Seconds that the current pack has been computing, 0.0 if none is.

        Divided by its number of packs if a larger group or several packs are computed together.
        """
        if self._pack_since is None:
            return 0.0
        since, tokens = self._pack_since
        return (time.monotonic() - since) / math.ceil(tokens / self.tokens_per_pack)

    def _refuse(self, caller: Hashable, tokens: int) -> None:
        total, own, limit = self._left_tokens(), self._admitted.get(caller, 0), self.limit
        share = limit / len({*self._admitted, caller, None})  # leaves room for one more caller
        if total + tokens <= limit / 2 or (total < limit and not own):
            return
        if total + tokens <= limit and own + tokens <= share:
            return
        raise Overloaded(
            f"{total} tokens wait, {own} of them from this caller: {tokens} more would exceed the "
            f"limit of {limit}, or the caller's share of it",
            self._seconds_until_half(total + tokens),
        )

    def _left_tokens(self) -> int:
        """Return the admitted tokens less those that the current pack should have computed."""
        left = self.admitted_tokens
        if self._pack_since is not None:
            since, tokens = self._pack_since
            elapsed = asyncio.get_running_loop().time() - since
            left -= min(tokens, int(elapsed * self.tokens_per_second))
        return max(0, left)

    def _seconds_until_half(self, total: int) -> float:
        """Estimate when half of the limit is free again, within RETRY_AFTER."""
        low, high = RETRY_AFTER
        excess = max(0.0, total - self.limit / 2)
        return min(max(excess / self.tokens_per_second, low), high) if self._speed_known else high

    @property
    def _speed_known(self) -> bool:
        return self.tokens_per_second > 0

    async def _drain(self) -> None:
        """Compute packs until nothing waits."""
        loop = asyncio.get_running_loop()  # its clock is time.monotonic unless simulated
        await asyncio.sleep(GATHER_S)
        while self._waiting:
            pack = self._next_pack()
            self._pack_since = loop.time(), _tokens(pack)
            try:
                scored = await self._compute(pack)
            except ModelBroken as error:
                for place in pack:
                    place.call.fail(error)
            else:
                self._note_speed(_tokens(pack), loop.time() - self._pack_since[0])
                for place, group_scored in zip(pack, scored, strict=True):
                    place.call.deliver(place.g, group_scored)
            self._pack_since = None

    async def _compute(self, pack: Sequence[_Place]) -> list[Scored]:
        loop = asyncio.get_running_loop()
        groups = [place.group for place in pack]
        return await loop.run_in_executor(
            self._computing, compute_apart, pack[0].call.compute, groups
        )

    def _next_pack(self) -> list[_Place]:
        """Remove the next pack from the queue and return it.

        Its first group is the oldest of the caller that was served least.
        """
        for caller in {place.call.caller for place in self._waiting} - self._served.keys():
            self._served[caller] = math.inf if caller is None else self._now_served
        order = sorted(self._waiting, key=lambda place: self._served[place.call.caller])
        first, room = order[0].call, self._room()
        if first.caller is not None:
            self._now_served = self._served[first.caller]
        pack: list[_Place] = []
        for place in order:
            if not pack or (place.call.compute == first.compute and place.group.tokens <= room):
                pack.append(place)
                room -= place.group.tokens
        for place in pack:
            self._served[place.call.caller] += place.group.tokens
        self._remove(pack)
        self._forget()
        return pack

    def _room(self) -> int:
        """Return the token budget of what is computed next: a pack, or several at the end."""
        ends = self.queued_tokens >= NEARLY_ALL * self.outstanding
        return self.pack * (PACKS_AT_THE_END if ends and math.isinf(self.share) else 1)

    def _forget(self) -> None:
        """Forget callers that have nothing waiting and were served no more than the others."""
        here = {place.call.caller for place in self._waiting}
        served = self._served.items()
        self._served = {c: s for c, s in served if c in here or s > self._now_served}

    def _remove(self, places: list[_Place]) -> None:
        gone = set(places)
        self._waiting = [place for place in self._waiting if place not in gone]
        self.queued_tokens -= _tokens(places)

    def _note_speed(self, tokens: int, seconds: float) -> None:
        self.computed_tokens += tokens
        speed = tokens / max(seconds, 1e-9)
        new = SMOOTHING if self._speed_known else 1.0
        self.tokens_per_second += new * (speed - self.tokens_per_second)


def compute_apart(compute: Compute, groups: Sequence[TokenGroup]) -> list[Scored]:
    """Compute rewards; if that raises, compute each half separately, down to single rows.

    A row for which it raises alone gets RowFailed. Raises ModelBroken if PROBE fails as well.
    """
    try:
        return [Scored(values) for values in compute(groups)]
    except Exception as error:
        if len(groups) > 1:
            half = len(groups) // 2
            return compute_apart(compute, groups[:half]) + compute_apart(compute, groups[half:])
        (group,) = groups
        if (rows := len(group.suffixes)) > 1:
            parts = [group.part(range(rows // 2)), group.part(range(rows // 2, rows))]
            return [_join([*compute_apart(compute, parts[:1]), *compute_apart(compute, parts[1:])])]
        try:
            compute([PROBE])
        except Exception:
            raise ModelBroken(f"the model raises for every row: {error!r}") from error
        failed = RowFailed(f"the model raised {type(error).__name__} for this row: {error}")
        return [Scored(np.full(1, np.nan, dtype=np.float32), {0: failed})]


# A row that every working model can score.
PROBE = TokenGroup(np.zeros(0, dtype=np.int32), (np.zeros(1, dtype=np.int32),))


def _join(parts: Sequence[Scored]) -> Scored:
    errors: dict[int, RowFailed] = {}
    start = 0
    for part in parts:
        errors |= {start + r: error for r, error in part.errors.items()}
        start += len(part.values)
    return Scored(np.concatenate([part.values for part in parts]), errors)


def _tokens(places: Sequence[_Place]) -> int:
    return sum(place.group.tokens for place in places)
