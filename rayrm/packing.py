"""Pack groups of token ids, and distribute groups evenly over ranks.

A pack is one padding-free row of whole groups, each laid out [prefix | suffix 1 | suffix 2 …]: the
tokens that all rows of a group begin with occur once. Does not know about torch, text or rewards.
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
    """The K rows of token ids of one prompt.

    prefix: int32 [P], the tokens that all rows begin with. suffixes: K arrays int32 [≥ 1], the
    remaining tokens of each row.
    """

    prefix: Ids
    suffixes: tuple[Ids, ...]

    @classmethod
    def from_rows(cls, rows: Sequence[Ids]) -> TokenGroup:
        """Share the longest common prefix of the rows that leaves each at least its last token."""
        shared = common_prefix(rows) if len(rows) > 1 else 0
        return cls(rows[0][:shared], tuple(row[shared:] for row in rows))

    @cached_property
    def tokens(self) -> int:
        """Number of tokens to compute: the prefix once and every suffix."""
        return len(self.prefix) + sum(map(len, self.suffixes))

    @property
    def tokens_unshared(self) -> int:
        """Number of tokens without sharing: the prefix counts once per row."""
        return len(self.suffixes) * len(self.prefix) + sum(map(len, self.suffixes))

    @property
    def rows(self) -> list[Ids]:
        """Return the rows, each with its prefix."""
        return [np.concatenate([self.prefix, suffix]) for suffix in self.suffixes]

    def part(self, suffixes: range) -> TokenGroup:
        """Return the group of some rows; a single row becomes one suffix without a prefix."""
        if len(suffixes) == 1:
            suffix = self.suffixes[suffixes.start]
            return TokenGroup(self.prefix[:0], (np.concatenate([self.prefix, suffix]),))
        return TokenGroup(self.prefix, self.suffixes[suffixes.start : suffixes.stop])


def common_prefix(rows: Sequence[Ids]) -> int:
    """Return the length of the rows' longest common prefix, less than that of the shortest row."""
    longest = min(map(len, rows)) - 1
    block = np.stack([row[:longest] for row in rows])
    differs = (block != block[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else longest


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of a pack that attend to themselves causally and to a prefix.

    The prefix is all tokens [prefix_start, prefix_end), which is empty for a prefix itself.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True)
class Pack:
    """One padding-free row of T tokens with K responses.

    input_ids, position_ids: int32 [T]; positions count from 0 in each response's own row.
    last: int32 [K], index in the pack of each response's final token, in the order of the groups
    and of the responses in them. segments: which tokens attend to which.
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
    """Assign groups to packs of cost ≤ budget (first-fit decreasing); return indices per pack.

    A group above the budget gets its own pack. N log N, by a tree of the largest room (Johnson,
    Journal of Computer and System Sciences 1974).
    """
    packs: list[list[int]] = []
    leaves = 1 << max(0, len(costs) - 1).bit_length()
    # room[leaves + p] is that of pack p; room[n] is the larger of room[2n] and room[2n + 1].
    room = [budget] * (2 * leaves)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        node = 1
        while node < leaves and costs[i] <= budget:
            node = 2 * node if room[2 * node] >= costs[i] else 2 * node + 1
        fit = node - leaves if costs[i] <= budget else len(packs)
        if fit == len(packs):
            packs.append([])
        packs[fit].append(i)
        node = leaves + fit
        room[node] -= costs[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


def share_packs(costs: Sequence[int], world_size: int, budget: int) -> list[list[list[int]]]:
    """Split groups into micro-batches for ranks: return indices as [rank][micro-batch][·].

    Every rank gets the same number of micro-batches, since ZeRO-3 synchronises ranks in each
    forward; their costs are balanced. With too few groups some micro-batches are empty. Only a
    micro-batch of a single group exceeds the budget.
    """
    micro_batches = -(-len(plan_packs(costs, budget)) // world_size)
    bins = balance(costs, micro_batches * world_size)
    # Balanced bins are packed less tightly than first-fit: they may need another micro-batch.
    while any(len(batch) > 1 and sum(costs[i] for i in batch) > budget for batch in bins):
        micro_batches += 1
        bins = balance(costs, micro_batches * world_size)
    return [bins[rank::world_size] for rank in range(world_size)]


def balance(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Distribute indices over bins of about equal cost (longest processing time first).

    Returns the costliest bin first, so that neighbouring bins cost about the same.
    """
    heap = [(0, b) for b in range(bins)]
    filled: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, b = heapq.heappop(heap)
        filled[b].append(i)
        heapq.heappush(heap, (cost + costs[i], b))
    return sorted(filled, key=lambda indices: -sum(costs[i] for i in indices))


def by_group(values: NDArray[T], sizes: Sequence[int]) -> list[NDArray[T]]:
    """Split values [N] of consecutive groups of responses into one array per group."""
    return np.split(values, np.cumsum(sizes)[:-1])


def split_group(group: TokenGroup, budget: int) -> Iterator[range]:
    """Yield ranges of suffixes that fit the budget with the prefix; a single one may exceed it."""
    start, cost = 0, len(group.prefix)
    for i, suffix in enumerate(group.suffixes):
        if i > start and cost + len(suffix) > budget:
            yield range(start, i)
            start, cost = i, len(group.prefix)
        cost += len(suffix)
    yield range(start, len(group.suffixes))
