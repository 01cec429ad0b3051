"""Queue the groups of many callers, and decide what a replica computes next.

Bounded in tokens, fair between callers, and a pack that fails is taken apart until only the rows
that cannot be scored are left. Knows nothing of Serve, of versions or of text.
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
    """A group's rewards, float32 [responses], NaN where errors, by response, has one."""

    values: Values
    errors: Mapping[int, RowFailed] = field(default_factory=dict)


# The chunks of a step arrive within milliseconds of each other. An idle queue that began with the
# first would compute it on one thread, or in a small pack, while the others wait.
GATHER_S = 0.01

# What may wait: enough that the next pack is full and there before this one ends.
PACKS_WAITING = 4
SECONDS_WAITING = 0.5

# But no more than half of what callers still want of this replica, and packs as large as that, so
# that replicas end together: what one has taken no other computes, however slow it is (guided
# self-scheduling, Polychronopoulos and Kuck, IEEE Trans. Computers 1987). The least pays a call.
# What comes in one chunk is not shared out: all of it may wait, and makes the packs full.
SHARE_WAITING = 0.5
SHARE_PACK = 0.5
LEAST_WAITING = 2048
LEAST_SECONDS = 0.25

# Where one replica holds nearly all that callers wait for, it computes so many packs together:
# no small one is left, and on CPU no thread waits for another in between.
PACKS_AT_THE_END = 2
NEARLY_ALL = 0.75

# Bounds of what a refused caller is told to wait, in seconds. Another replica may have room sooner,
# and near the end of a step none may stand idle while a chunk is asleep.
RETRY_AFTER = (0.05, 0.25)

# The share of a new pack in the measured speed.
SMOOTHING = 0.3


class ModelBroken(Exception):
    """The model raises for every row. Never reaches a caller: the replica ends itself."""


@dataclass(eq=False)
class _Call:
    """One caller's groups, their rewards as they come, and the future that waits for all.

    caller: None where nobody waits, which is computed when nothing else is there.
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
    """The g-th group of a call, waiting."""

    call: _Call
    g: int
    group: TokenGroup


class TokenQueue:
    """Groups of many callers, a pack a time, computed on a thread of its own.

    admit() refuses what would make more than the limit wait, or more than a caller's share of it
    once half is taken; a caller with nothing here yet gets its first in while there is any room,
    however large it is. A pack begins with the group that waited longest of the caller that was
    served least (start-time fair queueing, Goyal, Vin and Cheng, SIGCOMM 1996), holds groups of one
    compute only, and is filled with what fits. The groups of a cancelled caller are not computed.
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
        """Admit so many tokens until the block is left. Raises Overloaded."""
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
        """Rewards of every group's responses; without a caller, once nobody waits for others."""
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
        """Run a function between two packs, and wait for it."""
        self._computing.submit(what).result()

    @property
    def limit(self) -> int:
        """Tokens that may be admitted at once, of which one caller alone gets half.

        own: tokens that no other replica will get; share: those that callers want of this one
        besides.
        """
        most = max(PACKS_WAITING * self.tokens_per_pack, SECONDS_WAITING * self.tokens_per_second)
        least = max(LEAST_WAITING, LEAST_SECONDS * self.tokens_per_second)
        wanted = 2 * self.own + SHARE_WAITING * self.share
        return int(min(self.max_tokens, most, max(least, wanted)))

    @property
    def pack(self) -> int:
        """Tokens of the next pack: less where little is left, so that all replicas end together."""
        wanted = self.own + SHARE_PACK * self.share
        return int(min(self.tokens_per_pack, max(LEAST_WAITING / 2, wanted)))

    @property
    def admitted_tokens(self) -> int:
        return sum(self._admitted.values())

    @property
    def seconds_per_pack(self) -> float:
        """How long the current pack has been computing; a group larger than a pack is several."""
        if self._pack_since is None:
            return 0.0
        since, tokens = self._pack_since
        return (time.monotonic() - since) / math.ceil(tokens / self.tokens_per_pack)

    def _refuse(self, caller: Hashable, tokens: int) -> None:
        total, own, limit = self._left_tokens(), self._admitted.get(caller, 0), self.limit
        share = limit / len({*self._admitted, caller, None})  # room is kept for one caller more
        if total + tokens <= limit / 2 or (total < limit and not own):
            return
        if total + tokens <= limit and own + tokens <= share:
            return
        raise Overloaded(
            f"{total} tokens wait, {own} of them of this caller; with {tokens} more that is over "
            f"the limit of {limit}, or over a caller's share of it",
            self._seconds_until_half(total + tokens),
        )

    def _left_tokens(self) -> int:
        """What is admitted, less what the current pack should have computed by now."""
        left = self.admitted_tokens
        if self._pack_since is not None:
            since, tokens = self._pack_since
            elapsed = asyncio.get_running_loop().time() - since
            left -= min(tokens, int(elapsed * self.tokens_per_second))
        return max(0, left)

    def _seconds_until_half(self, total: int) -> float:
        low, high = RETRY_AFTER
        excess = max(0.0, total - self.limit / 2)
        return min(max(excess / self.tokens_per_second, low), high) if self._speed_known else high

    @property
    def _speed_known(self) -> bool:
        return self.tokens_per_second > 0

    async def _drain(self) -> None:
        """Compute until nothing waits."""
        loop = asyncio.get_running_loop()  # its clock is time.monotonic, unless it is simulated
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
        """The first group of the caller who was served least, and what fits beside it."""
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
        """Tokens of what is computed next; outstanding: those that callers have no reward for."""
        ends = self.queued_tokens >= NEARLY_ALL * self.outstanding
        return self.pack * (PACKS_AT_THE_END if ends and math.isinf(self.share) else 1)

    def _forget(self) -> None:
        """Drop callers that have nothing waiting and are no further than the others."""
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
    """compute; where that raises each half by itself, down to the rows that it raises for.

    Raises ModelBroken where it also raises for a row that it has to be able to score.
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


# A row that no model may fail on.
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
