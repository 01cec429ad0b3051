"""How many replicas an application should have: as many as callers' outstanding tokens need.

Serve's controller runs the policy in its own process, so this module imports nothing of rayrm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

OUTSTANDING = "outstanding_tokens"
"""What each replica reports: tokens of the chunks that it has itself and has not answered."""

WAITING = "waiting_tokens/"
"""And with a step's name behind it: tokens of that step that no replica has yet."""

# How often replicas report, and for how long Serve keeps what they did: it asks them every fifth of
# that. Steps may take seconds, and so must reports that are added up be of about the same time.
REPORT_S = 2.0
LOOK_BACK_S = 5 * REPORT_S


class OutstandingTokens:
    """A Serve autoscaling policy: a replica for every tokens_per_replica that are outstanding.

    Without replicas nobody reports, and a request that waits is answered with one. Until the first
    report, some seconds after a replica started, nothing changes.
    """

    def __init__(self, tokens_per_replica: int) -> None:
        self.tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        if context.current_num_replicas == 0:
            return int(context.total_queued_requests > 0), {}
        outstanding = add_up(context.raw_metrics or {})
        if outstanding is None:
            return context.current_num_replicas, {}
        return math.ceil(outstanding / self.tokens_per_replica), {}


def add_up(reports: Mapping[str, Mapping[Any, Any]]) -> float | None:
    """Tokens that are outstanding, from time series by name and replica; None without a report.

    A chunk is at one replica, so what they have is added. Of a step that waits several have heard,
    and what waits becomes less: the smallest figure is the latest, and counts once. A step that is
    not in a replica's latest report is over there; its series stays for a while.
    """
    of_replica = {r: series[-1] for r, series in reports.get(OUTSTANDING, {}).items() if series}
    if not of_replica:
        return None
    outstanding: float = sum(latest.value for latest in of_replica.values())
    for name, series_of in reports.items():
        if name.startswith(WAITING):
            said = [(of_replica.get(r), series[-1]) for r, series in series_of.items() if series]
            now = [last.value for at, last in said if at and last.timestamp == at.timestamp]
            outstanding += min(now, default=0.0)
    return outstanding
