"""Score a whole step of prompts and responses with RewardClient.

Chunks travel over a Serve handle, over HTTP, or to a model in this process (transports/);
sending.py decides what is resent and when. Does not know about models, and loads neither torch nor
Ray before a call needs them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack, overload
from uuid import uuid4

from rayrm.config import OWN
from rayrm.errors import ConfigError, ServiceError, StepTimeout, VersionGone
from rayrm.rows import (
    Rewards,
    Row,
    Texts,
    Tools,
    check_names,
    make_rows,
    warn_unnamed_ids,
)
from rayrm.serving.chunk import Step
from rayrm.serving.sending import Named, OnArrival, Sending, backoff
from rayrm.serving.ticket import Caller
from rayrm.serving.transports import Away, Target, Transport
from rayrm.text.fingerprints import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayrm.model.engine import RewardModel

logger = logging.getLogger("rayrm")


class ScoredStep(NamedTuple):
    """A step's rewards by name, and the version that scored it."""

    rewards: Named
    version: str


class Options(TypedDict, total=False):
    """Optional arguments of a scoring call.

    groups: a list of responses for each prompt, instead of `responses`; the result has their
    rewards concatenated. finished: bool for each response, False if the sampler cut it off. tools:
    for each prompt the functions that can be called, as JSON schemas, or None. tokenizer: the
    tokenizer that made the ids, or its fingerprint. version: score by this version of the own
    reward only. timeout_s: seconds, instead of the client's. on_arrival: called as rewards arrive,
    on a thread of the client, with indices into the result (int64 [n]) and their Rewards (by name,
    if `rewards` was given).
    """

    groups: Sequence[Texts]
    finished: Sequence[bool]
    tools: Sequence[Tools | None]
    tokenizer: str | PreTrainedTokenizerBase
    version: str
    timeout_s: float
    on_arrival: OnArrival


class RewardClient:
    """Scores steps by a reward model: RewardClient("app"), (url=…, token=…) or (model=…).

    app: name of a Serve application in this cluster. url: an application that serves HTTP, for
    callers outside its cluster; token: the bearer token that it requires. model: a RewardModel in
    this process, for tests and notebooks. Results, errors and options are the same for all three.
    Pickles without its connections.

    timeout_s: seconds for one step, including the time in which replicas restart. caller: name for
    logs and for the queues, which are fair between callers; default: the actor or the process.
    Raises ConfigError if url and model are both set, or token without url.

        rewards = RewardClient().score(prompts, responses)
        rewards.values[rewards.errors.index(None)]  # the reward of the first row that has one
    """

    def __init__(
        self,
        app: str = "rayrm",
        *,
        url: str | None = None,
        token: str | None = None,
        model: RewardModel | None = None,
        timeout_s: float = 600.0,
        caller: str | None = None,
    ) -> None:
        if url is not None and model is not None:
            raise ConfigError("url and model are both set: set only one")
        if token is not None and url is None:
            raise ConfigError("token is set without url: only a client over HTTP uses it")
        self.app = app
        self.url = url
        self.token = token
        self.model = model
        self.timeout_s = timeout_s
        self.caller = caller

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "transport"}

    @cached_property
    def transport(self) -> Transport:
        """The transport to the model; imported at the first call."""
        if self.model is not None:
            from rayrm.serving.transports.local import LocalTransport

            return LocalTransport(self.model)
        if self.url is not None:
            from rayrm.serving.transports.http import HttpTransport

            return HttpTransport(self.url, self.token)
        from rayrm.serving.transports.handle import HandleTransport

        return HandleTransport(self.app)

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
        """Return the Rewards of N responses from the served model, equal to RewardModel.score's.

        rewards: names of the requested rewards; the result then has Rewards by name. "default" is
        the application's own reward, the others are its adapters'. Equal rows are computed once,
        groups stay together, and chunks that a dying replica drops are resent. One version of each
        reward scores the whole step: the one served at its start. If that is replaced before the
        end, the step is scored again, and on_arrival is called again for all rows.

        Blocks. Raises ServiceError if the application is missing or fails, StepTimeout if it does
        not answer in time, VersionGone if the requested version is not served, UnknownReward for an
        unknown name, ValueError for lists of different lengths.
        """
        _refuse_event_loop()
        step = self.submit(prompts, responses, rewards=rewards, **options)
        try:
            return step.result()
        except BaseException:
            step.cancel()  # Ctrl-C: free the replicas
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
        """Do the same as score without blocking the event loop; cancelling frees the replicas."""
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
        """Start score in the background and return its future; cancelling it frees the replicas."""
        names = check_names(rewards)
        groups, tokenizer = options.get("groups"), options.get("tokenizer")
        finished, tools = options.get("finished"), options.get("tools")
        rows = make_rows(prompts, responses, finished, groups, tools)
        warn_unnamed_ids(rows, tokenizer)
        if tokenizer is not None and not isinstance(tokenizer, str):
            tokenizer = fingerprint(tokenizer)
        on_arrival = options.get("on_arrival")
        step = self.score_rows(
            rows,
            tokenizer,
            rewards=names,
            version=options.get("version"),
            timeout_s=options.get("timeout_s", self.timeout_s),
            on_arrival=_of_own(on_arrival) if on_arrival and rewards is None else on_arrival,
        )
        return _start(_rewards_of(step, own=rewards is None))

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
        part: str = "",
        outstanding: int = 0,
    ) -> ScoredStep:
        """Score rows on any event loop; return their rewards by name, and the version.

        timeout_s: seconds, default the client's. patience_s: seconds without any answer to the step
        after which a refusal raises Overloaded, and total pause before restarts of the step after
        which VersionGone is raised. id: the step's id in logs, random by default. part: prefix of
        the chunks' numbers if the rows are one part of a step. outstanding: approximate number of
        tokens of the whole step without an answer.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        step, id = Step(rows), id or uuid4().hex[:12]
        names = tuple(dict.fromkeys(rewards))
        restarts, paused_s = 0, 0.0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    caller = caller or self.transport.caller(self.caller)
                    target = await self._find(caller, names, version or "")
                    sending = Sending(
                        self.transport,
                        target,
                        id,
                        caller,
                        patience_s=patience_s,
                        part=part,
                        outstanding=outstanding,
                    )
                    try:
                        scored = await sending.send(step, tokenizer, on_arrival)
                        return ScoredStep(scored, sending.target.version)
                    except VersionGone as gone:
                        restarts += 1
                        pause_s = backoff(restarts)
                        paused_s += pause_s
                        if version or paused_s > patience_s:
                            raise
                        logger.warning(f"step={id} starts over: {gone}")
                        await asyncio.sleep(pause_s)
        except TimeoutError:
            raise StepTimeout(
                f"{self.transport.name} did not score step {id} within timeout_s = {timeout_s:g}"
            ) from None

    async def _find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        """Return what is served now; retry while the service is unreachable."""
        attempt = 0
        while True:
            try:
                return await self.transport.find(caller, rewards, version)
            except Away as error:
                logger.warning(str(error))
                attempt += 1
                await asyncio.sleep(backoff(attempt))


async def _rewards_of(step: Coroutine[Any, Any, ScoredStep], own: bool) -> Rewards | Named:
    rewards = (await step).rewards
    return rewards[OWN] if own else rewards


def _of_own(on_arrival: OnArrival) -> OnArrival:
    return lambda places, rewards: on_arrival(places, rewards[OWN])


def _start(step: Coroutine[Any, Any, Any]) -> Future[Any]:
    return asyncio.run_coroutine_threadsafe(step, _loop(os.getpid()))


@cache
def _loop(pid: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of this process's steps, which runs on a separate thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rayrm-client", daemon=True).start()
    return loop


def _refuse_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ServiceError(
        "score blocks, and an event loop is running here (an async actor, a notebook): "
        "use `await client.score_async(prompts, responses)`"
    )
