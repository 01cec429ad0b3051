"""RewardClient: a whole step of prompts and responses in, its rewards out, in order.

Over a Serve handle, over HTTP, or with a model of this process: transports/. What is sent again,
and when, is decided in sending.py. Knows nothing of models; loads neither torch nor Ray before a
call needs them.
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
    """A step's rewards by name, and the version that it was pinned to."""

    rewards: Named
    version: str


class Options(TypedDict, total=False):
    """What a call says of its step; all of it may be left out.

    groups: instead of responses, for each prompt a list of them, whose rewards come one after the
    other. finished: False for a response that the sampler cut off, in the order of the rewards.
    tools: for each prompt what can be called there, as JSON schemas, or None. tokenizer: what made
    the ids, or its fingerprint. version: score by this version of the own reward and no other.
    timeout_s: instead of the client's. on_arrival: called with places (int64 [n]) in the result and
    their rewards (by name, where names were asked for), on a thread of the client, as they come in.
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

    app: a Serve application of this cluster, by its name. url: an application that answers HTTP,
    for callers outside of its cluster; token: the bearer token that it asks for. model: a
    RewardModel of this process, for tests and notebooks. Results, errors and options are the same.
    Holds no connection, so it pickles.

    timeout_s bounds one step, waiting for a replica to come back included. caller: a name for logs
    and for the queues, which are fair between callers; by default the actor, or the process.

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
            raise ConfigError("url and model are both given: a client has one way to score")
        if token is not None and url is None:
            raise ConfigError("token is given without url: only HTTP asks for one")
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
        """The way to the model, of which nothing is imported before the first call."""
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
        """What score does with its rows, on any event loop; every reward is named.

        patience_s: raise Overloaded once the service has answered nothing of the step for so long,
        VersionGone once the step has waited so long for a version that is there.
        id: what to call the step in logs. part: these rows are that part of a step, of which so
        many tokens are outstanding, about.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        step, id = Step(rows), id or uuid4().hex[:12]
        names = tuple(dict.fromkeys(rewards))
        began, gone_s = 0, 0.0
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
                        wait = backoff(began := began + 1)
                        if version or (gone_s := gone_s + wait) > patience_s:
                            raise
                        logger.warning(f"step={id} begins again: {gone}")
                        await asyncio.sleep(wait)
        except TimeoutError:
            raise StepTimeout(
                f"{self.transport.name} did not score step {id} within timeout_s = {timeout_s:g}"
            ) from None

    async def _find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        """What is served now; waits while the service comes back."""
        attempt = 0
        while True:
            try:
                return await self.transport.find(caller, rewards, version)
            except Away as error:
                logger.warning(str(error))
                await asyncio.sleep(backoff(attempt := attempt + 1))


async def _rewards_of(step: Coroutine[Any, Any, ScoredStep], own: bool) -> Rewards | Named:
    rewards = (await step).rewards
    return rewards[OWN] if own else rewards


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


def _refuse_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ServiceError(
        "score blocks, and an event loop runs here (an async actor, a notebook): "
        "use `await client.score_async(prompts, responses)`"
    )
