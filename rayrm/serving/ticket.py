"""Who sends a chunk, and of which step it is: what logs, queues and versions go by.

Plain values that cross Ray with every chunk. Knows nothing of how they are used.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayrm.config import OWN


@dataclass(frozen=True)
class Caller:
    """A driver, task or actor of the cluster, by its job and its actor's id; "" where it has none.

    name tells callers of one process apart, in logs and in queues.
    """

    name: str
    job: str
    actor: str


@dataclass(frozen=True)
class Ticket:
    """Whose call that is: what logs, queues and versions go by.

    step: id of the step. part: the chunk's number in it, over HTTP behind its request's. version:
    what has to score it, "" for whatever is served. rewards: names of those that are wanted.
    outstanding: tokens of the step, about, that have no answer yet. waiting: those of them that are
    sent to no replica for now. replicas: how many there are to compute them. spread: other replicas
    may have heard of the step too, since it has more chunks or one has been refused.
    """

    step: str
    part: str
    caller: Caller
    version: str = ""
    outstanding: int = 0
    waiting: int = 0
    replicas: int = 1
    spread: bool = False
    rewards: tuple[str, ...] = (OWN,)
