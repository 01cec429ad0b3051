"""The Serve application: replicas that merge what several callers send into full packs.

deploy() starts it or gives it another export, try_out() lets one score a share of the callers or
none, promote() and rollback() end that, delete() ends the application, and build() makes it from a
Serve config. What they do goes by the record, whatever Serve says of the replicas' health: it is
when a replica has died that somebody rolls back. A Replica holds
the Models, its TokenQueue decides what is computed next; with http.enabled, an Endpoint answers in
front of the replicas. Knows nothing of how a step is cut into chunks, and nothing of training.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from rayrm.adapters import read_adapters
from rayrm.autoscale import LOOK_BACK_S, REPORT_S, OutstandingTokens
from rayrm.callers import Caller, CallsInProgress, Ticket, this_caller
from rayrm.chunk import Chunk
from rayrm.client import REPLICA
from rayrm.config import OWN, HttpSection, ServeConfig, at_home
from rayrm.demand import Demand
from rayrm.endpoint import Endpoint
from rayrm.engine import Encoded, RewardModel, Rewards
from rayrm.errors import ConfigError, Overloaded, ServiceError, UnknownReward, VersionGone
from rayrm.export import read_identity
from rayrm.foreign import open_model, pinned
from rayrm.known import KnownRewards
from rayrm.metrics import ServeMetrics
from rayrm.model import check_max_length, load_config
from rayrm.packing import TokenGroup
from rayrm.queue import ModelBroken, TokenQueue
from rayrm.shadow import Comparison, Difference, merge
from rayrm.versions import (
    Models,
    Record,
    Served,
    Staged,
    Trial,
    change_record,
    delete_record,
    read_record,
    together,
    unstaged,
)

logger = logging.getLogger("ray.serve")

# Serve's default of 5 would leave a replica nothing to merge; its own queue counts tokens instead.
MAX_ONGOING_REQUESTS = 1024

# How often replicas are asked whether they hold what is staged, and how long they may take to say.
STAGING_POLL_S = 0.5
STAGING_TIMEOUT_S = 10.0

# How long replicas are asked how what is in the shadow differs: Serve replaces one that died.
COMPARING_S = 60.0

# So many chunks wait at most to be scored once more, by a version in the shadow.
CHUNKS_SHADOWED = 16

# What a Serve config has its own keys for.
ELSEWHERE = {
    "app": "the application's name",
    "http.host": "http_options.host",
    "http.port": "http_options.port",
    "http.route_prefix": "the application's route_prefix",
}


def deploy(config: ServeConfig) -> None:
    """Serve an export as an application that clients call by its name; returns when all are ready.

    Connects as ray.init() does if nobody has. Where the application runs, a new export is loaded
    beside the one that is served and takes over when every replica has it; anything else that is
    new replaces the replicas. Raises ExportError, ModelError or ConfigError before anything starts,
    ServiceError if replicas fail to start or to load.
    """
    config, served = locate_export(config)
    if not ray.is_initialized():
        ray.init()
    _start_serve(config.http)
    _serve(config, served)


def try_out(app: str, export: str, share: float = 0.0) -> Served:
    """Serve an export beside the current one; returns its version when all replicas have it.

    It scores that share of the callers, whole steps of them (a canary). With share 0 it answers
    nobody, but scores, when nothing else waits, what the current one has answered (a shadow), and
    compare() tells how they differ. Takes the place of what was on trial before.

    Raises ExportError, ModelError, or ConfigError for a share that is none; ServiceError where the
    application does not run or a replica cannot load the export.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share = {share}: must be from 0 (answers nobody) to 1 (all callers)")
    _, served = locate_export(_known(app).config.model_copy(update={"export": at_home(export)}))
    trial = Trial(served=served, share=share, since=time.time())
    _load_beside(app, served, lambda record: record.model_copy(update={"trial": trial}))
    return served


def promote(app: str) -> Served:
    """Let the version on trial score all callers from their next step on; says what that is."""

    def change(record: Record) -> Record:
        if record.trial is None:
            raise ServiceError(f"application {app!r} has no version on trial: try one out first")
        return switched(record, record.trial.served)

    return _change(app, change).current


def rollback(app: str) -> Served:
    """End the trial; without one, serve again what was served before. Says what is served then."""
    record = _known(app)
    if record.trial:
        return _change(app, partial(_without, record.trial)).current
    if (previous := record.previous) is None:
        raise ServiceError(f"application {app!r} has no version before this one")
    _serve(record.config.model_copy(update=previous.place), previous)
    return previous


def _without(trial: Trial, record: Record) -> Record:
    if record.trial != trial:
        raise ServiceError(f"the trial of {record.config.app!r} was ended by somebody else")
    return record.model_copy(update={"trial": None})


def delete(app: str) -> None:
    """End the application and forget what it serves. Raises ServiceError where there is neither."""
    deployed = serve.status().applications
    if app in deployed:
        serve.delete(app)  # first: a replica that starts would write the record again
    if not delete_record(app) and app not in deployed:
        names = ", ".join(map(repr, deployed)) or "none"
        raise ServiceError(f"no application {app!r} to delete; deployed: {names}")


def compare(app: str) -> Difference:
    """How the rewards of the version in the shadow differ from those of the current one.

    As far as the replicas know that live. Raises ServiceError where there is no such application.
    """
    _known(app)
    handle = serve.get_deployment_handle(REPLICA, app)
    deadline = time.monotonic() + COMPARING_S
    while (told := _ask_all(handle, "difference")) is None and _running(app):
        if time.monotonic() > deadline:
            raise ServiceError(f"not all replicas of {app!r} answer")
        time.sleep(STAGING_POLL_S)
    return merge(told or [])


def swap(app: str, served: Served) -> Record:
    """Let every replica load it beside what it serves, then make it the current one.

    Raises ServiceError, and leaves things as they are, where a replica cannot load it.
    """
    return _load_beside(app, served, lambda record: switched(record, served))


def switched(record: Record, served: Served) -> Record:
    """The record once that is served, and nothing else is staged or tried."""
    after = {
        "config": record.config.model_copy(update=served.place),
        "current": served,
        "previous": record.before(served),
        "staged": None,
        "trial": None,
    }
    return record.model_copy(update=after)


def _serve(config: ServeConfig, served: Served) -> None:
    """Let the application serve that: in its replicas where some run, else in new ones."""
    record = read_record(config.app)
    if record and _runs(config.app):
        if record.current != served:
            record = swap(config.app, served)
        if record.config == config:
            return
    started = together(config.export, config.adapters)
    new = Record(config=config, started=started, current=served)

    def change(found: Record | None) -> Record:
        return new.model_copy(update={"previous": found and found.before(served)})

    change_record(config.app, change)
    _run(config)
    if (found := read_record(config.app)) is None or found.config != config:
        raise ServiceError(f"application {config.app!r} was deployed by somebody else meanwhile")


def _runs(app: str) -> bool:
    """Whether replicas can be given something else to serve: some run, or ran and will again."""
    there = serve.status().applications.get(app)
    if there and there.status == "DEPLOYING":
        return _running(app) > 0
    return bool(there and there.status in ("RUNNING", "UNHEALTHY"))


def _running(app: str) -> int:
    there = serve.status().applications.get(app)
    replicas = there and there.deployments.get(REPLICA)
    states = replicas.replica_states.items() if replicas else ()
    return sum(n for state, n in states if state == "RUNNING")


def _known(app: str) -> Record:
    """The record of an application that Serve has."""
    record = read_record(app)
    if record is None or app not in serve.status().applications:
        raise ServiceError(f"application {app!r} does not run: deploy it first")
    return record


def _change(app: str, change: Callable[[Record], Record]) -> Record:
    _known(app)

    def change_there(record: Record | None) -> Record:
        if record is None:
            raise ServiceError(f"application {app!r} was deleted meanwhile")
        return change(record)

    changed = change_record(app, change_there)
    assert changed is not None
    return changed


def _load_beside(app: str, served: Served, change: Callable[[Record], Record]) -> Record:
    """Once every replica holds it, write what change makes of the record.

    Raises ServiceError where one cannot load it, or where somebody else stages something meanwhile.
    However it ends, nothing is left staged by it.
    """
    staged = Staged(served=served, owner=this_caller(), id=uuid4().hex)

    def change_mine(record: Record) -> Record:
        if record.staged != staged:
            raise ServiceError(f"application {app!r} was deployed by somebody else meanwhile")
        return change(record).model_copy(update={"staged": None})

    try:
        _change(app, lambda record: record.model_copy(update={"staged": staged}))
        handle = serve.get_deployment_handle(REPLICA, app)
        while not _all_hold(handle, staged):
            if (record := read_record(app)) is None or record.staged != staged:
                raise ServiceError(f"application {app!r} was deployed by somebody else meanwhile")
            time.sleep(STAGING_POLL_S)
        return _change(app, change_mine)
    except BaseException:  # Ctrl-C too
        change_record(app, unstaged(staged))
        raise


def _all_hold(handle: DeploymentHandle[Any], staged: Staged) -> bool:
    app, pin = handle.app_name, staged.served.pin
    if (replicas := _ask_all(handle, "catch_up")) is None:
        return not _running(app)  # those that come will load it
    for replica in replicas:
        if "staged" not in replica:
            raise ServiceError(
                f"replicas of {app!r} were started by an older rayrm, and do not see what is "
                "deployed now: delete the application and deploy it again"
            )
        if replica["staged"] == staged.id and (why := replica["failed"].get(pin)):
            raise ServiceError(f"a replica cannot load {staged.served.export}: {why}")
    return all(pin in replica["versions"] for replica in replicas)


def _ask_all(handle: DeploymentHandle[Any], method: str) -> list[Any] | None:
    """What each replica says; None while one that died or hangs is there, or none at all."""
    try:
        return list(handle.broadcast(method).results(timeout_s=STAGING_TIMEOUT_S))
    except (TimeoutError, RayActorError, DeploymentUnavailableError):
        return None


def _run(config: ServeConfig) -> None:
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
    named = {f"adapters.{name}": path for name, path in config.adapters.items()}
    for key, path in {"export": config.export, **named}.items():
        if "://" not in path and not Path(path).is_absolute():
            raise ConfigError(f"{key} = {path!r}: must be absolute, or a URI, in args")
    return application(config)


def locate_export(config: ServeConfig) -> tuple[ServeConfig, Served]:
    """The config with its exports found, and named so that every node finds them.

    Raises ExportError, ModelError or ConfigError.
    """
    if config.adapters:
        return locate_adapters(config)
    if "://" in config.export:
        export = read_identity(config.export)
        return config, Served(export=config.export, version=export.version)
    directory, export = open_model(config.export)
    if config.max_length is not None:
        check_max_length(config.max_length, load_config(str(directory)))
    where = pinned(config.export, directory)
    located = config.model_copy(update={"export": where})
    return located, Served(export=where, version=export.version)


def locate_adapters(config: ServeConfig) -> tuple[ServeConfig, Served]:
    """As locate_export, where several rewards share a backbone."""
    read = read_adapters(config.export, config.adapters, config.max_length)
    found = {
        name: Served(
            export=path if "://" in path else str(read[name].directory.resolve()),
            version=read[name].export.adapter_version,
        )
        for name, path in {OWN: config.export, **config.adapters}.items()
    }
    own = found.pop(OWN)
    check_max_length(read[OWN].template.spec.max_length, load_config(str(read[OWN].directory)))
    served = Served(export=own.export, version=own.version, adapters=found)
    return config.model_copy(update=served.place), served


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
        **scale(config),
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


def scale(config: ServeConfig) -> dict[str, Any]:
    """Serve's options for the number of replicas."""
    wanted = config.autoscale
    if wanted.max_replicas is None:
        return {"num_replicas": config.replicas}
    policy = AutoscalingPolicy(
        policy_function=OutstandingTokens,
        policy_kwargs={"tokens_per_replica": wanted.tokens_per_replica},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=wanted.min_replicas,
            max_replicas=wanted.max_replicas,
            upscale_delay_s=wanted.upscale_delay_s,
            downscale_delay_s=wanted.downscale_delay_s,
            metrics_interval_s=REPORT_S,
            look_back_period_s=LOOK_BACK_S,
            policy=policy,
        )
    }


class Replica:
    """One copy of the model, behind a Serve handle; of two versions while a new one comes."""

    def __init__(self, config: ServeConfig) -> None:
        app = serve.get_replica_context().app_name
        self.config = config
        self.calls = self.refused = 0
        self.metrics = ServeMetrics()
        self.in_progress = CallsInProgress()
        self.demand = Demand()
        self.queue = TokenQueue(config.tokens_per_pack, config.max_queue_tokens)
        self.known = KnownRewards(config.cache_bytes)
        self.models = Models(app, config, self._load, self.metrics.holds)
        self.shadowing: set[asyncio.Task[None]] = set()
        self.compared: tuple[Trial | None, Comparison] = None, Comparison()
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")

    async def score(
        self, chunk: Chunk, ticket: Ticket
    ) -> dict[str, Rewards] | Overloaded | VersionGone | UnknownReward:
        """Rewards of a chunk's rows by name, in its order; or why they are not scored now."""
        self.calls += 1
        cost = chunk.cost * len(ticket.rewards)
        try:
            with self.demand.chunk(ticket, cost):
                self.queue.own, self.queue.share, self.queue.outstanding = self.demand.wanted()
                with self.queue.admit(ticket.caller, cost), self.in_progress.call(ticket):
                    model = await self.models.get(ticket.version)
                    rewards = await self._score(model, chunk, ticket)
        except (Overloaded, VersionGone, UnknownReward) as refusal:
            self.refused += 1
            self.metrics.refused(refusal)
            return refusal  # raised, it would be logged by Serve with its traceback
        except ModelBroken:
            logger.exception(f"step={ticket.step} part={ticket.part} this replica ends itself")
            os._exit(1)  # Serve starts another, and callers send again what this one had
        trial = self.models.shadow
        if trial and OWN in rewards and ticket.version in ("", self.models.current):
            self._shadow(trial, chunk, rewards[OWN])
        return rewards

    async def _score(self, model: RewardModel, chunk: Chunk, ticket: Ticket) -> dict[str, Rewards]:
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        models = {name: model.named(name) for name in ticket.rewards}
        with self.metrics.request(len(chunk.finished)):
            encoded = await loop.run_in_executor(self._tokenizing, encode, model, chunk)
            tokens = sum(group.tokens for group in encoded.groups) * len(models)
            unshared = sum(group.tokens_unshared for group in encoded.groups) * len(models)
            with self.metrics.waiting(tokens, unshared):
                scored = await asyncio.gather(
                    *(self._score_by(m, encoded, ticket.caller) for m in models.values())
                )
            self.metrics.found(self.known.rows_found)
            rewards = dict(zip(models, scored, strict=True))
            for name, of in rewards.items():
                self.metrics.scored(name, of, chunk)
        errors = sum(len(of) - of.errors.count(None) for of in scored)
        logger.info(
            f"step={ticket.step} part={ticket.part} caller={ticket.caller.name} "
            f"version={model.version} rewards={','.join(models)} rows={len(scored[0])} "
            f"tokens={tokens} errors={errors} took={time.perf_counter() - started:.3f}s"
        )
        return rewards

    async def _score_by(
        self, model: RewardModel, encoded: Encoded, caller: Caller | None
    ) -> Rewards:
        compute = partial(self.queue.score, compute=model.score_groups, caller=caller)
        scored = await self.known.score(model.version, encoded.groups, compute)
        return model.collect(encoded, [s.values for s in scored], [s.errors for s in scored])

    def _shadow(self, trial: Trial, chunk: Chunk, rewards: Rewards) -> None:
        """Score what is answered by another version too, when nothing else waits."""
        if len(self.shadowing) >= CHUNKS_SHADOWED:
            self.metrics.unshadowed.inc(len(rewards))
            return
        task = asyncio.create_task(self._compare(trial, chunk, rewards))
        self.shadowing.add(task)
        task.add_done_callback(self.shadowing.discard)

    async def _compare(self, trial: Trial, chunk: Chunk, rewards: Rewards) -> None:
        try:
            model = await self.models.get(trial.served.pin)
            encoded = await asyncio.to_thread(encode, model, chunk)
            tried = await self._score_by(model, encoded, None)
        except (VersionGone, ModelBroken):
            logger.exception(f"version={trial.served.pin} cannot score what it is compared on")
            return
        if self.compared[0] != trial:
            self.compared = trial, Comparison()
        self.compared[1].add(chunk.prompt_of, rewards, tried)
        self.metrics.compared(self.difference())

    def difference(self) -> Difference:
        """How the rewards in the shadow differ, as far as this replica knows."""
        trial, comparison = self.compared
        return (comparison if trial == self.models.shadow else Comparison()).difference()

    def _load(self, config: ServeConfig) -> RewardModel:
        model = load_replica(config)
        self.queue.alone(lambda: warm_up(model))
        return model

    def check_health(self) -> None:
        """Serve asks this every few seconds and replaces a replica that keeps raising."""
        if self.queue.seconds_per_pack > self.config.hang_timeout_s:
            raise ServiceError(
                f"a pack has been computing for {self.queue.seconds_per_pack:.0f} s, "
                f"hang_timeout_s is {self.config.hang_timeout_s:g}; waiting: {self.in_progress}"
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this for its autoscaling policy: autoscale.py."""
        return self.demand.report()

    def catch_up(self) -> dict[str, Any]:
        """Compare with what is wanted, soon; stats as they are."""
        self.models.hasten()
        return self.stats()

    def stats(self) -> dict[str, Any]:
        """What this replica did since it started, and what waits."""
        model, staged = self.models.model, self.models.record.staged
        return {
            "pid": os.getpid(),
            "version": model.version,
            "versions": sorted(self.models.held),
            "dtype": model.dtype,
            "failed": {version: of.why for version, of in self.models.failed.items()},
            "staged": staged.id if staged else "",
            "shadow": self.models.shadow.served.pin if self.models.shadow else "",
            "calls": self.calls,
            "refused": self.refused,
            "forwards": sum(of.forwards for of in model.rewards.values()),
            "computed_tokens": self.queue.computed_tokens,
            "queued_tokens": self.queue.queued_tokens,
            "admitted_tokens": self.queue.admitted_tokens,
            "rows_found": self.known.rows_found,
        }


def encode(model: RewardModel, chunk: Chunk) -> Encoded:
    return model.encode(chunk.rows(), chunk.tokenizer)


def load_replica(config: ServeConfig) -> RewardModel:
    """One copy of the model, on the device and the threads that its config gives it."""
    if not config.gpus_per_replica:
        torch.set_num_threads(max(1, int(config.cpus_per_replica)))
    return RewardModel.load(
        config.export,
        "cuda" if config.gpus_per_replica else "cpu",
        config.dtype,
        adapters=config.adapters,
        max_length=config.max_length,
        overlong=config.overlong,
        tokens_per_pack=config.tokens_per_pack,
        deterministic=config.deterministic,
    )


def warm_up(model: RewardModel) -> None:
    """Touch the template, the kernels and the largest pack, so that what fails, fails now."""
    for of in model.rewards.values():
        of.score(["Hello"] * 2, ["Yes.", "No, not at all."])
    longest = min(model.template.spec.max_length, model.tokens_per_pack)
    row = np.zeros(longest, dtype=np.int32)
    model.score_groups([TokenGroup(row[:0], (row,))] * (model.tokens_per_pack // longest))
    for of in model.rewards.values():
        of.forwards = 0
