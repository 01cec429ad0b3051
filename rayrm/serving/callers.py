"""Identify callers, and cancel the calls of those that died.

Named in every chunk: queues are fair between callers, logs name them, and what a dead one left
behind is not computed. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import state

from rayrm.serving.ticket import Caller, Ticket

logger = logging.getLogger("ray.serve")

# How often the callers of calls in progress are looked after.
WATCH_S = 2.0

# So many calls are named in a message.
NAMED = 10


def this_caller(name: str | None = None) -> Caller:
    """The process that runs this; by default it is named by its actor, or its worker."""
    context = ray.get_runtime_context()
    job, actor = context.get_job_id(), context.get_actor_id() or ""
    return Caller(name or actor or context.get_worker_id(), job, actor)


def is_alive(caller: Caller) -> bool:
    """Whether the caller's actor, or else its job, is there. Asks the GCS: a millisecond."""
    if caller.actor:
        return bool(state.actors(caller.actor).get("State") != "DEAD")
    return any(job["JobID"] == caller.job and not job["IsDead"] for job in state.jobs())


class CallsInProgress:
    """The calls in flight at a replica, by caller; a dead caller's are cancelled."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[Any], Ticket] = {}
        self._watching: asyncio.Task[None] | None = None

    @contextmanager
    def call(self, ticket: Ticket) -> Iterator[None]:
        """Register this task's call until the block is left."""
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
                if not await asyncio.to_thread(is_alive, caller):
                    self._cancel(caller)

    def _cancel(self, caller: Caller) -> None:
        for task, ticket in self._calls.items():
            if ticket.caller == caller:
                logger.warning(f"step={ticket.step} part={ticket.part} caller={caller.name} died")
                task.cancel()
