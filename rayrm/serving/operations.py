"""Operate an application: deploy, try out, promote, roll back, compare, delete.

deploy() starts the application or gives it another export, try_out() lets an export score a share
of the callers or none, promote() and rollback() end that trial, delete() ends the application. All
rely on the record and not on Serve's health status, since a rollback is needed when replicas have
died. Does not know what replicas compute.
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
    remove_staged,
)
from rayrm.serving.shadow import Difference, merge
from rayrm.serving.transports.handle import REPLICA

# Seconds between polls of the replicas for the staged version, and seconds that a poll may take.
STAGING_POLL_S = 0.5
STAGING_TIMEOUT_S = 10.0

# Seconds until all replicas must have answered compare(): Serve first replaces one that died.
COMPARING_S = 60.0


def deploy(config: ServeConfig) -> None:
    """Serve an export as the application `config.app`; return when all replicas are ready.

    Calls ray.init() if Ray is not initialized. If the application runs, its replicas load a new
    export next to the served one and switch when all have it; any other change of the config
    replaces the replicas. Raises ExportError, ModelError or ConfigError before anything starts,
    ServiceError if replicas fail to start or to load.
    """
    config, served = locate_export(config)
    if not ray.is_initialized():
        ray.init()
    _start_serve(config.http)
    _serve(config, served)


def try_out(app: str, export: str, share: float = 0.0) -> Served:
    """Put an export on trial next to the current one; return it when all replicas have loaded it.

    share: share of the callers whose steps it scores (a canary). With share 0 it answers nobody:
    when nothing else waits, it scores what the current version has answered (a shadow), and
    compare() returns how their rewards differ. Replaces an earlier trial.

    Raises ExportError, ModelError, ConfigError for a share outside 0 to 1, and ServiceError if the
    application does not run or a replica cannot load the export.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share = {share}: must be from 0 (answers nobody) to 1 (all callers)")
    _, served = locate_export(_known(app).config.model_copy(update={"export": at_home(export)}))
    trial = Trial(served=served, share=share, since=time.time())
    _load_beside(app, served, lambda record, _: record.model_copy(update={"trial": trial}))
    return served


def promote(app: str) -> Served:
    """Let the version on trial score all callers from their next step on; return it.

    Raises ServiceError if none is on trial.
    """

    def change(record: Record) -> Record:
        if record.trial is None:
            raise ServiceError(f"application {app!r} has no version on trial: try one out first")
        return with_current(record, record.trial.served)

    return _change(app, change).current


def rollback(app: str) -> Served:
    """End the trial; without one, serve the previous version again. Return what is served then.

    Raises ServiceError if neither exists.
    """
    record = _known(app)
    if record.trial:
        return _change(app, partial(_without, record.trial)).current
    previous = record.previous
    if previous is None:
        raise ServiceError(f"application {app!r} has no version before this one")
    _serve(record.config.model_copy(update=previous.place), previous)
    return _known(app).current


def _without(trial: Trial, record: Record) -> Record:
    if record.trial != trial:
        raise ServiceError(f"the trial of {record.config.app!r} was ended by somebody else")
    return record.model_copy(update={"trial": None})


def delete(app: str) -> None:
    """End the application and delete its record. Raises ServiceError if neither exists."""
    deployed = serve.status().applications
    if app in deployed:
        serve.delete(app)  # before the record, which a starting replica would write again
    if not delete_record(app) and app not in deployed:
        names = ", ".join(map(repr, deployed)) or "none"
        raise ServiceError(f"no application {app!r} to delete; deployed: {names}")


def compare(app: str) -> Difference:
    """Return how the shadow's rewards differ from the current ones, over all live replicas' rows.

    Raises ServiceError if the application does not run or not all of its replicas answer.
    """
    _known(app)
    handle = serve.get_deployment_handle(REPLICA, app)
    deadline = time.monotonic() + COMPARING_S
    differences = _ask_all(handle, "difference")
    while differences is None and _running(app):
        if time.monotonic() > deadline:
            raise ServiceError(f"not all replicas of {app!r} answered within {COMPARING_S:g} s")
        time.sleep(STAGING_POLL_S)
        differences = _ask_all(handle, "difference")
    return merge(differences or [])


def swap(app: str, served: Served) -> Record:
    """Let every replica load the export, then make it the current one.

    Raises ServiceError and changes nothing if a replica cannot load it.
    """
    return _load_beside(app, served, with_current)


def with_current(record: Record, served: Served) -> Record:
    """Return the record with `served` as the current export, and nothing staged or on trial."""
    updates = {
        "config": record.config.model_copy(update=served.place),
        "current": served,
        "previous": record.before(served),
        "staged": None,
        "trial": None,
    }
    return record.model_copy(update=updates)


def _serve(config: ServeConfig, served: Served) -> None:
    """Serve that export in the application's replicas if some run, else in new ones."""
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
    written = read_record(config.app)
    if written is None or written.config != config:
        raise ServiceError(f"application {config.app!r} was deployed by somebody else meanwhile")


def _runs(app: str) -> bool:
    """Return whether replicas can switch to another export: some run, or ran and will again."""
    overview = serve.status().applications.get(app)
    if overview and overview.status == "DEPLOYING":
        return _running(app) > 0
    return bool(overview and overview.status in ("RUNNING", "UNHEALTHY"))


def _running(app: str) -> int:
    """Return the number of running replicas."""
    overview = serve.status().applications.get(app)
    replicas = overview and overview.deployments.get(REPLICA)
    states = replicas.replica_states.items() if replicas else ()
    return sum(n for state, n in states if state == "RUNNING")


def _known(app: str) -> Record:
    """Return the record of a running application. Raises ServiceError if it does not run."""
    record = read_record(app)
    if record is None or app not in serve.status().applications:
        raise ServiceError(f"application {app!r} does not run: deploy it first")
    return record


def _change(app: str, change: Callable[[Record], Record]) -> Record:
    """Write the record that `change` returns for a running application, and return it."""
    _known(app)

    def change_existing(record: Record | None) -> Record:
        if record is None:
            raise ServiceError(f"application {app!r} was deleted meanwhile")
        return change(record)

    changed = change_record(app, change_existing)
    assert changed is not None
    return changed


def _load_beside(app: str, served: Served, change: Callable[[Record, Served], Record]) -> Record:
    """Let every replica load the export, then write the record that `change` returns.

    `change` is called with the record and the export by its present version: replicas rename one
    that an older rayrm has recorded. Raises ServiceError if a replica cannot load it, or if another
    process stages an export meanwhile. In every case the export is no longer staged afterwards.
    """
    staged = Staged(served=served, owner=this_caller(), id=uuid4().hex)

    def change_mine(record: Record) -> Record:
        mine = _still_staged(record, staged)
        return change(record, mine.served).model_copy(update={"staged": None})

    try:
        _change(app, lambda record: record.model_copy(update={"staged": staged}))
        handle = serve.get_deployment_handle(REPLICA, app)
        while not _all_hold(handle, _still_staged(read_record(app), staged)):
            time.sleep(STAGING_POLL_S)
        return _change(app, change_mine)
    except BaseException:  # also on Ctrl-C
        change_record(app, remove_staged(staged))
        raise


def _still_staged(record: Record | None, staged: Staged) -> Staged:
    """Return `staged` as the record has it. Raises ServiceError if it is not staged any more."""
    if record is None or record.staged is None or record.staged.id != staged.id:
        raise ServiceError(
            f"{staged.served.export} is no longer staged: another process deployed meanwhile"
        )
    return record.staged


def _all_hold(handle: DeploymentHandle[Any], staged: Staged) -> bool:
    """Return whether all replicas have loaded the staged export.

    Raises ServiceError if one of them cannot load it.
    """
    app, pin = handle.app_name, staged.served.pin
    replicas = _ask_all(handle, "request_compare")
    if replicas is None:
        return not _running(app)  # replicas that start later will load it
    for replica in replicas:
        if "staged" not in replica:
            raise ServiceError(
                f"replicas of {app!r} were started by an older rayrm, and do not see this "
                "deployment: delete the application and deploy it again"
            )
        if replica["staged"] == staged.id:
            why = replica["failed"].get(pin)
            if why:
                raise ServiceError(f"a replica cannot load {staged.served.export}: {why}")
    return all(pin in replica["versions"] for replica in replicas)


def _ask_all(handle: DeploymentHandle[Any], method: str) -> list[Any] | None:
    """Return every replica's result of a method; None if one has died or hangs, or none runs."""
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
    try:
        serve.start(http_options={"host": http.host, "port": http.port})
    except RuntimeError as error:
        if "Failed to bind" not in str(error):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise ServiceError(
            f"HTTP does not start on {http.host}:{http.port} ({reason}): run `serve shutdown`, and "
            "choose a port that no other program has"
        ) from None
    # If Serve runs already it keeps its address, and logs this at most.
    client = _get_global_client()
    assert client is not None
    running = client.http_config
    if not serve.status().proxies:
        raise ServiceError(
            f"Serve runs here already without HTTP, or cannot open {running.host}:{running.port} "
            "because another program has the port: run `serve shutdown` first, or choose another"
        )
    if (running.host, running.port) != (http.host, http.port):
        raise ServiceError(
            f"Serve runs here already and answers HTTP on {running.host}:{running.port}, not on "
            f"{http.host}:{http.port}: use the former, or run `serve shutdown` first"
        )
