"""Which export an application serves: the cluster's record of it, and the models of a replica.

The record lies in the GCS, so that it outlives replicas, the controller and whoever deployed. The
GCS has no compare-and-swap, so every write is a new key, and the highest counts. A replica compares
itself with it when it starts and every few seconds. Knows nothing of queues.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from urllib.parse import quote

from pydantic import BaseModel
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from rayrm.callers import Caller, lives
from rayrm.config import OWN, ServeConfig
from rayrm.engine import RewardModel
from rayrm.errors import ExportError, ServiceError, VersionGone
from rayrm.hardware import Dtype, fast_dtype

logger = logging.getLogger("ray.serve")

# Of records as they are written now. Format 1 had no field that said so.
FORMAT = 2

# Keys are NAME/NUMBER; in format 1 an application's name alone, under BEFORE.
NAMESPACE, BEFORE = b"rayrm.records", b"rayrm"
DIGITS = 12

# What an application computes in, by its name: written once, by its first replica.
DTYPES = b"rayrm.dtypes"

# So many older writes stay. Who waits while more than that are made cannot tell whether the next
# number is free or was pruned.
KEPT = 32

# How often a replica compares itself with the record; being told to is only faster.
COMPARE_S = 2.0

# A step that is pinned to the model before still sends chunks, after waits of some seconds too.
LINGER_S = 10.0

# Seconds until a model that could not be loaded is tried again, doubled each time up to the second.
RETRY_S = (COMPARE_S, 60.0)


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


class Staged(BaseModel, frozen=True):
    """A version that replicas load beside the current one, for as long as its owner waits for that.

    id: of the deployment, since one owner may stage the same version again.
    """

    served: Served
    owner: Caller
    id: str


class Record(BaseModel):
    """What an application serves. config.export and config.adapters are those of current.

    started: the exports that Serve starts replicas with, though they then load current. staged:
    what replicas load besides, until it becomes current or is tried. previous: what a rollback
    serves again.
    """

    format: int = FORMAT
    config: ServeConfig
    started: str
    current: Served
    staged: Staged | None = None
    trial: Trial | None = None
    previous: Served | None = None

    @property
    def wanted(self) -> list[Served]:
        """What every replica is to hold."""
        beside = [other.served for other in (self.staged, self.trial) if other]
        return [self.current, *beside]

    def before(self, served: Served) -> Served | None:
        """What a rollback serves again once that is current."""
        return self.previous if self.current == served else self.current

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


Change = Callable[[Record | None], Record | None]
"""What is there → what is to be there; None where there is no record. May be called again."""


def read_record(app: str) -> Record | None:
    """The application's record. Asks the GCS twice: a millisecond.

    Raises ServiceError where a newer rayrm has written it.
    """
    return _parse(app, _latest(app)[1])


def change_record(app: str, change: Change) -> Record | None:
    """Write what change makes of the record, and return it.

    If somebody else was first, change decides again by what they have written. What it raises ends
    that, and nothing is written.
    """
    while True:
        number, found = _latest(app)
        before = _parse(app, found)
        after = change(before)
        if after == before or _write(app, number + 1, after):
            return after


def delete_record(app: str) -> bool:
    """Forget the record, also one that a newer rayrm has written; whether there was one."""
    while True:
        number, found = _latest(app)
        if not found or _write(app, number + 1, None):
            _internal_kv_del(app.encode(), namespace=DTYPES)
            return bool(found)


def _parse(app: str, written: bytes) -> Record | None:
    if not written:
        return None
    values = json.loads(written)
    if (format := values.setdefault("format", 1)) > FORMAT:
        raise ServiceError(
            f"application {app!r} has a record of format {format}, and this rayrm knows formats up "
            f"to {FORMAT}: use the rayrm that deployed it, or a newer one"
        )
    if format == 1:
        values |= {"format": FORMAT, "staged": None}  # it had no owner, and so no end
    return Record.model_validate(values)


def _latest(app: str) -> tuple[int, bytes]:
    """The highest number that was written, and what; 0 where it was written before format 2.

    b"" is no record: it was deleted, so that numbers go on, or never written.
    """
    while True:
        if not (numbers := _numbers(app)):
            return 0, _internal_kv_get(app.encode(), namespace=BEFORE) or b""
        found = _internal_kv_get(_key(app, max(numbers)), namespace=NAMESPACE)
        if found is not None:  # else it was pruned, so there are higher ones
            return max(numbers), found


def _write(app: str, number: int, record: Record | None) -> bool:
    """Whether that number was free and what is written under it is the latest, for a while."""
    key, value = _key(app, number), record.model_dump_json().encode() if record else b""
    taken = _internal_kv_put(key, value, overwrite=False, namespace=NAMESPACE)
    if taken and _internal_kv_get(key, namespace=NAMESPACE) != value:
        return False
    numbers = _numbers(app)
    if max(numbers) > number + KEPT:
        return False
    for old in numbers:
        if old < number - KEPT:
            _internal_kv_del(_key(app, old), namespace=NAMESPACE)
    if number > KEPT:
        _internal_kv_del(app.encode(), namespace=BEFORE)
    return True


def _numbers(app: str) -> list[int]:
    keys = _internal_kv_list(_prefix(app), namespace=NAMESPACE)
    return [int(key[-DIGITS:]) for key in keys]


def _key(app: str, number: int) -> bytes:
    return _prefix(app) + f"{number:0{DIGITS}d}".encode()


def _prefix(app: str) -> bytes:
    return quote(app, safe="").encode() + b"/"


def unstaged(staged: Staged) -> Change:
    """Takes that away, unless it has been taken away already."""

    def change(record: Record | None) -> Record | None:
        mine = record and record.staged == staged
        return record.model_copy(update={"staged": None}) if record and mine else record

    return change


def renamed(old: Served, new: Served) -> Change:
    """Calls what is served by another version, wherever the record has it."""

    def change(record: Record | None) -> Record | None:
        if record is None:
            return None
        named = {of: new for of in ("current", "previous") if getattr(record, of) == old}
        beside = {
            of: place.model_copy(update={"served": new})
            for of, place in (("staged", record.staged), ("trial", record.trial))
            if place and place.served == old
        }
        return record.model_copy(update={**named, **beside})

    return change


@dataclass(frozen=True)
class Failure:
    """Why a model could not be loaded, how often, and when it is tried again (time.monotonic)."""

    why: str
    times: int
    again_at: float


def decide_dtype(app: str, config: ServeConfig) -> Dtype:
    """What the application computes in: by name, or what its first replica's machine is fast in.

    Of replicas that start at once one decides, and those that come later compute the same: a
    version has one kind of bits. Kept until the record is deleted.
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
        self.failed: dict[str, Failure] = {}
        self._asked: dict[str, float] = {}
        self._changing = threading.Lock()
        self._wake = threading.Event()
        self.shadow: Trial | None = None
        self.record = self._start()
        self.current = self.record.current.pin
        self.model = self.held[self.current]
        self.tell(self.held.values(), self.model, self.shadow)
        threading.Thread(target=self._follow, name="follow", daemon=True).start()

    async def get(self, version: str) -> RewardModel:
        """The model of that version, "" for the current one. Raises VersionGone."""
        if not version:
            return self.model
        if (model := self.held.get(version)) is None:
            model = await asyncio.to_thread(self._obtain, version)
        self._asked[version] = time.monotonic()
        return model

    def hasten(self) -> None:
        """Compare soon."""
        self._wake.set()

    def compare(self) -> None:
        """Load what the record wants, drop what it does not want and nobody asks for."""
        with self._changing:
            record = read_record(self.app)
            if record and record.staged and not lives(record.staged.owner):
                logger.warning(f"staged={record.staged.served.pin} is nobody's: its owner died")
                record = change_record(self.app, unstaged(record.staged))
            if record is None:  # the application is being deleted
                return
            if record != self.record:
                self.failed = {}
            self.record = record
            for served in record.wanted:
                if served.pin not in self.held and not self._paused(served.pin):
                    self._try(served)
            if model := self.held.get(record.current.pin):
                self.current, self.model = record.current.pin, model
            self.shadow = record.trial if record.trial and not record.trial.share else None
            versions = {served.pin for served in record.wanted} | {self.current}
            for version in self.held.keys() - versions:
                if time.monotonic() - self._asked.get(version, 0.0) > LINGER_S:
                    del self.held[version]
                    logger.info(f"dropped version={version}")
            self.tell(self.held.values(), self.model, self.shadow)

    def _obtain(self, version: str) -> RewardModel:
        """Hold what is wanted though nobody told this replica yet; what is not wanted is gone."""
        record = read_record(self.app)
        if record and version in {served.pin for served in record.wanted}:
            if failure := self._paused(version):
                raise VersionGone(f"a replica cannot load {version} for now: {failure.why}")
            self.compare()
        if (model := self.held.get(version)) is None:
            raise VersionGone(f"{version} is not served (any more); {self.current} is")
        return model

    def _start(self) -> Record:
        """Load what is wanted: by the record, or by a Serve config that came after it."""
        record, own = read_record(self.app), together(self.config.export, self.config.adapters)
        if record is None or record.started != own:
            served = self._load(None)
            record = change_record(self.app, partial(self._started, served))
            assert record is not None
        if record.current.pin not in self.held:
            self._load(record.current)
            record = read_record(self.app) or record  # which may have got a new name
        return record

    def _started(self, served: Served, record: Record | None) -> Record:
        """The record where Serve starts replicas with what this one was started with."""
        started = together(self.config.export, self.config.adapters)
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
            except Exception:  # the GCS may be away for a moment: what is held goes on being served
                logger.exception("could not compare with what is wanted")

    def _try(self, served: Served) -> None:
        try:
            self._load(served)
        except Exception as error:
            before = self.failed.get(served.pin)
            times = before.times + 1 if before else 1
            pause = min(RETRY_S[0] * 2 ** (times - 1), RETRY_S[1])
            logger.exception(f"could not load version={served.pin}, again in {pause:.0f} s")
            why = f"{type(error).__name__}: {error}"
            failure = Failure(why, times, time.monotonic() + pause)
            self.failed = {**self.failed, served.pin: failure}

    def _paused(self, version: str) -> Failure | None:
        """Why that is not tried yet."""
        failure = self.failed.get(version)
        return failure if failure and time.monotonic() < failure.again_at else None

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
        if wanted and served != wanted and known_before(model, wanted):
            logger.warning(
                f"{wanted.pin} is called {served.pin} from now on: a version names the chat "
                "template and the tokenizer's files as well"
            )
            change_record(self.app, renamed(wanted, served))
        elif wanted and served != wanted:
            raise ExportError(
                f"{config.export} holds {served.pin}, and not {wanted.pin}, which was there when "
                "it was deployed: deploy it again"
            )
        self.held[served.pin] = model
        logger.info(
            f"loaded version={served.pin} dtype={self.dtype} took={time.monotonic() - started:.1f}s"
        )
        return served


def known_before(model: RewardModel, wanted: Served) -> bool:
    """Whether that is how versions were called before they named more than weights and format."""
    named = {OWN: wanted, **wanted.adapters}
    return named.keys() == model.rewards.keys() and all(
        of.export is not None and named[name].version in of.export.old_versions
        for name, of in model.rewards.items()
    )
