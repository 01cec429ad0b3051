"""Which export an application serves: the cluster's record of it.

The record lies in the GCS, so that it outlives replicas, the controller and whoever deployed. The
GCS has no compare-and-swap, so every write is a new key, and the highest counts. Knows nothing of
models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from rayrm.errors import ServiceError
from rayrm.serving.config import ServeConfig
from rayrm.serving.ticket import Caller

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


def pin_of(own: str, adapters: Mapping[str, str]) -> str:
    """Join an export or version with those of the adapters beside it; without any it is own."""
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
        return pin_of(self.version, {name: a.version for name, a in self.adapters.items()})

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
        """What every replica has to load."""
        beside = [other.served for other in (self.staged, self.trial) if other]
        return [self.current, *beside]

    def before(self, served: Served) -> Served | None:
        """Return what a rollback would serve after a switch to that."""
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
    """Return a change that removes that staging, unless it is gone already."""

    def change(record: Record | None) -> Record | None:
        mine = record and record.staged == staged
        return record.model_copy(update={"staged": None}) if record and mine else record

    return change


def renamed(old: Served, new: Served) -> Change:
    """Return a change that renames a version wherever the record has it."""

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
