"""Define how a client reaches a reward model: over a Serve handle, over HTTP, or in its process.

A Transport finds what is served and sends it one chunk of rows. Its result or exception tells what
became of the chunk; sending.py decides whether and when to resend. Does not know how a step is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rayrm.config import OWN
from rayrm.rows import Rewards
from rayrm.serving.chunk import Chunk
from rayrm.serving.ticket import Caller, Ticket


class Lost(Exception):
    """The replica that held the chunk died before it answered."""


class Away(Exception):
    """The service was reachable before, and temporarily is not."""


class NoRoom(Exception):
    """The object store temporarily has no room for the chunk."""


@dataclass(frozen=True)
class Target:
    """What a step is sent to.

    replicas: number of replicas that share it. tokens_per_pack: token budget of their packs, 0 if
    unknown. version: the version that the step is pinned to, "" if the first answer decides it.
    rewards: names of the requested rewards.
    """

    replicas: int
    tokens_per_pack: int = 0
    version: str = ""
    rewards: tuple[str, ...] = (OWN,)


class Answer(NamedTuple):
    """A chunk's rewards by name, and the version that must score the rest of the step."""

    rewards: Mapping[str, Rewards]
    version: str


class Transport(Protocol):
    """A connection to a reward model."""

    name: str
    """What is at the other end, for messages."""

    def caller(self, name: str | None) -> Caller:
        """Return the calling process. Raises ServiceError if Ray is needed and not initialized."""

    async def find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        """Return what is served to the caller now, pinned to `version` unless it is "".

        Raises ServiceError, VersionGone, UnknownReward or Away.
        """

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        """Send one chunk and return its rewards.

        Raises the service's Overloaded, VersionGone, UnknownReward or ServiceError; Lost, Away or
        NoRoom if the chunk did not reach it or its answer was lost.
        """
