"""Define what identifies a chunk: its caller (Caller) and its step (Ticket).

Plain values that are sent with every chunk. Does not know about how they are used.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayrm.config import OWN


@dataclass(frozen=True)
class Caller:
    """A process that scores steps: a driver, task or actor of the cluster, or an HTTP client.

    name: its name in logs and queues; distinguishes callers in one process. job, actor, worker: Ray
    ids, "" if there is none; worker identifies the process of a driver or task.
    """

    name: str
    job: str
    actor: str
    worker: str = ""


@dataclass(frozen=True)
class Ticket:
    """What a replica must know about a chunk apart from its rows.

    step: id of the step. part: the chunk's number in it, over HTTP after the request's number.
    caller: who sends it. version: the version that must score it, "" for whichever is served.
    outstanding: approximate number of the step's tokens without an answer. waiting: those of them
    that are not in flight. replicas: number of replicas that share the step. spread: whether other
    replicas may have seen tickets of the step, since it has more chunks or one was refused.
    rewards: requested names.
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
