"""Who calls the service, and whether they still live.

Named in every chunk: queues are fair between callers, logs name them, and what a dead one left
behind is not computed. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state

from rayrm.config import OWN

logger = logging.getLogger("ray.serve")

# How often the callers of calls in progress are looked after.
WATCH_S = 2.0

# So many calls are named in a message.
NAMED = 10


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

    step: id of the step, part: the chunk's number in it. version: what has to score it, "" for
    whatever is served; rewards: names of those that are wanted. outstanding: tokens of the step,
    about, that have no answer yet, waiting: those of them that are sent to no replica for now;
    replicas: how many there are to compute them. spread: other replicas may have heard of the step
    too: it has more chunks, or one has been refused.
    """

    step: str
    part: int
    caller: Caller
    version: str = ""
    outstanding: int = 0
    waiting: int = 0
    replicas: int = 1
    spread: bool = False
    rewards: tuple[str, ...] = (OWN,)


def this_caller(name: str | None = None) -> Caller:
    """The process that runs this; by default it is named by its actor, or its worker."""
    context = ray.get_runtime_context()
    job, actor = context.get_job_id(), context.get_actor_id() or ""
    return Caller(name or actor or context.get_worker_id(), job, actor)


def lives(caller: Caller) -> bool:
    """Whether the caller's actor, or else its job, is there. Asks the GCS: a millisecond."""
    if caller.actor:
        return state.actors(caller.actor).get("State") != "DEAD"
    return any(job["JobID"] == caller.job and not job["IsDead"] for job in state.jobs())


class CallsInProgress:
    """The calls that a replica works on, and whose they are; a dead caller's are cancelled."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[Any], Ticket] = {}
        self._watching: asyncio.Task[None] | None = None

    @contextmanager
    def call(self, ticket: Ticket) -> Iterator[None]:
        """Note this task's call until the block is left."""
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = ticket
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            del self._calls[task]

    def __str__(self) -> str:
        named = [f"step={ticket.step} part={ticket.part}" for ticket in self._calls.values()]
        return "; ".join(named[:NAMED]) + (f"; {len(named) - NAMED} more" * (len(named) > NAMED))

    async def _watch(self) -> None:
        while self._calls:
            await asyncio.sleep(WATCH_S)
            for caller in {ticket.caller for ticket in self._calls.values()}:
                if not await asyncio.to_thread(lives, caller):
                    self._cancel(caller)

    def _cancel(self, caller: Caller) -> None:
        for task, ticket in self._calls.items():
            if ticket.caller == caller:
                logger.warning(f"step={ticket.step} part={ticket.part} caller={caller.name} died")
                task.cancel()
