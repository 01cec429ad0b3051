"""Which export an application serves: the cluster's record of it, and the models of a replica.

The record lies in the GCS, so that it outlives replicas, the controller and whoever deployed. A
replica compares itself with it when it starts and every few seconds. Knows nothing of queues.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from pydantic import BaseModel
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from rayrm.config import ServeConfig
from rayrm.engine import RewardModel
from rayrm.errors import ExportError, VersionGone
from rayrm.hardware import Dtype, fast_dtype

logger = logging.getLogger("ray.serve")

NAMESPACE = b"rayrm"
DTYPES_NAMESPACE = b"rayrm dtypes"

# How often a replica compares itself with the record; being told to is only faster.
COMPARE_S = 2.0

# A step that is pinned to the model before still sends chunks, after waits of some seconds too.
LINGER_S = 10.0


def together(own: str, adapters: Mapping[str, str]) -> str:
    """An export or version and those of adapters beside it, as one; without adapters it is own."""
    return " ".join([own, *(f"{name}={adapters[name]}" for name in sorted(adapters))])


class Served(BaseModel, frozen=True):
    """An export by its place and its version, which has a hash of its weights.

    adapters: more rewards by name, on the backbone of this one.
    """

    export: str
    version: str
    adapters: dict[str, Served] = {}

    @property
    def pin(self) -> str:
        """What a step is pinned to: one version of every reward."""
        return together(self.version, {name: a.version for name, a in self.adapters.items()})

    @property
    def place(self) -> dict[str, Any]:
        """The fields of a ServeConfig that say where it is."""
        adapters = {name: adapter.export for name, adapter in self.adapters.items()}
        return {"export": self.export, "adapters": adapters}


class Trial(BaseModel, frozen=True):
    """A version that replicas hold beside the current one, and the share of callers it scores.

    Of share 0 it answers nobody: it scores what the current one has answered (a shadow). since:
    seconds since 1970; the same version tried again is another trial.
    """

    served: Served
    share: float
    since: float


class Record(BaseModel):
    """What an application serves. config.export and config.adapters are those of current.

    started: the exports that Serve starts replicas with, though they then load current. staged:
    what replicas load besides, until it becomes current or is tried. previous: what a rollback is
    to.
    """

    config: ServeConfig
    started: str
    current: Served
    staged: Served | None = None
    trial: Trial | None = None
    previous: Served | None = None

    @property
    def wanted(self) -> list[Served]:
        """What every replica is to hold."""
        tried = self.trial and self.trial.served
        return [served for served in (self.current, self.staged, tried) if served]

    def find(self, version: str, caller: str) -> Served | None:
        """What has that version of the own reward; with "" what scores a caller of that name."""
        if not version:
            return self.chosen_for(caller)
        known = [*self.wanted, *([self.previous] if self.previous else [])]
        return next((served for served in known if served.version == version), None)

    def chosen_for(self, caller: str) -> Served:
        """What scores a caller of that name: always the same during a trial."""
        if self.trial is None:
            return self.current
        drawn = hashlib.sha256(f"{self.trial.served.pin} {caller}".encode()).digest()
        share = int.from_bytes(drawn[:8]) / 2**64
        return self.trial.served if share < self.trial.share else self.current


def read_record(app: str) -> Record | None:
    """The application's record. Asks the GCS: a millisecond."""
    found = _internal_kv_get(app.encode(), namespace=NAMESPACE)
    return None if found is None else Record.model_validate_json(found)


def write_record(record: Record) -> None:
    key, value = record.config.app.encode(), record.model_dump_json().encode()
    _internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)


def delete_record(app: str) -> None:
    _internal_kv_del(app.encode(), namespace=NAMESPACE)
    _internal_kv_del(app.encode(), namespace=DTYPES_NAMESPACE)


def decide_dtype(app: str, config: ServeConfig) -> Dtype:
    """What the application computes in: by name, or what its first replica's machine is fast in.

    Of replicas that start at once one decides, and those that come later compute the same: a
    version has one kind of bits. Kept until the record is deleted.
    """
    device = "cuda" if config.gpus_per_replica else "cpu"
    if config.dtype != "auto":
        return config.dtype
    fast = fast_dtype(device)
    at = {"key": app.encode(), "namespace": DTYPES_NAMESPACE}
    _internal_kv_put(**at, value=fast.encode(), overwrite=False)
    decided = cast(Dtype, _internal_kv_get(**at).decode())
    if decided != fast:
        logger.warning(
            f"{app} computes in {decided}, which its first replica decided; this machine is faster "
            f"in {fast}"
        )
    return decided


class Models:
    """The models that a replica holds: what the record wants, and the one before while it is used.

    A model is held by what steps are pinned to: its version and those of its adapters. load makes
    a model of a config, ready to score; it runs beside the current model. tell is told what is
    held, which of it is current, and what is in the shadow, whenever that was compared with what is
    wanted.
    """

    def __init__(
        self,
        app: str,
        config: ServeConfig,
        load: Callable[[ServeConfig], RewardModel],
        tell: Callable[[Collection[RewardModel], RewardModel, Trial | None], None],
    ) -> None:
        self.app = app
        self.config = config
        self.load = load
        self.tell = tell
        self.dtype = decide_dtype(app, config)
        self.held: dict[str, RewardModel] = {}
        self.failed: dict[str, str] = {}
        self._asked: dict[str, float] = {}
        self._changing = threading.Lock()
        self._wake = threading.Event()
        self.shadow: Trial | None = None
        self.current = self._start()
        self.tell(self.held.values(), self.held[self.current], self.shadow)
        threading.Thread(target=self._follow, name="follow", daemon=True).start()

    async def get(self, version: str) -> RewardModel:
        """The model of that version, "" for the current one. Raises VersionGone."""
        version = version or self.current
        if version not in self.held:
            await asyncio.to_thread(self._obtain, version)
        self._asked[version] = time.monotonic()
        return self.held[version]

    def hasten(self) -> None:
        """Compare soon."""
        self._wake.set()

    def compare(self) -> None:
        """Load what the record wants, drop what it does not want and nobody asks for."""
        record = read_record(self.app)
        if record is None:  # the application is being deleted
            return
        with self._changing:
            for served in record.wanted:
                if served.pin not in self.held:
                    self._try(served)
            if record.current.pin in self.held:
                self.current = record.current.pin
            self.shadow = record.trial if record.trial and not record.trial.share else None
            versions = {served.pin for served in record.wanted} | {self.current}
            for version in self.held.keys() - versions:
                if time.monotonic() - self._asked.get(version, 0.0) > LINGER_S:
                    del self.held[version]
                    logger.info(f"dropped version={version}")
            self.failed = {v: why for v, why in self.failed.items() if v in versions}
            self.tell(self.held.values(), self.held[self.current], self.shadow)

    def _obtain(self, version: str) -> None:
        """Hold what is wanted though nobody told this replica yet; what is not wanted is gone."""
        record = read_record(self.app)
        if record and version in {served.pin for served in record.wanted}:
            self.compare()
        if version not in self.held:
            raise VersionGone(f"{version} is not served (any more); {self.current} is")

    def _start(self) -> str:
        """Load what is wanted: by the record, or by a Serve config that came after it."""
        record = read_record(self.app)
        started = together(self.config.export, self.config.adapters)
        if record and record.started == started:
            return self._load(record.current).pin
        served = self._load(None)
        config = self.config.model_copy(update={"app": self.app})
        previous = record.current if record else None
        write_record(Record(config=config, started=started, current=served, previous=previous))
        return served.pin

    def _follow(self) -> None:
        while True:
            self._wake.wait(COMPARE_S)
            self._wake.clear()
            try:
                self.compare()
            except Exception:  # the GCS may be away for a moment: what is held goes on being served
                logger.exception("could not compare with what is wanted")

    def _try(self, served: Served) -> None:
        try:
            self._load(served)
        except Exception as error:
            logger.exception(f"could not load version={served.pin}")
            self.failed[served.pin] = f"{type(error).__name__}: {error}"

    def _load(self, wanted: Served | None) -> Served:
        """Hold what is wanted, by default what the config says; what that is."""
        config = self.config.model_copy(update={"dtype": self.dtype})
        if wanted:
            config = config.model_copy(update=wanted.place)
        started = time.monotonic()
        model = self.load(config)
        served = Served(
            export=config.export,
            version=model.version,
            adapters={
                name: Served(export=config.adapters[name], version=adapter.version)
                for name, adapter in model.adapters.items()
            },
        )
        if wanted and served != wanted:
            raise ExportError(
                f"{config.export} holds {served.pin}, and not {wanted.pin}, which was there when "
                "it was deployed: deploy it again"
            )
        self.held[served.pin] = model
        logger.info(
            f"loaded version={served.pin} dtype={self.dtype} took={time.monotonic() - started:.1f}s"
        )
        return served
