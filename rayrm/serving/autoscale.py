"""Compute the number of replicas that an application's outstanding tokens need.

Serve's controller runs the policy in its own process, so this module imports nothing of rayrm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

OUTSTANDING = "outstanding_tokens"
"""Key in a replica's report: tokens of the chunks that it holds and has not answered."""

WAITING = "waiting_tokens/"
"""Prefix of keys that end in a step's name: tokens of that step that no replica has admitted."""

# Seconds between reports, and seconds that Serve keeps them; it collects them every fifth of that.
# A step may take only seconds, so reports that are added up must be about equally old.
REPORT_S = 2.0
LOOK_BACK_S = 5 * REPORT_S


class OutstandingTokens:
    """A Serve autoscaling policy: one replica for every tokens_per_replica outstanding tokens.

    Without replicas nothing is reported, so a queued request starts one. Until the first report,
    some seconds after a replica started, the number of replicas stays the same.
    """

    def __init__(self, tokens_per_replica: int) -> None:
        self.tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        if context.current_num_replicas == 0:
            wanted = 1 if context.total_queued_requests > 0 else 0
            return wanted, {}
        outstanding = add_up(context.raw_metrics or {})
        if outstanding is None:
            return context.current_num_replicas, {}
        return math.ceil(outstanding / self.tokens_per_replica), {}


def add_up(reports: Mapping[str, Mapping[Any, Any]]) -> float | None:
    """Add up outstanding tokens from time series by key and replica; None without a report.

    A chunk is at one replica, so the replicas' own tokens are added. Several replicas may report
    the same waiting step, whose tokens only decrease: the smallest figure is the latest, and counts
    once. A step that is missing in a replica's latest report has ended there, although Serve keeps
    its series for a while.
    """
    newest = {r: series[-1] for r, series in reports.get(OUTSTANDING, {}).items() if series}
    if not newest:
        return None
    outstanding: float = sum(report.value for report in newest.values())
    for name, series_by_replica in reports.items():
        if not name.startswith(WAITING):
            continue
        waiting = []
        for replica, series in series_by_replica.items():
            report = newest.get(replica)
            if series and report and series[-1].timestamp == report.timestamp:
                waiting.append(series[-1].value)
        outstanding += min(waiting, default=0.0)
    return outstanding
