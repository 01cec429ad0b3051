"""The Serve handle as a transport: from a driver, an actor or another job of the cluster.

Loads Ray Serve, which takes seconds, so it is imported when a client first calls.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import (
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayTaskError,
)
from ray.serve.context import _get_serve_request_context, _serve_request_context
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rayrm.errors import ServiceError
from rayrm.rows import check_served
from rayrm.serving.callers import this_caller
from rayrm.serving.chunk import Chunk
from rayrm.serving.record import read_record
from rayrm.serving.ticket import Caller, Ticket
from rayrm.serving.transports import Answer, Away, Lost, NoRoom, Target

# The deployment that computes rewards; others of the application lead to it.
REPLICA = "Replica"

# What a call over a handle raises when its replica, or the replica's node, has died.
DROPPED = (RayActorError, ObjectLostError)

# A chunk's bytes find no place for now: others' objects will be freed.
FULL = (ObjectStoreFullError, OutOfDiskError)

# How long the number of replicas is taken to stand: Serve needs some 30 ms to tell it.
STATUS_SECONDS = 10.0

# And that there is such an application: some milliseconds.
FOUND_SECONDS = 0.5


class HandleTransport:
    """Calls the replicas of the Serve application of that name."""

    def __init__(self, app: str) -> None:
        self.app = app
        self.name = f"application {app!r}"
        self._found: tuple[DeploymentHandle[Any], int, float] | None = None
        self._replicas = (1, 0.0)

    def caller(self, name: str | None) -> Caller:
        if not ray.is_initialized():
            raise ServiceError("not connected to a Ray cluster: call ray.init() first")
        return this_caller(name)

    async def find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        try:
            return await asyncio.to_thread(self._find, caller, rewards, version)
        except DROPPED as error:
            raise Away(f"Serve's controller is away: {error}") from error

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        assert self._found, "a step is sent to what was found"
        step, handle = ticket.step, self._found[0]
        context = replace(_get_serve_request_context(), request_id=f"{step}-{ticket.part}")
        # Serve's own log lines name the step too.
        _serve_request_context.set(context)  # type: ignore[arg-type]
        try:
            response: Any = handle.remote(chunk, ticket)
            try:
                reply = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
        except DROPPED as error:
            raise Lost(str(error)) from error
        except FULL as error:
            raise NoRoom(str(error)) from error
        except RayTaskError as error:
            raise ServiceError(
                f"a replica of {self.app!r} failed on step {step}: {error.cause!r}"
            ) from error
        except RayServeException as error:
            raise ServiceError(f"{self.name}, step {step}: {error}") from error
        if isinstance(reply, Exception):
            raise reply
        return Answer(reply, target.version)

    def _find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        if self._found is None or time.monotonic() > self._found[2]:
            until = time.monotonic() + FOUND_SECONDS
            self._found = self._find_replicas(), self._running_replicas(), until
        _, replicas, _ = self._found
        if (record := read_record(self.app)) is None:
            return Target(replicas, version=version, rewards=rewards)
        pack = record.config.tokens_per_pack
        if (served := record.find(version, caller.name)) is None:  # replicas may hold it still
            return Target(replicas, pack, version, rewards)
        check_served(rewards, served.adapters)
        return Target(replicas, pack, served.pin, rewards)

    def _find_replicas(self) -> DeploymentHandle[Any]:
        try:
            serve.get_app_handle(self.app)  # asks; the next one may be from this process's cache
            return to_score(serve.get_deployment_handle(REPLICA, self.app))
        except (RayServeException, KeyError):
            deployed = ", ".join(map(repr, serve.status().applications)) or "none"
            raise ServiceError(f"no {self.name}; deployed: {deployed}") from None

    def _running_replicas(self) -> int:
        """How many replicas the application has, one at least, as of a few seconds ago."""
        count, until = self._replicas
        if time.time() > until:
            states = serve.status().applications[self.app].deployments[REPLICA].replica_states
            count = max(1, sum(n for state, n in states.items() if state == "RUNNING"))
            self._replicas = count, time.time() + STATUS_SECONDS
        return count


def to_score(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    """A handle to replicas, set up to send them chunks."""
    # RAY_SERVE_THROUGHPUT_OPTIMIZED would tie the router to one event loop, and send over gRPC,
    # which refuses large payloads.
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle.options(method_name="score", _by_reference=True)
