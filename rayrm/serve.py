"""The Serve application: replicas that merge what several callers send into full packs.

deploy() starts it, and build() from a Serve config. A Replica holds one RewardModel, its TokenQueue
decides what is computed next; with http.enabled, an Endpoint answers in front of the replicas.
Knows nothing of how a step is cut into chunks, and nothing of training.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client

from rayrm.chunk import Chunk
from rayrm.client import REPLICA
from rayrm.config import HttpSection, ServeConfig
from rayrm.endpoint import Endpoint
from rayrm.engine import Encoded, RewardModel, Rewards
from rayrm.errors import ConfigError, ServiceError
from rayrm.foreign import open_model, pinned
from rayrm.metrics import ServeMetrics
from rayrm.model import check_max_length, load_config
from rayrm.packing import TokenGroup

Values = NDArray[np.float32]
Compute = Callable[[Sequence[TokenGroup]], Sequence[Values]]

# Serve's default of 5 would leave a replica nothing to merge; its own queue counts tokens instead.
MAX_ONGOING_REQUESTS = 1024

# The chunks of a step arrive within milliseconds of each other. An idle replica that began with the
# first would compute it on one thread, or in a small pack, while the others wait.
GATHER_S = 0.01

# What a Serve config has its own keys for.
ELSEWHERE = {
    "app": "the application's name",
    "http.host": "http_options.host",
    "http.port": "http_options.port",
    "http.route_prefix": "the application's route_prefix",
}


def deploy(config: ServeConfig) -> None:
    """Serve an export as an application that clients call by its name; returns when all are ready.

    Connects as ray.init() does if nobody has. Deploying a name again replaces its replicas. Raises
    ExportError, ModelError or ConfigError before anything starts, ServiceError if a replica fails
    to start.
    """
    config = locate_export(config)
    if not ray.is_initialized():
        ray.init()
    _start_serve(config.http)
    prefix = config.http.route_prefix if config.http.enabled else None
    try:
        serve.run(application(config), name=config.app, route_prefix=prefix)
    except RuntimeError:
        deployments = serve.status().applications[config.app].deployments.values()
        reason = "; ".join(d.message.strip().splitlines()[-1] for d in deployments if d.message)
        raise ServiceError(f"the replicas of {config.app!r} did not start: {reason}") from None


def build(args: dict[str, Any]) -> Application:
    """The application from a Serve config's args, which are ServeConfig's fields.

    For `import_path: rayrm.serve:build`. Raises ConfigError; also for a field that has its place
    elsewhere in a Serve config and would mean nothing here.
    """
    config = ServeConfig(**args)
    given = config.model_fields_set | {f"http.{key}" for key in config.http.model_fields_set}
    if misplaced := sorted(given & ELSEWHERE.keys()):
        raise ConfigError(
            f"{misplaced[0]} has no effect in args: a Serve config says it with "
            f"{ELSEWHERE[misplaced[0]]}"
        )
    if "://" not in config.export and not Path(config.export).is_absolute():
        raise ConfigError(f"export = {config.export!r}: must be absolute, or a URI, in args")
    return application(config)


def locate_export(config: ServeConfig) -> ServeConfig:
    """The config with its export found, and named so that every node finds it.

    Raises ExportError, ModelError or ConfigError.
    """
    if "://" in config.export:
        return config
    directory, _ = open_model(config.export)
    if config.max_length is not None:
        check_max_length(config.max_length, load_config(str(directory)))
    return config.model_copy(update={"export": pinned(config.export, directory)})


def _start_serve(http: HttpSection) -> None:
    if not http.enabled:
        serve.start(proxy_location="Disabled")  # clients call through handles: no port is opened
        return
    serve.start(http_options={"host": http.host, "port": http.port})
    # A Serve that runs already keeps its ports, and says so in its log at most.
    client = _get_global_client()
    assert client is not None
    running = client.http_config
    if not serve.status().proxies:
        raise ServiceError("Serve runs here already without HTTP: `serve shutdown` it first")
    if (running.host, running.port) != (http.host, http.port):
        raise ServiceError(
            f"Serve runs here already and answers HTTP on {running.host}:{running.port}, not on "
            f"{http.host}:{http.port}: take those, or `serve shutdown` it first"
        )


def application(config: ServeConfig) -> Application:
    """The application, not yet deployed."""
    actor_options: dict[str, Any] = {
        "num_cpus": config.cpus_per_replica,
        "num_gpus": config.gpus_per_replica,
        "label_selector": config.labels,
    }
    deployment = serve.deployment(
        name=REPLICA,
        num_replicas=config.replicas,
        ray_actor_options=actor_options,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=min(10.0, config.hang_timeout_s),
        # A pack that is not finished by then has hung; clients send again what is dropped.
        graceful_shutdown_timeout_s=min(20.0, config.hang_timeout_s),
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False},  # a line a chunk
    )
    replicas = deployment(Replica).bind(config)
    if not config.http.enabled:
        return replicas
    # It reads the export's tokenizer, so it stays where replicas are; it computes next to nothing.
    endpoint = serve.deployment(
        ray_actor_options={"num_cpus": 0, "label_selector": config.labels},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        logging_config={"enable_access_log": False},
    )
    return endpoint(Endpoint).bind(config, replicas)


class Replica:
    """One copy of the model, behind a Serve handle."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.calls = 0
        self.metrics = ServeMetrics()
        self.model = load_replica(config)
        warm_up(self.model)
        self.queue = TokenQueue(
            self.model.score_groups, config.tokens_per_pack, config.max_queue_tokens
        )
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    async def score(self, chunk: Chunk) -> Rewards:
        """Rewards of a chunk's rows, in its order."""
        self.calls += 1
        loop = asyncio.get_running_loop()
        with self.metrics.request(len(chunk.finished)):
            encoded = await loop.run_in_executor(self._tokenizing, self._encode, chunk)
            with self.metrics.waiting(sum(group.tokens for group in encoded.groups)):
                values = await self.queue.score(encoded.groups)
            rewards = self.model.collect(encoded, values)
            self.metrics.scored(rewards.values, rewards.errors)
            return rewards

    def _encode(self, chunk: Chunk) -> Encoded:
        return self.model.encode(chunk.rows(), chunk.tokenizer)

    def check_health(self) -> None:
        """Serve asks this every few seconds and replaces a replica that keeps raising."""
        if self.queue.seconds_per_pack > self.config.hang_timeout_s:
            raise ServiceError(
                f"a pack has been computing for {self.queue.seconds_per_pack:.0f} s, "
                f"hang_timeout_s is {self.config.hang_timeout_s:g}"
            )

    def stats(self) -> dict[str, Any]:
        """What this replica did since it started, and what waits."""
        return {
            "pid": os.getpid(),
            "version": self.model.version,
            "calls": self.calls,
            "forwards": self.model.forwards,
            "computed_tokens": self.queue.computed_tokens,
            "queued_tokens": self.queue.queued_tokens,
        }


def load_replica(config: ServeConfig) -> RewardModel:
    """One copy of the model, on the device and the threads that its config gives it."""
    if not config.gpus_per_replica:
        torch.set_num_threads(max(1, int(config.cpus_per_replica)))
    return RewardModel.load(
        config.export,
        "cuda" if config.gpus_per_replica else "cpu",
        config.dtype,
        max_length=config.max_length,
        overlong=config.overlong,
        tokens_per_pack=config.tokens_per_pack,
        deterministic=config.deterministic,
    )


def warm_up(model: RewardModel) -> None:
    """Touch the template, the kernels and the largest pack, so that what fails, fails now."""
    model.score(["Hello"] * 2, ["Yes.", "No, not at all."])
    longest = min(model.template.spec.max_length, model.tokens_per_pack)
    row = np.zeros(longest, dtype=np.int32)
    model.score_groups([TokenGroup(row[:0], (row,))] * (model.tokens_per_pack // longest))
    model.forwards = 0


@dataclass(eq=False)
class _Call:
    """One caller's groups, their values as they come, and the future that waits for all."""

    groups: Sequence[TokenGroup]
    done: asyncio.Future[list[Values]]
    values: dict[int, Values] = field(default_factory=dict)

    def deliver(self, g: int, values: Values) -> None:
        self.values[g] = values
        if len(self.values) == len(self.groups) and not self.done.done():
            self.done.set_result([self.values[g] for g in range(len(self.groups))])

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, eq=False)
class _Place:
    """The g-th group of a call, waiting."""

    call: _Call
    g: int
    group: TokenGroup


class TokenQueue:
    """Groups of many callers on their way through one model, in order of arrival, a pack a time.

    Holds max_tokens at most: what does not fit waits outside, a call that is larger is let in
    alone. compute runs on a thread of its own; what it raises goes to the callers whose groups
    were in the pack, and to nobody else. The groups of a cancelled caller are not computed.
    """

    def __init__(self, compute: Compute, tokens_per_pack: int, max_tokens: int) -> None:
        self.compute = compute
        self.tokens_per_pack = tokens_per_pack
        self.max_tokens = max_tokens
        self.queued_tokens = 0
        self.computed_tokens = 0
        self._waiting: list[_Place] = []
        self._door = asyncio.Lock()
        self._room = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._computing = ThreadPoolExecutor(1, "compute")
        self._pack_since: tuple[float, int] | None = None

    async def score(self, groups: Sequence[TokenGroup]) -> list[Values]:
        """Rewards of every group's responses, float32 [responses] each."""
        if not groups:
            return []
        call = _Call(groups, asyncio.get_running_loop().create_future())
        try:
            await self._enter([_Place(call, g, group) for g, group in enumerate(groups)])
            return await call.done
        finally:
            self._remove([place for place in self._waiting if place.call is call])

    async def _enter(self, places: list[_Place]) -> None:
        tokens = _tokens(places)
        async with self._door:  # first come, first served: a large call is not overtaken for ever
            while self.queued_tokens and self.queued_tokens + tokens > self.max_tokens:
                self._room.clear()
                await self._room.wait()
            self._waiting += places
            self.queued_tokens += tokens
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Compute until nothing waits."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(GATHER_S)
        while self._waiting:
            pack = self._next_pack()
            self._pack_since = time.monotonic(), math.ceil(_tokens(pack) / self.tokens_per_pack)
            try:
                groups = [place.group for place in pack]
                values = await loop.run_in_executor(self._computing, self.compute, groups)
            except Exception as error:
                for place in pack:
                    place.call.fail(error)
            else:
                self.computed_tokens += _tokens(pack)
                for place, group_values in zip(pack, values, strict=True):
                    place.call.deliver(place.g, group_values)
            self._pack_since = None

    def _next_pack(self) -> list[_Place]:
        """Take the group that has waited longest, and of the others what fits beside it."""
        pack: list[_Place] = []
        room = self.tokens_per_pack
        for place in self._waiting:
            if not pack or place.group.tokens <= room:
                pack.append(place)
                room -= place.group.tokens
        self._remove(pack)
        return pack

    def _remove(self, places: list[_Place]) -> None:
        gone = set(places)
        self._waiting = [place for place in self._waiting if place not in gone]
        self.queued_tokens -= _tokens(places)
        self._room.set()

    @property
    def seconds_per_pack(self) -> float:
        """How long the current pack has been computing; a group larger than a pack is several."""
        if self._pack_since is None:
            return 0.0
        since, packs = self._pack_since
        return (time.monotonic() - since) / packs


def _tokens(places: Sequence[_Place]) -> int:
    return sum(place.group.tokens for place in places)
