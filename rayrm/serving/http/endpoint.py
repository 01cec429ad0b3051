"""The HTTP endpoint: the ingress of the Serve application.

Turns JSON into rows, sends them to the replicas as a client does, and turns rewards into JSON; each
protocol's bodies are defined in its own file. Does not know about packs or weights.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_serve_request_context
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as StarletteHTTPException

import rayrm
from rayrm.config import OWN
from rayrm.errors import RowError, ServiceError, UnknownReward, VersionGone
from rayrm.rows import Rewards, Row
from rayrm.serving.callers import this_caller
from rayrm.serving.client import RewardClient, ScoredStep
from rayrm.serving.config import ServeConfig
from rayrm.serving.http import openrlhf
from rayrm.serving.http.failures import (
    REFUSALS,
    on_http_error,
    on_invalid_request,
    on_service_error,
    refuse,
)
from rayrm.serving.http.guard import RequestGuard, read_token
from rayrm.serving.http.openrlhf import RewardRequest, RewardResponse
from rayrm.serving.http.score import (
    Body,
    NamedScoreResponse,
    ScoreRequest,
    ScoreResponse,
    respond,
)
from rayrm.serving.locate import load_served_template
from rayrm.serving.record import Served, read_record
from rayrm.serving.sending import backoff
from rayrm.text.template import Template

# Seconds in which a replica must answer /health, for the load balancer's sake.
HEALTH_SECONDS = 5.0

# Seconds without progress after which a request is refused, to be sent again.
PATIENCE_S = 5.0


class Health(Body):
    version: str
    """The version that a replica serves."""


@serve.ingress()
class Endpoint:
    """The ingress that answers HTTP requests by calling replicas through a handle."""

    def __init__(self, config: ServeConfig, replicas: DeploymentHandle[Any]) -> None:
        self.config = config
        self.app_name = serve.get_replica_context().app_name
        self.client = RewardClient(self.app_name)
        self.replicas = replicas
        self._templates: dict[str, Template] = {}
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")  # keeps the loop free for /health
        # An unreadable template fails at start; a changed one only refuses /get_reward.
        with suppress(ServiceError):
            self._template_for("")

    def __serve_build_asgi_app__(self) -> FastAPI:
        token = read_token(self.config.http)
        app = FastAPI(title="rayrm", version=rayrm.__version__)
        # Only documents the token: RequestGuard checks it.
        bearer = [Depends(HTTPBearer(auto_error=False))] if token else []
        app.post("/score", dependencies=bearer, responses=REFUSALS)(self.score)
        app.post("/get_reward", dependencies=bearer, responses=REFUSALS)(self.get_reward)
        app.get("/health", responses={503: REFUSALS[503]})(self.health)
        app.add_exception_handler(StarletteHTTPException, on_http_error)
        app.add_exception_handler(RequestValidationError, on_invalid_request)
        app.add_exception_handler(ServiceError, on_service_error)
        app.add_exception_handler(UnknownReward, on_service_error)
        app.add_middleware(RequestGuard, token=token, max_bytes=self.config.http.max_bytes)
        return app

    async def score(self, request: ScoreRequest) -> ScoreResponse | NamedScoreResponse:
        """Score rows, each a prompt and a response. A bad row gets an error, the others rewards."""
        self._check_count(len(request.rows))
        rewards, version = await self._score(
            request.to_rows(),
            request.tokenizer,
            caller=caller_name(request.caller),
            rewards=request.rewards or (OWN,),
            version=request.version,
            step=request.step,
            part=f"{request.part}." if request.part else "",
            outstanding=request.outstanding,
        )
        return respond(rewards, version, named=request.rewards is not None)

    async def get_reward(self, request: RewardRequest) -> RewardResponse:
        """Score queries as OpenRLHF's remote reward model. One bad row fails the whole request."""
        self._check_count(len(request.query))
        if len(request.query) != len(request.prompts):
            raise HTTPException(
                422,
                f"{len(request.query)} queries, {len(request.prompts)} prompts: send one prompt "
                "for each query",
            )
        return openrlhf.respond(await self._score_queries(request))

    async def health(self) -> Health:
        """Return the served version, or 503 if no replica answers."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                stats = await self.replicas.stats.remote()
        except (TimeoutError, RayError, RayServeException) as error:
            # Without its text, which would show processes, addresses and log files to anyone.
            raise ServiceError(f"no replica answers: {type(error).__name__}") from None
        return Health(version=stats["version"])

    def _check_count(self, rows: int) -> None:
        most = self.config.http.max_rows
        if rows > most:
            raise HTTPException(413, f"{rows} rows: a request has at most {most} (http.max_rows)")

    async def _score_queries(self, request: RewardRequest) -> Rewards:
        """Return the queries' rewards by the version whose template made their rows.

        Raises VersionGone if the served version keeps changing for PATIENCE_S seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.client.timeout_s
        caller = caller_name()
        attempts = 0
        waited_s = 0.0
        while True:
            build = partial(self._read_queries, request, caller)
            version, tokenizer, rows, errors = await loop.run_in_executor(self._tokenizing, build)
            refuse(errors)
            try:
                scored = await self._score(
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

    def _read_queries(
        self, request: RewardRequest, caller: str
    ) -> tuple[str, str, list[Row], dict[int, RowError]]:
        """Return version, fingerprint of its template, rows, and errors by index of the query."""
        version, template = self._template_for(caller)
        rows, errors = openrlhf.read_rows(template, request.query, request.prompts)
        return version, template.spec.fingerprint, rows, errors

    def _template_for(self, caller: str) -> tuple[str, Template]:
        """Return the version that scores a caller of that name, and its template."""
        record = read_record(self.app_name)
        served = (
            record.version_for(caller) if record else Served(export=self.config.export, version="")
        )
        if served.version not in self._templates:
            template = load_served_template(served, self.config.max_length)
            wanted = {other.version for other in record.wanted} if record else set()
            kept = {version: t for version, t in self._templates.items() if version in wanted}
            self._templates = {**kept, served.version: template}
        return served.version, self._templates[served.version]

    async def _score(
        self,
        rows: list[Row],
        tokenizer: str | None,
        *,
        caller: str,
        step: str | None = None,
        **options: Any,
    ) -> ScoredStep:
        """Score rows as a step of the request's client."""
        endpoint = await asyncio.to_thread(this_caller)
        return await self.client.score_rows(
            rows,
            tokenizer,
            caller=replace(endpoint, name=caller),
            patience_s=PATIENCE_S,
            id=step or _get_serve_request_context().request_id,
            **options,
        )


def caller_name(own: str = "") -> str:
    """Return the caller's name for queues, logs and trials: the client's address, and `own`."""
    address = _get_serve_request_context()._client.rpartition(":")[0]
    return " ".join(part for part in ("http", address, own) if part)
