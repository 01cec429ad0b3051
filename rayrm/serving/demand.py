"""Count outstanding tokens by step, as far as a replica knows.

A replica counts the chunks that it holds exactly. Of chunks that no replica holds it learns from
tickets of the same step, and so do other replicas: these counts are kept and reported by step, so
that replicas' reports can be added up. Does not know about models, or whether callers are alive.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from rayrm.errors import Overloaded
from rayrm.serving.autoscale import OUTSTANDING, WAITING
from rayrm.serving.ticket import Caller, Ticket

# Seconds until a ticket's counts of other chunks expire: the caller may have given up, or another
# replica may have answered them. Chunks that still wait for room are resent sooner.
HEARD_S = 3.0

# Maximum number of steps in a report, those with the most waiting tokens; a replica holds no more
# calls than that.
NAMED = 1024

_Key = tuple[Caller, str]


class Wanted(NamedTuple):
    """Outstanding tokens, from which a replica's queue sets its limits.

    own: tokens of steps that this replica holds entirely, so no other replica will get them. share:
    this replica's part of the other steps, inf if it is the only replica. outstanding: all that
    have no answer and are in flight at no other replica.
    """

    own: int
    share: float
    outstanding: int


@dataclass
class _StepDemand:
    """Approximate tokens of a step, as far as known.

    outstanding: without an answer. waiting: in flight at no replica. here: in flight at this one.
    replicas: number that share the step. spread: other replicas may report the step too. heard:
    time of a chunk's latest arrival or departure (event loop clock).
    """

    outstanding: int = 0
    waiting: int = 0
    here: int = 0
    replicas: int = 1
    spread: bool = False
    heard: float = 0.0


class Demand:
    """The steps that a replica holds chunks of, or has recently had a ticket of."""

    def __init__(self) -> None:
        self._steps: dict[_Key, _StepDemand] = {}

    @contextmanager
    def chunk(self, ticket: Ticket, tokens: int) -> Iterator[None]:
        """Count a chunk as here until the block is left.

        The exception that leaves the block, if any, decides what still waits elsewhere.
        """
        key = ticket.caller, ticket.step
        step = self._hear(key, ticket, tokens)
        try:
            yield
        except Overloaded:  # the chunk keeps waiting, and another replica may admit it
            step.waiting += tokens
            step.spread = True
            raise
        except BaseException:  # the step failed or was cancelled: its other chunks are not resent
            step.waiting = 0
            raise
        finally:
            step.here -= tokens
            step.heard = _now()
            if not step.here and not step.waiting:
                step.outstanding = 0
                if not step.spread and self._steps.get(key) is step:
                    del self._steps[key]

    def wanted(self) -> Wanted:
        """Return the tokens that are outstanding now."""
        own, share, outstanding, since = 0, 0.0, 0, _now() - HEARD_S
        for step in self._known():
            outstanding += step.here + step.waiting
            if step.replicas == 1:
                share = math.inf
            elif step.here == step.outstanding:
                own += step.here
            else:
                left = step.outstanding if step.heard > since else step.here
                share += left / step.replicas
        return Wanted(own, share, outstanding)

    def report(self) -> dict[str, float]:
        """Return tokens here and waiting tokens by step; the autoscaling policy adds them up.

        Includes steps of which nothing waits any more: other replicas may report an older count.
        """
        here = sum(step.here for step in self._known())
        spread = [(step.waiting, key) for key, step in self._steps.items() if step.spread]
        most = sorted(spread, key=lambda entry: entry[0], reverse=True)[:NAMED]
        waiting = {WAITING + _name(key): float(tokens) for tokens, key in most}
        return {OUTSTANDING: float(here), **waiting}

    def _hear(self, key: _Key, ticket: Ticket, tokens: int) -> _StepDemand:
        step = self._steps.setdefault(key, _StepDemand())
        step.outstanding, step.waiting = ticket.outstanding, ticket.waiting
        step.replicas = ticket.replicas
        step.spread |= ticket.spread
        step.here += tokens
        step.heard = _now()
        return step

    def _known(self) -> list[_StepDemand]:
        """Return steps with a chunk here or a recent ticket; forget the others."""
        since = _now() - HEARD_S
        steps = self._steps.items()
        self._steps = {key: step for key, step in steps if step.here or step.heard > since}
        return list(self._steps.values())


def _name(key: _Key) -> str:
    """Return a step's short name, the same at every replica: a hash of caller and step id."""
    return blake2b(repr(key).encode(), digest_size=8).hexdigest()


def _now() -> float:
    return asyncio.get_running_loop().time()
