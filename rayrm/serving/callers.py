"""Identify callers, and cancel the calls of those that died.

Every chunk names its caller: for logs, for queues that are fair between callers, and so that chunks
of a dead caller are not computed. Does not know about what is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import state
from ray._raylet import WorkerID
from ray.core.generated.gcs_pb2 import WorkerTableData  # type: ignore[attr-defined]

from rayrm.serving.ticket import Caller, Ticket

logger = logging.getLogger("ray.serve")

# Seconds between checks whether the callers of calls in flight are alive.
WATCH_S = 2.0

# Maximum number of calls named in a message.
NAMED = 10


def this_caller(name: str | None = None) -> Caller:
    """Return this process as a Caller; its default name is the id of its actor or worker."""
    context = ray.get_runtime_context()
    job, actor = context.get_job_id(), context.get_actor_id() or ""
    worker = context.get_worker_id()
    return Caller(name or actor or worker, job, actor, "" if actor else worker)


def is_alive(caller: Caller) -> bool:
    """Return whether the caller's actor is alive, or else its process, or else its job.

    One or two GCS requests: some milliseconds.
    """
    if caller.actor:
        return bool(state.actors(caller.actor).get("State") != "DEAD")
    if caller.worker:
        return _process_lives(caller.worker)
    return any(job["JobID"] == caller.job and not job["IsDead"] for job in state.jobs())


def _process_lives(worker: str) -> bool:
    """Return whether a driver's or task's process is alive, and its node, which would report it."""
    accessor = state.state._connect_and_get_accessor()
    found = accessor.get_worker_info(WorkerID(bytes.fromhex(worker)))
    process = WorkerTableData.FromString(found) if found else None
    if process is None or not process.is_alive:
        return False
    node = process.worker_address.node_id.hex()
    return any(n["NodeID"] == node and n["Alive"] for n in ray.nodes())


class CallsInProgress:
    """The calls in flight at a replica; those of a dead caller are cancelled."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[Any], Ticket] = {}
        self._watching: asyncio.Task[None] | None = None

    @contextmanager
    def call(self, ticket: Ticket) -> Iterator[None]:
        """Register the current task as a call until the block is left."""
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
        more = f"; {len(named) - NAMED} more" if len(named) > NAMED else ""
        return "; ".join(named[:NAMED]) + more

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
