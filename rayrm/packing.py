"""Groups of token ids → packs, and packs → equal shares for ranks.

A pack is one padding-free row of whole groups, each laid out [prefix | suffix 1 | suffix 2 …]: the
tokens that all responses of a group begin with stand once. Pure planning over lengths: knows
nothing of torch, text, or what a reward is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class TokenGroup:
    """One prompt's rows of token ids: what all begin with, and how each goes on (≥ 1 token)."""

    prefix: Ids
    suffixes: tuple[Ids, ...]

    @classmethod
    def from_rows(cls, rows: Sequence[Ids]) -> TokenGroup:
        """Share the longest common prefix of the rows' ids, leaving each row its last token."""
        shared = common_prefix(rows) if len(rows) > 1 else 0
        return cls(rows[0][:shared], tuple(row[shared:] for row in rows))

    @cached_property
    def tokens(self) -> int:
        """Tokens that are computed: the prefix once and every suffix."""
        return len(self.prefix) + sum(map(len, self.suffixes))

    @property
    def tokens_unshared(self) -> int:
        """Tokens of the rows, each by itself."""
        return len(self.suffixes) * len(self.prefix) + sum(map(len, self.suffixes))

    @property
    def rows(self) -> list[Ids]:
        """The rows as they were before sharing."""
        return [np.concatenate([self.prefix, suffix]) for suffix in self.suffixes]

    def part(self, suffixes: range) -> TokenGroup:
        """The group of some of its rows; one alone has no prefix, as from_rows gives it."""
        if len(suffixes) == 1:
            suffix = self.suffixes[suffixes.start]
            return TokenGroup(self.prefix[:0], (np.concatenate([self.prefix, suffix]),))
        return TokenGroup(self.prefix, self.suffixes[suffixes.start : suffixes.stop])


def common_prefix(rows: Sequence[Ids]) -> int:
    """Length of the longest common prefix of all rows, at most the shortest row less one token."""
    longest = min(map(len, rows)) - 1
    block = np.stack([row[:longest] for row in rows])
    differs = (block != block[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else longest


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of a pack, which see themselves causally and all of a prefix before."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True)
class Pack:
    """One padding-free row of T tokens that holds K responses.

    input_ids and position_ids are int32 [T]; last is int32 [K], the position in the row of each
    response's final token, in the order of the groups and of the responses inside them.
    """

    input_ids: Ids
    position_ids: Ids
    last: Ids
    segments: tuple[Segment, ...]

    @classmethod
    def from_groups(cls, groups: Sequence[TokenGroup]) -> Pack:
        ids: list[Ids] = []
        positions: list[Ids] = []
        last: list[int] = []
        segments: list[Segment] = []
        at = 0
        for group in groups:
            shared = len(group.prefix)
            prefix = (at, at + shared)
            if shared:
                segments.append(Segment(at, at + shared, at, at))
                ids.append(group.prefix)
                positions.append(np.arange(shared, dtype=np.int32))
                at += shared
            for suffix in group.suffixes:
                segments.append(Segment(at, at + len(suffix), *prefix))
                ids.append(suffix)
                positions.append(np.arange(shared, shared + len(suffix), dtype=np.int32))
                at += len(suffix)
                last.append(at - 1)
        return cls(
            np.concatenate(ids).astype(np.int32),
            np.concatenate(positions),
            np.array(last, dtype=np.int32),
            tuple(segments),
        )


def plan_packs(costs: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices of groups for each pack, every pack's cost ≤ budget.

    A group that is larger than the budget gets a pack of its own.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        fit = next((p for p, left in enumerate(room) if costs[i] <= left), None)
        if fit is None:
            fit = len(packs)
            packs.append([])
            room.append(budget)
        packs[fit].append(i)
        room[fit] -= costs[i]
    return packs


def share_packs(costs: Sequence[int], world_size: int, budget: int) -> list[list[list[int]]]:
    """Cut one optimizer step into micro-batches: indices of groups as [rank][micro-batch][·].

    Every rank gets the same number of micro-batches, since ZeRO-3 waits for all ranks in each
    forward; their costs are balanced. With fewer groups than ranks some micro-batches are empty.
    """
    micro_batches = -(-len(plan_packs(costs, budget)) // world_size)
    bins = balance(costs, micro_batches * world_size)
    # Filled evenly instead of tightly, a few groups may need a round more to keep the budget.
    while any(len(batch) > 1 and sum(costs[i] for i in batch) > budget for batch in bins):
        micro_batches += 1
        bins = balance(costs, micro_batches * world_size)
    return [bins[rank::world_size] for rank in range(world_size)]


def balance(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Spread indices over bins so that the costliest bin is small (longest processing time first).

    The bins come back costliest first, so that neighbours cost about the same.
    """
    heap = [(0, b) for b in range(bins)]
    filled: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, b = heapq.heappop(heap)
        filled[b].append(i)
        heapq.heappush(heap, (cost + costs[i], b))
    return sorted(filled, key=lambda indices: -sum(costs[i] for i in indices))


def by_group(values: NDArray[T], sizes: Sequence[int]) -> list[NDArray[T]]:
    """Values [N] of the responses of groups, one after the other, as one array for each group."""
    return np.split(values, np.cumsum(sizes)[:-1])


def split_group(group: TokenGroup, budget: int) -> Iterator[range]:
    """Ranges of a group's suffixes that fit the budget together with the prefix, one at least."""
    start, cost = 0, len(group.prefix)
    for i, suffix in enumerate(group.suffixes):
        if i > start and cost + len(suffix) > budget:
            yield range(start, i)
            start, cost = i, len(group.prefix)
        cost += len(suffix)
    yield range(start, len(group.suffixes))
