"""How a client reaches a reward model: over a Serve handle, over HTTP, or in its own process.

A transport finds what is served and sends it one chunk of rows. It says what became of the chunk by
what it returns or raises; whether and when to send again is decided in sending.py. Knows nothing of
steps.
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
    """The replica that had the chunk died before it answered."""


class Away(Exception):
    """The service cannot be reached for now, but could be before."""


class NoRoom(Exception):
    """The chunk's bytes find no place on this machine for now."""


@dataclass(frozen=True)
class Target:
    """What a step is sent to.

    replicas: how many compute it. tokens_per_pack: of each, 0 where that is not known. version:
    what the step is pinned to; "" where the first answer tells. rewards: names of those that are
    wanted.
    """

    replicas: int
    tokens_per_pack: int = 0
    version: str = ""
    rewards: tuple[str, ...] = (OWN,)


class Answer(NamedTuple):
    """A chunk's rewards by name, and the version that the rest of the step is to be scored by."""

    rewards: Mapping[str, Rewards]
    version: str


class Transport(Protocol):
    """A way to a reward model."""

    name: str
    """Of what is at the other end, for messages."""

    def caller(self, name: str | None) -> Caller:
        """Who calls. Raises ServiceError where that needs a connection which is not there."""

    async def find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        """What is served to that caller now; version: by this one, if it is not "".

        Raises ServiceError, UnknownReward, or Away.
        """

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        """The chunk's rewards.

        Raises Overloaded, VersionGone, UnknownReward or ServiceError as the service does, Lost,
        Away or NoRoom where it did not hear of the chunk or could not answer.
        """
