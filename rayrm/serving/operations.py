"""Operate an application: deploy, try out, promote, roll back, compare, delete.

deploy() starts the application or gives it another export, try_out() lets one score a share of the
callers or none, promote() and rollback() end that, delete() ends the application. They go by the
record, whatever Serve says of the replicas' health: when a replica has died is when somebody rolls
back. Knows nothing of what replicas compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from rayrm.config import at_home
from rayrm.errors import ConfigError, ServiceError
from rayrm.serving.application import application
from rayrm.serving.callers import this_caller
from rayrm.serving.config import HttpSection, ServeConfig
from rayrm.serving.locate import locate_export
from rayrm.serving.record import (
    Record,
    Served,
    Staged,
    Trial,
    change_record,
    delete_record,
    pin_of,
    read_record,
    unstaged,
)
from rayrm.serving.shadow import Difference, merge
from rayrm.serving.transports.handle import REPLICA

# How often replicas are asked whether they hold what is staged, and how long they may take to say.
STAGING_POLL_S = 0.5
STAGING_TIMEOUT_S = 10.0

# How long replicas are asked how what is in the shadow differs: Serve replaces one that died.
COMPARING_S = 60.0


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
    started = pin_of(config.export, config.adapters)
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
