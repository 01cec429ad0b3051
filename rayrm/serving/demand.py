"""Count outstanding tokens by step, as far as a replica knows.

A replica counts exactly the chunks that it has. Of what waits for room at no replica it hears in
the tickets of chunks that come, and others hear the same: that is kept and reported by step, so
that replicas' figures can be added up. Knows nothing of models, or of whether callers live.
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

# How long what a ticket said of other chunks is believed. Its caller may have given up, or another
# replica may have answered them; chunks that still wait for room knock sooner.
HEARD_S = 3.0

# So many steps are reported by name, those of which most waits: as many as a replica has calls.
NAMED = 1024

_Key = tuple[Caller, str]


class Wanted(NamedTuple):
    """Outstanding tokens, from which a replica's queue sets its limits.

    own: those here of steps in one chunk, which no other replica will get. share: this replica's
    part of the other steps, inf where it is alone and need not leave any to others. outstanding:
    all that have no answer.
    """

    own: int
    share: float
    outstanding: int


@dataclass
class _StepDemand:
    """Tokens of a step, about: without an answer, waiting for room at no replica, and here.

    spread: other replicas may know of the step too. heard: when a chunk last came or left.
    """

    outstanding: int = 0
    waiting: int = 0
    here: int = 0
    replicas: int = 1
    spread: bool = False
    heard: float = 0.0


class Demand:
    """The steps that a replica has chunks of, or of which a ticket spoke lately."""

    def __init__(self) -> None:
        self._steps: dict[_Key, _StepDemand] = {}

    @contextmanager
    def chunk(self, ticket: Ticket, tokens: int) -> Iterator[None]:
        """Count a chunk as here until the block is left; how that happens says what remains."""
        key = ticket.caller, ticket.step
        step = self._hear(key, ticket, tokens)
        try:
            yield
        except Overloaded:  # the chunk goes on waiting, and may get in elsewhere
            step.waiting += tokens
            step.spread = True
            raise
        except BaseException:  # cancelled, or failed as a whole: nobody waits for its other chunks
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
        """Return what callers want of this replica now."""
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
        """Return what the autoscaling policy adds up: tokens here, and waiting tokens by step.

        A step that does not wait any more is named too: others may have heard that it does.
        """
        here = sum(step.here for step in self._known())
        spread = [(step.waiting, key) for key, step in self._steps.items() if step.spread]
        most = sorted(spread, key=lambda of: of[0], reverse=True)[:NAMED]
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
        """Steps with a chunk here, and those that were heard of lately; others are forgotten."""
        since = _now() - HEARD_S
        steps = self._steps.items()
        self._steps = {key: step for key, step in steps if step.here or step.heard > since}
        return list(self._steps.values())


def _name(key: _Key) -> str:
    """Of a step: the same at every replica, and short, whatever callers call it and themselves."""
    return blake2b(repr(key).encode(), digest_size=8).hexdigest()


def _now() -> float:
    return asyncio.get_running_loop().time()
