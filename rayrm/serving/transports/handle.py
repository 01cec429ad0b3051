"""Transport over a Serve handle, for drivers, tasks and actors of the cluster.

Imports Ray Serve, which takes seconds, so clients import this module at their first call. Does not
know what replicas compute.
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

# Name of the deployment that computes rewards; the application's other deployment calls it.
REPLICA = "Replica"

# Raised by a call over a handle if its replica, or the replica's node, has died.
DROPPED = (RayActorError, ObjectLostError)

# Raised if the object store has no room for a chunk; other objects will be freed.
FULL = (ObjectStoreFullError, OutOfDiskError)

# Seconds that the number of replicas is cached: asking Serve takes about 30 ms.
STATUS_SECONDS = 10.0

# Seconds that the handle is cached: checking that the application exists takes some milliseconds.
FOUND_SECONDS = 0.5


class HandleTransport:
    """Sends chunks to the replicas of the Serve application `app`."""

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
            raise Away(f"Serve's controller cannot be reached: {error}") from error

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        assert self._found, "call find() before call()"
        step, handle = ticket.step, self._found[0]
        context = replace(_get_serve_request_context(), request_id=f"{step}-{ticket.part}")
        # Serve's log lines then name the step too.
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
        if (served := record.find(version, caller.name)) is None:  # replicas may still hold it
            return Target(replicas, pack, version, rewards)
        check_served(rewards, served.adapters)
        return Target(replicas, pack, served.pin, rewards)

    def _find_replicas(self) -> DeploymentHandle[Any]:
        try:
            serve.get_app_handle(self.app)  # asks Serve; get_deployment_handle may use a cache
            return to_score(serve.get_deployment_handle(REPLICA, self.app))
        except (RayServeException, KeyError):
            deployed = ", ".join(map(repr, serve.status().applications)) or "none"
            raise ServiceError(f"no {self.name}; deployed: {deployed}") from None

    def _running_replicas(self) -> int:
        """Return the number of running replicas, at least 1; up to STATUS_SECONDS old."""
        count, until = self._replicas
        if time.time() > until:
            states = serve.status().applications[self.app].deployments[REPLICA].replica_states
            count = max(1, sum(n for state, n in states.items() if state == "RUNNING"))
            self._replicas = count, time.time() + STATUS_SECONDS
        return count


def to_score(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    """Configure a handle to replicas for sending chunks, and return it."""
    # Overrides RAY_SERVE_THROUGHPUT_OPTIMIZED, which ties the router to one event loop and sends
    # over gRPC, which refuses large payloads.
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle.options(method_name="score", _by_reference=True)
