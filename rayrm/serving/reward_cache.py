"""Cache rewards, and deduplicate rows that are being computed.

The key is a row's token ids and the version that scores it. Bounded in bytes; the least
recently used rows are evicted first. Does not know about callers or packs.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import blake2b

import numpy as np

from rayrm.errors import RowFailed
from rayrm.packing import TokenGroup
from rayrm.serving.queue import Scored

# Approximate size of an entry: key, value and their share of the dictionary.
ENTRY_BYTES = 256

Score = Callable[[Sequence[TokenGroup]], Awaitable[Sequence[Scored]]]
Reward = float | RowFailed


class RewardCache:
    """Scores groups, computing only rows whose reward is neither cached nor being computed.

    most: maximum number of cached rows. rows_found: number of rows that were not computed.
    """

    def __init__(self, max_bytes: int) -> None:
        self.most = max_bytes // ENTRY_BYTES
        self.rows_found = 0
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self._coming: dict[bytes, asyncio.Future[Mapping[bytes, Reward]]] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def score(self, version: str, groups: Sequence[TokenGroup], score: Score) -> list[Scored]:
        """Return the rewards of every group, in order.

        Calls `score` for the rows that must be computed, and passes on what it raises.
        """
        answer = _Answer(version, groups)
        self.rows_found += answer.take(self._recall(answer))
        while answer.missing:
            if mine := [key for key in answer.missing if key not in self._coming]:
                answer.take(await self._compute(mine, answer, score))
            else:
                coming = self._coming[next(iter(answer.missing))]
                self.rows_found += answer.take(await asyncio.shield(coming))
        return answer.scored()

    def _recall(self, answer: _Answer) -> dict[bytes, Reward]:
        found: dict[bytes, Reward] = {}
        for key in answer.missing:
            if key in self._known:
                self._known.move_to_end(key)
                found[key] = self._known[key]
        return found

    async def _compute(
        self, mine: Sequence[bytes], answer: _Answer, score: Score
    ) -> Mapping[bytes, Reward]:
        """Compute the rewards of these rows; other calls that need them wait for the result."""
        rewards: dict[bytes, Reward] = {}
        coming = asyncio.get_running_loop().create_future()
        self._coming |= dict.fromkeys(mine, coming)
        try:
            keys, groups = answer.groups_of(mine)
            for of_group, scored in zip(keys, await score(groups), strict=True):
                values = scored.values.tolist()
                rewards |= {k: scored.errors.get(r, values[r]) for r, k in enumerate(of_group)}
        finally:  # after an error, waiting calls compute the rows
            for key in mine:
                del self._coming[key]
            coming.set_result(rewards)
        self._remember(rewards)
        return rewards

    def _remember(self, rewards: Mapping[bytes, Reward]) -> None:
        for key, reward in rewards.items():
            if isinstance(reward, float) and math.isfinite(reward):
                self._known[key] = reward
        while len(self._known) > self.most:
            self._known.popitem(last=False)


class _Answer:
    """The rewards of groups so far; missing: (group, response) indices by key of the row."""

    def __init__(self, version: str, groups: Sequence[TokenGroup]) -> None:
        self.groups = groups
        self.values = [np.full(len(group.suffixes), np.nan, dtype=np.float32) for group in groups]
        self.errors: list[dict[int, RowFailed]] = [{} for _ in groups]
        self.missing: dict[bytes, list[tuple[int, int]]] = {}
        for g, group in enumerate(groups):
            prefix = blake2b(version.encode(), digest_size=16)
            prefix.update(group.prefix.tobytes())
            for r, suffix in enumerate(group.suffixes):
                row = prefix.copy()
                row.update(suffix.tobytes())
                self.missing.setdefault(row.digest(), []).append((g, r))

    def take(self, rewards: Mapping[bytes, Reward]) -> int:
        """Fill in the rewards of missing rows; return the number of responses filled."""
        filled = 0
        for key in self.missing.keys() & rewards.keys():
            reward = rewards[key]
            for g, r in self.missing.pop(key):
                filled += 1
                if isinstance(reward, RowFailed):
                    self.errors[g][r] = reward
                else:
                    self.values[g][r] = reward
        return filled

    def groups_of(self, keys: Sequence[bytes]) -> tuple[list[list[bytes]], list[TokenGroup]]:
        """Return groups that hold each of these rows once, with the keys of each group's rows."""
        rows: dict[int, dict[int, bytes]] = {}
        for key in keys:
            g, r = self.missing[key][0]
            rows.setdefault(g, {})[r] = key
        return [list(of.values()) for of in rows.values()], [
            self.groups[g] if len(of) == len(self.groups[g].suffixes) else self._part(g, list(of))
            for g, of in rows.items()
        ]

    def _part(self, g: int, responses: Sequence[int]) -> TokenGroup:
        rows = self.groups[g].rows
        return TokenGroup.from_rows([rows[r] for r in responses])

    def scored(self) -> list[Scored]:
        return [Scored(v, e) for v, e in zip(self.values, self.errors, strict=True)]
