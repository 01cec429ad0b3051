"""Who calls the service, and whether they still live.

Named in every chunk: queues are fair between callers, logs name them, and what a dead one left
behind is not computed. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
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

# How long what a caller said it waits for is taken to stand.
HEARD_S = 3.0

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
    about, that are still to be computed; replicas: how many there are to compute them.
    """

    step: str
    part: int
    caller: Caller
    version: str = ""
    outstanding: int = 0
    replicas: int = 1
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
    """The calls that a replica works on, whose they are, and what their callers wait for besides.

    Calls of callers that died are cancelled.
    """

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[Any], Ticket] = {}
        self._heard: dict[Caller, tuple[float, Ticket]] = {}
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

    def note(self, ticket: Ticket) -> None:
        """Remember what the caller waits for, also where its call is refused."""
        self._heard[ticket.caller] = asyncio.get_running_loop().time(), ticket

    def outstanding(self) -> int:
        """Tokens that callers who were heard of lately have no reward for."""
        return sum(ticket.outstanding for ticket in self._lately())

    def share(self) -> float:
        """Of those tokens, a replica's share; one alone need not leave anything to others."""
        lately = self._lately()
        alone = any(ticket.replicas == 1 for ticket in lately)
        return math.inf if alone else sum(t.outstanding / t.replicas for t in lately)

    def _lately(self) -> list[Ticket]:
        since = asyncio.get_running_loop().time() - HEARD_S
        self._heard = {c: heard for c, heard in self._heard.items() if heard[0] > since}
        return [ticket for _, ticket in self._heard.values()]

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
