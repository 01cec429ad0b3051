"""Transport to a reward model in this process, for tests and notebooks. Does not know about Ray."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

from rayrm.errors import VersionGone
from rayrm.rows import Rewards, check_served
from rayrm.serving.chunk import Chunk
from rayrm.serving.ticket import Caller, Ticket
from rayrm.serving.transports import Answer, Target

if TYPE_CHECKING:
    from rayrm.model.engine import RewardModel


class LocalTransport:
    """Scores chunks on threads of this process, one chunk at a time."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.name = f"the model {model.version} in this process"
        self._computing = threading.Lock()

    def caller(self, name: str | None) -> Caller:
        return Caller(name or f"process {os.getpid()}", job="", actor="")

    async def find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        check_served(rewards, self.model.adapters)
        if version and version != self.model.version:
            raise VersionGone(f"version {version} is not served; {self.model.version} is")
        return Target(1, self.model.tokens_per_pack, self.model.version, rewards)

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        rewards = await asyncio.to_thread(self._score, target, chunk)
        return Answer(rewards, target.version)

    def _score(self, target: Target, chunk: Chunk) -> dict[str, Rewards]:
        with self._computing:
            encoded = self.model.encode(chunk.rows(), chunk.tokenizer)
            models = {name: self.model.named(name) for name in target.rewards}
            return {
                name: model.collect(encoded, model.score_groups(encoded.groups))
                for name, model in models.items()
            }
