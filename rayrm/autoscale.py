"""How many replicas an application should have: as many as callers' outstanding tokens need.

Serve's controller runs the policy in its own process, so this module imports nothing of rayrm.
"""

from __future__ import annotations

import math
from typing import Any

OUTSTANDING = "outstanding_tokens"
"""What each replica reports: tokens of all callers' steps that have no reward yet."""


class OutstandingTokens:
    """A Serve autoscaling policy: a replica for every tokens_per_replica that are outstanding.

    Every replica hears of every caller, but not of all at the same time: the one that knows of most
    counts. Without replicas nobody reports, and a request that waits is answered with one. Until
    the first report, some seconds after a replica started, nothing changes.
    """

    def __init__(self, tokens_per_replica: int) -> None:
        self.tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        if context.current_num_replicas == 0:
            return int(context.total_queued_requests > 0), {}
        reports = (context.raw_metrics or {}).get(OUTSTANDING, {}).values()
        latest = [series[-1].value for series in reports if series]
        outstanding = max(latest, default=context.current_num_replicas * self.tokens_per_replica)
        return math.ceil(outstanding / self.tokens_per_replica), {}
