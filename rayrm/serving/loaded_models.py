"""Hold a replica's models: those that the application's record names, and the previous one.

A replica compares itself with the record when it starts and every few seconds. Does not know about
queues.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import cast

from ray.experimental.internal_kv import (
    _internal_kv_get,
    _internal_kv_put,
)

from rayrm.config import OWN
from rayrm.errors import ExportError, VersionGone
from rayrm.model.engine import RewardModel
from rayrm.model.hardware import Dtype, fast_dtype
from rayrm.serving.callers import is_alive
from rayrm.serving.config import ServeConfig
from rayrm.serving.record import (
    DTYPES,
    Record,
    Served,
    Trial,
    change_record,
    pin_of,
    read_record,
    remove_staged,
    rename_version,
)

logger = logging.getLogger("ray.serve")

# Seconds between comparisons with the record; request_compare triggers one at once.
COMPARE_S = 2.0

# Seconds from a replaced model's last use until it is dropped: pinned steps still send chunks, and
# may wait some seconds in between.
LINGER_S = 10.0

# Seconds before a failed load is retried: first pause, doubled each time, and longest pause.
RETRY_S = (COMPARE_S, 60.0)


@dataclass(frozen=True)
class Failure:
    """A model that failed to load.

    why: the error. times: number of failures. again_at: time of the next attempt (time.monotonic).
    """

    why: str
    times: int
    again_at: float


def decide_dtype(app: str, config: ServeConfig) -> Dtype:
    """Return the application's dtype: the configured one, or the fast one on its first replica.

    The first replica decides for all later ones, so that a version gives the same bits on each. The
    decision is kept until the record is deleted.
    """
    device = "cuda" if config.gpus_per_replica else "cpu"
    if config.dtype != "auto":
        return config.dtype
    fast = fast_dtype(device)
    at = {"key": app.encode(), "namespace": DTYPES}
    _internal_kv_put(**at, value=fast.encode(), overwrite=False)
    decided = cast(Dtype, _internal_kv_get(**at).decode())
    if decided != fast:
        logger.warning(
            f"{app} computes in {decided}, as its first replica decided; this machine is faster "
            f"in {fast}"
        )
    return decided


class Models:
    """A replica's loaded models: those of the record, and the previous one while in use.

    held: models by pin (Served.pin). load: loads a config's model, ready to score, while the
    current one keeps scoring. on_change: called after every comparison with the record, with the
    loaded models, the current one, and the shadow's trial or None.
    """

    def __init__(
        self,
        app: str,
        config: ServeConfig,
        load: Callable[[ServeConfig], RewardModel],
        on_change: Callable[[Collection[RewardModel], RewardModel, Trial | None], None],
    ) -> None:
        self.app = app
        self.config = config
        self.load = load
        self.on_change = on_change
        self.dtype = decide_dtype(app, config)
        self.held: dict[str, RewardModel] = {}
        self.failed: dict[str, Failure] = {}
        self._asked: dict[str, float] = {}
        self._changing = threading.Lock()
        self._wake = threading.Event()
        self.shadow: Trial | None = None
        self.record = self._start()
        self.current = self.record.current.pin
        self.model = self.held[self.current]
        self.on_change(self.held.values(), self.model, self.shadow)
        threading.Thread(target=self._follow, name="follow", daemon=True).start()

    async def get(self, version: str) -> RewardModel:
        """Return the model of that version, "" for the current one.

        Raises VersionGone if it is not served, or cannot be loaded for now.
        """
        if not version:
            return self.model
        model = self.held.get(version)
        if model is None:
            model = await asyncio.to_thread(self._obtain, version)
        self._asked[version] = time.monotonic()
        return model

    def compare_soon(self) -> None:
        """Trigger a comparison with the record, without waiting for it."""
        self._wake.set()

    def compare(self) -> None:
        """Load what the record names; drop other models that no step has used lately."""
        with self._changing:
            record = read_record(self.app)
            if record and record.staged and not is_alive(record.staged.owner):
                logger.warning(f"staged={record.staged.served.pin} is removed: its owner died")
                record = change_record(self.app, remove_staged(record.staged))
            if record is None:  # the application is being deleted
                return
            if record != self.record:
                self.failed = {}
            renamed = False
            for served in record.wanted:
                if served.pin not in self.held and not self._paused(served.pin):
                    renamed |= self._try(served)
            if renamed:
                record = read_record(self.app) or record
            self.record = record
            if model := self.held.get(record.current.pin):
                self.current, self.model = record.current.pin, model
            self.shadow = record.trial if record.trial and not record.trial.share else None
            versions = {served.pin for served in record.wanted} | {self.current}
            for version in self.held.keys() - versions:
                if time.monotonic() - self._asked.get(version, 0.0) > LINGER_S:
                    del self.held[version]
                    logger.info(f"dropped version={version}")
            self.on_change(self.held.values(), self.model, self.shadow)

    def _obtain(self, version: str) -> RewardModel:
        """Return the model of a version, loading it if the record names it. Raises VersionGone."""
        record = read_record(self.app)
        if record and version in {served.pin for served in record.wanted}:
            failure = self._paused(version)
            if failure:
                raise VersionGone(f"a replica cannot load {version} for now: {failure.why}")
            self.compare()
        model = self.held.get(version)
        if model is None:
            raise VersionGone(f"{version} is not served (any more); {self.current} is")
        return model

    def _start(self) -> Record:
        """Load what the record names, or what a newer Serve config names; return the record."""
        record = read_record(self.app)
        started = pin_of(self.config.export, self.config.adapters)
        if record is None or record.started != started:
            served = self._load(None)
            record = change_record(self.app, partial(self._started, served))
            assert record is not None
        if record.current.pin not in self.held:
            self._load(record.current)
            record = read_record(self.app) or record  # loading may have renamed a version
        return record

    def _started(self, served: Served, record: Record | None) -> Record:
        """Return the record that the first replica of a Serve config writes."""
        started = pin_of(self.config.export, self.config.adapters)
        if record and record.started == started:  # another replica was first
            return record
        config = self.config.model_copy(update={"app": self.app})
        previous = record and record.before(served)
        return Record(config=config, started=started, current=served, previous=previous)

    def _follow(self) -> None:
        while True:
            self._wake.wait(COMPARE_S)
            self._wake.clear()
            try:
                self.compare()
            except Exception:  # the GCS may be unreachable briefly: keep serving the held models
                logger.exception("could not compare with the record")

    def _try(self, served: Served) -> bool:
        """Load `served`, or note its failure; return whether the record has a new name for it."""
        try:
            return self._load(served) != served
        except Exception as error:
            before = self.failed.get(served.pin)
            times = before.times + 1 if before else 1
            pause = min(RETRY_S[0] * 2 ** (times - 1), RETRY_S[1])
            logger.exception(f"could not load version={served.pin}, retry in {pause:.0f} s")
            why = f"{type(error).__name__}: {error}"
            failure = Failure(why, times, time.monotonic() + pause)
            self.failed = {**self.failed, served.pin: failure}
            return False

    def _paused(self, version: str) -> Failure | None:
        """Return the failure of a version that must not be retried yet, else None."""
        failure = self.failed.get(version)
        return failure if failure and time.monotonic() < failure.again_at else None

    def _load(self, wanted: Served | None) -> Served:
        """Load `wanted`, or what the config names if it is None; return what was loaded.

        Raises ExportError if the export holds another version than `wanted`.
        """
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
        if wanted and served != wanted and is_old_name(model, wanted):
            logger.warning(
                f"{wanted.pin} is called {served.pin} from now on: a version also covers the "
                "tokenizer's files, the chat template and config.json"
            )
            change_record(self.app, rename_version(wanted, served))
        elif wanted and served != wanted:
            raise ExportError(
                f"{config.export} now holds {served.pin}, not {wanted.pin}, which was deployed: "
                "deploy it again"
            )
        self.held[served.pin] = model
        logger.info(
            f"loaded version={served.pin} dtype={self.dtype} took={time.monotonic() - started:.1f}s"
        )
        return served


def is_old_name(model: RewardModel, wanted: Served) -> bool:
    """Return whether an earlier rayrm, which hashed less, gave these weights that version."""
    wanted_by_name = {OWN: wanted, **wanted.adapters}
    return wanted_by_name.keys() == model.rewards.keys() and all(
        reward.export is not None and wanted_by_name[name].version in reward.export.old_versions
        for name, reward in model.rewards.items()
    )
