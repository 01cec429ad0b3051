"""The cluster's record of the export that an application serves.

The record is stored in the GCS, so it outlives replicas, the controller and the deploying process.
The GCS has no compare-and-swap, so every write uses a new numbered key, and the highest number is
current. Does not know about models.
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

# Format of the records that this version writes. Records of format 1 have no `format` field.
FORMAT = 2

# Keys are NAME/NUMBER in NAMESPACE. In format 1 the key was the name alone, in BEFORE.
NAMESPACE, BEFORE = b"rayrm.records", b"rayrm"
DIGITS = 12

# Namespace of the applications' dtypes, by name; each is written once, by the first replica.
DTYPES = b"rayrm.dtypes"

# Number of older writes that are kept. A writer that is overtaken by more writes than that cannot
# know whether its number is free or was pruned.
KEPT = 32


def pin_of(own: str, adapters: Mapping[str, str]) -> str:
    """Join an export or version with those of its adapters; without adapters, return `own`."""
    return " ".join([own, *(f"{name}={adapters[name]}" for name in sorted(adapters))])


class Served(BaseModel, frozen=True):
    """An export: its location, and its version, which contains a hash of the weights.

    adapters: further rewards by name, on the same backbone.
    """

    export: str
    version: str
    adapters: dict[str, Served] = {}

    @property
    def pin(self) -> str:
        """Return the versions of all rewards as one string, to which a step is pinned."""
        return pin_of(self.version, {name: a.version for name, a in self.adapters.items()})

    @property
    def place(self) -> dict[str, Any]:
        """Return the ServeConfig fields that locate the export and its adapters."""
        adapters = {name: adapter.export for name, adapter in self.adapters.items()}
        return {"export": self.export, "adapters": adapters}


class Trial(BaseModel, frozen=True):
    """A version that replicas hold in addition to the current one, to try it out.

    share: share of the callers that it scores (a canary). With share 0 it answers nobody and scores
    what the current version has answered (a shadow). since: start of the trial, seconds since 1970;
    it distinguishes two trials of the same version.
    """

    served: Served
    share: float
    since: float


class Staged(BaseModel, frozen=True):
    """A version that replicas load in addition to the current one while its owner waits.

    owner: the process that deploys it. id: identifies the deployment, since one owner may stage the
    same version again.
    """

    served: Served
    owner: Caller
    id: str


class Record(BaseModel):
    """The state of an application: what it serves, loads, tries out and can roll back to.

    config: its export and adapters are those of `current`. started: the exports in the arguments
    that Serve starts replicas with; replicas then load `current`. staged: loaded in addition, until
    it becomes current or goes on trial. previous: served again after a rollback.
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
        """Return everything that each replica must load."""
        additional = [extra.served for extra in (self.staged, self.trial) if extra]
        return [self.current, *additional]

    def before(self, served: Served) -> Served | None:
        """Return what a rollback would serve after a switch to `served`."""
        return self.previous if self.current == served else self.current

    def find(self, version: str, caller: str) -> Served | None:
        """Return the Served whose own reward has that version, None if unknown.

        With version "" return the one that scores a caller of that name.
        """
        if not version:
            return self.version_for(caller)
        known = [*self.wanted, *([self.previous] if self.previous else [])]
        return next((served for served in known if served.version == version), None)

    def version_for(self, caller: str) -> Served:
        """Return what scores a caller of that name: always the same during a trial."""
        if self.trial is None:
            return self.current
        digest = hashlib.sha256(f"{self.trial.served.pin} {caller}".encode()).digest()
        position = int.from_bytes(digest[:8]) / 2**64  # of the caller, uniform in [0, 1)
        return self.trial.served if position < self.trial.share else self.current


Change = Callable[[Record | None], Record | None]
"""Maps the present record to the next one; None is no record. May be called several times."""


def read_record(app: str) -> Record | None:
    """Return the application's record, None if it has none. Two GCS requests: a millisecond.

    Raises ServiceError if a newer rayrm has written it.
    """
    return _parse(app, _latest(app)[1])


def change_record(app: str, change: Change) -> Record | None:
    """Write the record that `change` returns, and return it.

    If another process writes first, `change` is called again with the record of that process. If
    `change` raises, nothing is written and the error propagates.
    """
    while True:
        number, found = _latest(app)
        before = _parse(app, found)
        after = change(before)
        if after == before or _write(app, number + 1, after):
            return after


def delete_record(app: str) -> bool:
    """Delete the record, even if a newer rayrm has written it; return whether it existed."""
    while True:
        number, found = _latest(app)
        if not found or _write(app, number + 1, None):
            _internal_kv_del(app.encode(), namespace=DTYPES)
            return bool(found)


def _parse(app: str, written: bytes) -> Record | None:
    if not written:
        return None
    values = json.loads(written)
    format = values.setdefault("format", 1)
    if format > FORMAT:
        raise ServiceError(
            f"application {app!r} has a record of format {format}, and this rayrm reads formats up "
            f"to {FORMAT}: use the rayrm that deployed it, or a newer one"
        )
    if format == 1:
        values |= {"format": FORMAT, "staged": None}  # without an owner it would stay staged
    return Record.model_validate(values)


def _latest(app: str) -> tuple[int, bytes]:
    """Return the highest number written and its value; number 0 for a record of format 1.

    The value b"" is no record: it was never written, or deleted, after which the numbers go on.
    """
    while True:
        numbers = _numbers(app)
        if not numbers:
            return 0, _internal_kv_get(app.encode(), namespace=BEFORE) or b""
        found = _internal_kv_get(_key(app, max(numbers)), namespace=NAMESPACE)
        if found is not None:  # None: it was pruned, so higher numbers exist
            return max(numbers), found


def _write(app: str, number: int, record: Record | None) -> bool:
    """Write the record under that number; return False if another process may have been first."""
    key = _key(app, number)
    value = record.model_dump_json().encode() if record else b""
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


def remove_staged(staged: Staged) -> Change:
    """Return a change that removes `staged` if it is still staged."""

    def change(record: Record | None) -> Record | None:
        if record is None or record.staged is None or record.staged.id != staged.id:
            return record
        return record.model_copy(update={"staged": None})

    return change


def rename_version(old: Served, new: Served) -> Change:
    """Return a change that replaces a version by its new name wherever the record has it."""

    def change(record: Record | None) -> Record | None:
        if record is None:
            return None
        updates: dict[str, Any] = {}
        if record.current == old:
            updates["current"] = new
        if record.previous == old:
            updates["previous"] = new
        if record.staged and record.staged.served == old:
            updates["staged"] = record.staged.model_copy(update={"served": new})
        if record.trial and record.trial.served == old:
            updates["trial"] = record.trial.model_copy(update={"served": new})
        return record.model_copy(update=updates)

    return change
