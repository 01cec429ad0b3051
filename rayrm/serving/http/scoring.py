"""Score what an HTTP request asks for, as a client of the replicas.

Each protocol has its own file, which reads rows from its requests and writes answers. Does not know
about protocols.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict
from ray.serve.context import _get_serve_request_context

from rayrm.config import OWN
from rayrm.errors import RowError, VersionGone
from rayrm.rows import Rewards, Row
from rayrm.serving.callers import this_caller
from rayrm.serving.client import RewardClient, ScoredStep
from rayrm.serving.config import ServeConfig
from rayrm.serving.http.failures import refuse
from rayrm.serving.locate import load_served_template
from rayrm.serving.record import Served, read_record
from rayrm.serving.sending import backoff
from rayrm.text.template import Template

# Seconds without progress after which a request is refused, to be sent again.
PATIENCE_S = 5.0

Read = Callable[[Template], tuple[list[Row], dict[int, RowError]]]
"""Returns a request's rows as a template builds them, and the errors of others by index."""


class Body(BaseModel):
    """A body of a request or an answer; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Scoring:
    """Scores rows, and sampled text, for the requests of all protocols."""

    def __init__(self, app: str, config: ServeConfig) -> None:
        self.app = app
        self.config = config
        self.client = RewardClient(app)
        self._templates: dict[str, Template] = {}
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")  # keeps the loop free for /health

    def check_count(self, rows: int) -> None:
        """Raise HTTPException 413 if a request has too many rows."""
        most = self.config.http.max_rows
        if rows > most:
            raise HTTPException(413, f"{rows} rows: a request has at most {most} (http.max_rows)")

    async def score_rows(
        self,
        rows: list[Row],
        tokenizer: str | None,
        *,
        caller: str,
        step: str | None = None,
        **options: Any,
    ) -> ScoredStep:
        """Score rows as a step of the request's client; options: see RewardClient.score_rows."""
        endpoint = await asyncio.to_thread(this_caller)
        return await self.client.score_rows(
            rows,
            tokenizer,
            caller=replace(endpoint, name=caller),
            patience_s=PATIENCE_S,
            id=step or _get_serve_request_context().request_id,
            **options,
        )

    async def score_sampled(self, read: Read) -> Rewards:
        """Return the rewards of sampled text by the version whose template made its rows.

        `read` runs in a thread. Raises HTTPException 422 if a row has no reward, VersionGone if the
        served version keeps changing for PATIENCE_S seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.client.timeout_s
        caller = caller_name()
        attempts = 0
        waited_s = 0.0
        while True:
            version, tokenizer, rows, errors = await loop.run_in_executor(
                self._tokenizing, self._read, read, caller
            )
            refuse(errors)
            try:
                scored = await self.score_rows(
                    rows,
                    tokenizer,
                    caller=caller,
                    version=version,
                    timeout_s=deadline - loop.time(),
                )
            except VersionGone:
                attempts += 1
                wait = backoff(attempts)
                waited_s += wait
                if waited_s > PATIENCE_S:
                    raise
                await asyncio.sleep(wait)
                continue
            rewards = scored.rewards[OWN]
            refuse({i: error for i, error in enumerate(rewards.errors) if error is not None})
            return rewards

    def _read(self, read: Read, caller: str) -> tuple[str, str, list[Row], dict[int, RowError]]:
        """Return version, fingerprint of its template, rows, and errors by index."""
        version, template = self.template_for(caller)
        rows, errors = read(template)
        return version, template.spec.fingerprint, rows, errors

    def template_for(self, caller: str) -> tuple[str, Template]:
        """Return the version that scores a caller of that name, and its template.

        Raises ServiceError if the export's files have changed since it was deployed.
        """
        record = read_record(self.app)
        served = (
            record.version_for(caller) if record else Served(export=self.config.export, version="")
        )
        if served.version not in self._templates:
            template = load_served_template(served, self.config.max_length)
            wanted = {other.version for other in record.wanted} if record else set()
            kept = {version: t for version, t in self._templates.items() if version in wanted}
            self._templates = {**kept, served.version: template}
        return served.version, self._templates[served.version]


def caller_name(own: str = "") -> str:
    """Return the caller's name for queues, logs and trials: the client's address, and `own`."""
    address = _get_serve_request_context()._client.rpartition(":")[0]
    return " ".join(part for part in ("http", address, own) if part)
