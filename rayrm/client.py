"""RewardClient: a whole step of prompts and responses in, its rewards out, in order.

Calls the Serve application by name from a driver, an actor or another job of the cluster. What is
sent again, and when, is decided here. Knows nothing of models; what travels is in chunk.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypedDict, Unpack, overload
from uuid import uuid4

import ray
from numpy.typing import NDArray
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
from transformers import PreTrainedTokenizerBase

from rayrm.callers import Caller, Ticket, this_caller
from rayrm.chunk import CHUNKS_PER_REPLICA, Arrival, Chunk, Step
from rayrm.config import OWN
from rayrm.engine import (
    Rewards,
    Texts,
    check_names,
    check_served,
    make_rows,
    warn_unnamed_ids,
)
from rayrm.errors import Overloaded, ServiceError, StepTimeout, UnknownReward, VersionGone
from rayrm.template import Row, Tools, fingerprint
from rayrm.versions import read_record

logger = logging.getLogger("rayrm")

# The deployment that computes rewards; others of the application lead to it.
REPLICA = "Replica"

# How often a chunk is sent again after its replica died: rows that kill every replica must not go
# round for ever.
RETRIES = 5

# What a call over a handle raises when its replica, or the replica's node, has died.
DROPPED = (RayActorError, ObjectLostError)

# A chunk's bytes find no place for now: others' objects will be freed.
FULL = (ObjectStoreFullError, OutOfDiskError)

# Seconds between attempts, doubled each time up to the second.
BACKOFF = (0.2, 5.0)

# How long the number of replicas is taken to stand: Serve needs some 30 ms to tell it.
STATUS_SECONDS = 10.0

# And that there is such an application: some milliseconds.
FOUND_SECONDS = 0.5

# Refused chunks of a step that knock again within the time they were told to wait; the others wait
# for longer, so that how often a caller knocks does not grow with its step.
KNOCKS = 16

OnArrival = Callable[["NDArray[Any]", Any], None]

Named = dict[str, Rewards]
"""Rewards of the same rows, by the reward's name."""


@dataclass(frozen=True)
class Application:
    """What a step is sent to: so many replicas behind a handle, and the version to score by.

    rewards: which of them are wanted. An application that rayrm.deploy knows nothing of has neither
    packs (0) nor a version ("").
    """

    handle: DeploymentHandle[Any]
    replicas: int
    tokens_per_pack: int = 0
    version: str = ""
    rewards: tuple[str, ...] = (OWN,)


class Options(TypedDict, total=False):
    """What a call says of its step; all of it may be left out.

    groups: instead of responses, for each prompt a list of them, whose rewards come one after the
    other. finished: False for a response that the sampler cut off, in the order of the rewards.
    tools: for each prompt what can be called there, as JSON schemas, or None. tokenizer: what made
    the ids, or its fingerprint. version: score by this one, of the own reward,
    and no other. timeout_s: instead of the client's. on_arrival: called with places (int64 [n]) in
    the result and their rewards (by name, where names were asked for), on a thread of the client,
    as they come in.
    """

    groups: Sequence[Texts]
    finished: Sequence[bool]
    tools: Sequence[Tools | None]
    tokenizer: str | PreTrainedTokenizerBase
    version: str
    timeout_s: float
    on_arrival: OnArrival


class RewardClient:
    """Scores through the application of that name. Holds no connection, so it pickles.

    timeout_s bounds one step, waiting for a replica to come back included. caller: a name for logs
    and for the queues, which are fair between callers; by default the actor, or the process.
    """

    def __init__(
        self, app: str = "rayrm", *, timeout_s: float = 600.0, caller: str | None = None
    ) -> None:
        self.app = app
        self.timeout_s = timeout_s
        self.caller = caller
        self._found: tuple[DeploymentHandle[Any], int, float] | None = None
        self._replicas = (1, 0.0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None, "_replicas": (1, 0.0)}

    @overload
    def score(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: None = None,
        **options: Unpack[Options],
    ) -> Rewards: ...

    @overload
    def score(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: Sequence[str],
        **options: Unpack[Options],
    ) -> Named: ...

    def score(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> Rewards | Named:
        """Rewards of N responses, as RewardModel.score gives them, from the served model.

        rewards: names of those that are wanted, each with its Rewards: "default" is the
        application's own, the others are its adapters'. Equal rows are computed once, groups stay
        together, and what a dying replica drops is sent again. One version of each reward scores
        the whole step: what is served when it begins; if that is gone before the end, the step is
        scored again, and on_arrival told of all rows again.

        Blocks. Raises ServiceError where the application is missing or fails, StepTimeout where it
        does not answer in time, VersionGone where the version that was asked for is not served,
        UnknownReward for a name that is not; ValueError where the lists differ in length.
        """
        _refuse_event_loop()
        step = self.submit(prompts, responses, rewards=rewards, **options)
        try:
            return step.result()
        except BaseException:
            step.cancel()  # Ctrl-C: nobody waits for it any more
            raise

    @overload
    async def score_async(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: None = None,
        **options: Unpack[Options],
    ) -> Rewards: ...

    @overload
    async def score_async(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: Sequence[str],
        **options: Unpack[Options],
    ) -> Named: ...

    async def score_async(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> Rewards | Named:
        """score, to be awaited; cancelling that frees the replicas."""
        step: Future[Any] = self.submit(prompts, responses, rewards=rewards, **options)
        return await asyncio.wrap_future(step)

    @overload
    def submit(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: None = None,
        **options: Unpack[Options],
    ) -> Future[Rewards]: ...

    @overload
    def submit(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: Sequence[str],
        **options: Unpack[Options],
    ) -> Future[Named]: ...

    def submit(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> Future[Any]:
        """score in the background: a future of its rewards; cancelling it frees the replicas."""
        names = check_names(rewards)
        groups, tokenizer = options.get("groups"), options.get("tokenizer")
        finished, tools = options.get("finished"), options.get("tools")
        rows = make_rows(prompts, responses, finished, groups, tools)
        warn_unnamed_ids(rows, tokenizer)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = fingerprint(tokenizer)
        told = options.get("on_arrival")
        step = self.score_rows(
            rows,
            tokenizer,
            rewards=names,
            version=options.get("version"),
            timeout_s=options.get("timeout_s", self.timeout_s),
            on_arrival=_of_own(told) if told and rewards is None else told,
        )
        return _start(_own(step) if rewards is None else step)

    async def score_rows(
        self,
        rows: Sequence[Row],
        tokenizer: str | None,
        *,
        rewards: Sequence[str] = (OWN,),
        version: str | None = None,
        timeout_s: float | None = None,
        on_arrival: OnArrival | None = None,
        caller: Caller | None = None,
        patience_s: float = math.inf,
        id: str = "",
    ) -> Named:
        """What score does with its rows, on any event loop; every reward is named.

        patience_s: raise Overloaded once the service has answered nothing of the step for so long,
        VersionGone once the step has waited so long for a version that is there.
        id: what to call the step in logs.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        step, id = Step(rows), id or uuid4().hex[:12]
        began, gone_s = 0, 0.0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    caller = caller or self._this_caller()
                    app = await self._find(caller, tuple(dict.fromkeys(rewards)), version or "")
                    sending = Sending(app, self.app, id, caller, patience_s)
                    try:
                        return await sending.send(step, tokenizer, on_arrival)
                    except VersionGone as gone:
                        wait = backoff(began := began + 1)
                        if version or (gone_s := gone_s + wait) > patience_s:
                            raise
                        logger.warning(f"step={id} begins again: {gone}")
                        await asyncio.sleep(wait)
        except TimeoutError:
            raise StepTimeout(
                f"application {self.app!r} did not score step {id} within timeout_s = {timeout_s:g}"
            ) from None

    def _this_caller(self) -> Caller:
        if not ray.is_initialized():
            raise ServiceError("not connected to a Ray cluster: call ray.init() first")
        return this_caller(self.caller)

    async def _find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Application:
        """The application as it is now; waits while Serve's controller comes back."""
        attempt = 0
        while True:
            try:
                return await asyncio.to_thread(self._ask, caller, rewards, version)
            except DROPPED as error:
                logger.warning(f"Serve's controller is away: {error}")
                await asyncio.sleep(backoff(attempt := attempt + 1))

    def _ask(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Application:
        if self._found is None or time.monotonic() > self._found[2]:
            until = time.monotonic() + FOUND_SECONDS
            self._found = self._find_replicas(), self._running_replicas(), until
        handle, replicas, _ = self._found
        if (record := read_record(self.app)) is None:
            return Application(handle, replicas, version=version, rewards=rewards)
        pack = record.config.tokens_per_pack
        if (served := record.find(version, caller.name)) is None:  # replicas may hold it still
            return Application(handle, replicas, pack, version, rewards)
        check_served(rewards, served.adapters)
        return Application(handle, replicas, pack, served.pin, rewards)

    def _find_replicas(self) -> DeploymentHandle[Any]:
        try:
            serve.get_app_handle(self.app)  # asks; the next one may be from this process's cache
            return to_score(serve.get_deployment_handle(REPLICA, self.app))
        except (RayServeException, KeyError):
            deployed = ", ".join(map(repr, serve.status().applications)) or "none"
            raise ServiceError(f"no application {self.app!r}; deployed: {deployed}") from None

    def _running_replicas(self) -> int:
        """How many replicas the application has, one at least, as of a few seconds ago."""
        count, until = self._replicas
        if time.time() > until:
            states = serve.status().applications[self.app].deployments[REPLICA].replica_states
            count = max(1, sum(n for state, n in states.items() if state == "RUNNING"))
            self._replicas = count, time.time() + STATUS_SECONDS
        return count


class Sending:
    """One attempt at a step, by one version: its chunks, each sent until it is answered."""

    def __init__(
        self, app: Application, name: str, step: str, caller: Caller, patience_s: float
    ) -> None:
        self.app = app
        self.name = name
        self.step = step
        self.caller = caller
        self.patience_s = patience_s
        self.outstanding = 0
        self.waiting = 0
        self.spread = False
        self.refused = 0
        self.answered_at = math.inf

    async def send(self, step: Step, tokenizer: str | None, on_arrival: OnArrival | None) -> Named:
        """Cut the step, keep a few chunks a replica on their way, collect what arrives."""
        self.answered_at = asyncio.get_running_loop().time()
        cut = step.cut(self.app.replicas, self.app.tokens_per_pack)
        chunks = [step.chunk(keys, tokenizer) for keys in cut]
        self.outstanding = self.waiting = sum(map(self._cost, chunks))
        self.spread = len(chunks) > 1

        places = asyncio.Semaphore(CHUNKS_PER_REPLICA * self.app.replicas)

        async def score(part: int, chunk: Chunk) -> dict[str, Arrival]:
            async with places:
                self.waiting -= self._cost(chunk)
                await asyncio.sleep(0)  # the others that have a place do not wait either
                reply = await self.send_chunk(part, chunk)
            arrived = {name: step.arrived(cut[part], of) for name, of in reply.items()}
            self.outstanding -= self._cost(chunk)
            if on_arrival:
                rows, _ = next(iter(arrived.values()))
                on_arrival(rows, {name: of for name, (_, of) in arrived.items()})
            return arrived

        tasks = [asyncio.ensure_future(score(*numbered)) for numbered in enumerate(chunks)]
        try:
            arrivals = await asyncio.gather(*tasks)
            return {name: step.collect([a[name] for a in arrivals]) for name in self.app.rewards}
        finally:
            for task in tasks:
                task.cancel()

    def _cost(self, chunk: Chunk) -> int:
        """Tokens to compute, about: every reward takes a forward of its own."""
        return chunk.cost * len(self.app.rewards)

    async def send_chunk(self, part: int, chunk: Chunk) -> Named:
        """One chunk's rewards, from whichever replica lives and has room."""
        lost = full = 0
        while True:
            reply = await self._call(part, chunk)
            if isinstance(reply, dict):
                self.answered_at = asyncio.get_running_loop().time()
                return reply
            if isinstance(reply, VersionGone | UnknownReward):
                raise reply
            if isinstance(reply, Overloaded):
                await self._wait_for_room(reply, self._cost(chunk))
                continue
            elif isinstance(reply, FULL):
                wait = backoff(full := full + 1)
                self._warn(part, "found no room in the object store", reply)
            else:
                wait = backoff(lost := lost + 1)
                self._warn(part, f"lost its replica, time {lost}", reply)
                if lost > RETRIES:
                    raise ServiceError(
                        f"{lost} replicas of {self.name!r} died while they scored the same "
                        f"{len(chunk.finished)} rows of step {self.step}; the last: {reply}"
                    ) from reply
            await asyncio.sleep(wait)

    async def _call(self, part: int, chunk: Chunk) -> Named | Exception:
        """What a replica says, or what kept it from saying anything."""
        ticket = Ticket(
            self.step,
            part,
            self.caller,
            version=self.app.version,
            outstanding=self.outstanding,
            waiting=self.waiting,
            replicas=self.app.replicas,
            spread=self.spread,
            rewards=self.app.rewards,
        )
        context = replace(_get_serve_request_context(), request_id=f"{self.step}-{part}")
        # Serve's own log lines name the step too.
        _serve_request_context.set(context)  # type: ignore[arg-type]
        try:
            response = self.app.handle.remote(chunk, ticket)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
        except (*DROPPED, *FULL) as error:
            return error
        except RayTaskError as error:
            raise ServiceError(
                f"a replica of {self.name!r} failed on step {self.step}: {error.cause!r}"
            ) from error
        except RayServeException as error:
            raise ServiceError(f"application {self.name!r}, step {self.step}: {error}") from error

    async def _wait_for_room(self, refusal: Overloaded, tokens: int) -> None:
        """At random, so that callers do not come back together."""
        if asyncio.get_running_loop().time() - self.answered_at > self.patience_s:
            raise refusal
        self.refused += 1
        self.waiting += tokens
        self.spread = True
        rounds = max(1.0, self.refused / KNOCKS)
        try:
            await asyncio.sleep(refusal.retry_after_s * rounds * random.uniform(0.5, 1.5))
        finally:
            self.refused -= 1
            self.waiting -= tokens

    def _warn(self, part: int, what: str, error: Exception) -> None:
        version, caller = self.app.version, self.caller.name
        logger.warning(
            f"step={self.step} part={part} caller={caller} version={version} {what}: {error}"
        )


def backoff(attempt: int) -> float:
    first, most = BACKOFF
    return min(first * 2 ** (attempt - 1), most)


async def _own(step: Coroutine[Any, Any, Named]) -> Rewards:
    return (await step)[OWN]


def _of_own(on_arrival: OnArrival) -> OnArrival:
    return lambda places, rewards: on_arrival(places, rewards[OWN])


def _start(step: Coroutine[Any, Any, Any]) -> Future[Any]:
    return asyncio.run_coroutine_threadsafe(step, _loop(os.getpid()))


@cache
def _loop(pid: int) -> asyncio.AbstractEventLoop:
    """The event loop of all steps of this process, on a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rayrm-client", daemon=True).start()
    return loop


def to_score(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    """A handle to replicas, set up to send them chunks."""
    # RAY_SERVE_THROUGHPUT_OPTIMIZED would tie the router to one event loop, and send over gRPC,
    # which refuses large payloads.
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle.options(method_name="score", _by_reference=True)


def _refuse_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ServiceError(
        "score blocks, and an event loop runs here (an async actor, a notebook): "
        "use `await client.score_async(prompts, responses)`"
    )
