"""Divide a step's groups over ranks, as micro-batches of about equal cost.

Every rank computes the same plan from the same groups and takes its share of it, so ranks send each
other no data. A group above the budget of a micro-batch is cut into pieces. Does not know about
losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayrm.packing import TokenGroup, share_packs, split_group


@dataclass(frozen=True)
class Piece:
    """Some responses of a group; start: index of the first among the responses of all groups."""

    tokens: TokenGroup
    start: int


@dataclass(frozen=True)
class Shares:
    """How steps are divided. rank: this one of world_size. budget: tokens of a micro-batch."""

    rank: int
    world_size: int
    budget: int

    def of_rank(self, groups: Sequence[TokenGroup]) -> list[list[int]]:
        """Return this rank's micro-batches as indices of groups.

        Every rank gets the same number of micro-batches; some may be empty.
        """
        costs = [group.tokens for group in groups]
        return share_packs(costs, self.world_size, self.budget)[self.rank]

    def cut(self, groups: Sequence[TokenGroup]) -> list[Piece]:
        """Split groups into pieces of at most the budget, or of one row."""
        pieces: list[Piece] = []
        start = 0
        for group in groups:
            for responses in split_group(group, self.budget):
                pieces.append(Piece(group.part(responses), start + responses.start))
            start += len(group.suffixes)
        return pieces


def response_indices(pieces: Sequence[Piece]) -> list[int]:
    """Return the indices of the pieces' responses among the responses of all groups."""
    return [p.start + i for p in pieces for i in range(len(p.tokens.suffixes))]


def stand_in(group: TokenGroup) -> list[TokenGroup]:
    """Return a row of the group to compute for an empty micro-batch."""
    return [group.part(range(1))]
