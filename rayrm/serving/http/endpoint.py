"""The HTTP endpoint: the ingress of the Serve application.

Turns JSON into rows, passes them to the replicas as a client does, and turns rewards into JSON; a
protocol's shapes are in a file of its own. Knows nothing of packs or weights.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
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
from rayrm.model.foreign import open_template
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
from rayrm.serving.record import Served, read_record
from rayrm.serving.sending import backoff
from rayrm.text.template import Template

# A replica that has not said anything by then is no use to a load balancer.
HEALTH_SECONDS = 5.0

# A caller whose request got nothing done for so long is told to come back.
PATIENCE_S = 5.0


class Health(Body):
    version: str
    """The model that a replica serves."""


@serve.ingress()
class Endpoint:
    """Answers HTTP for the replicas behind a handle."""

    def __init__(self, config: ServeConfig, replicas: DeploymentHandle[Any]) -> None:
        self.config = config
        self.app_name = serve.get_replica_context().app_name
        self.client = RewardClient(self.app_name)
        self.replicas = replicas
        self._templates: dict[str, Template] = {}
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")  # the loop stays free for /health
        self._template_for("")  # what fails, fails now

    def __serve_build_asgi_app__(self) -> FastAPI:
        token = read_token(self.config.http)
        app = FastAPI(title="rayrm", version=rayrm.__version__)
        asked = [Depends(HTTPBearer(auto_error=False))] if token else []  # for the docs only
        app.post("/score", dependencies=asked, responses=REFUSALS)(self.score)
        app.post("/get_reward", dependencies=asked, responses=REFUSALS)(self.get_reward)
        app.get("/health", responses={503: REFUSALS[503]})(self.health)
        app.add_exception_handler(StarletteHTTPException, on_http_error)
        app.add_exception_handler(RequestValidationError, on_invalid_request)
        app.add_exception_handler(ServiceError, on_service_error)
        app.add_exception_handler(UnknownReward, on_service_error)
        app.add_middleware(RequestGuard, token=token, max_bytes=self.config.http.max_bytes)
        return app

    async def score(self, request: ScoreRequest) -> ScoreResponse | NamedScoreResponse:
        """Rewards of rows, each a prompt and a response; a bad row gets an error of its own."""
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
        """OpenRLHF's remote reward model. It knows no error for one row: a bad row fails all."""
        self._check_count(len(request.query))
        if len(request.query) != len(request.prompts):
            raise HTTPException(
                422, f"{len(request.query)} queries, {len(request.prompts)} prompts: one for each"
            )
        return openrlhf.respond(await self._score_queries(request))

    async def health(self) -> Health:
        """503 unless a replica answers."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                stats = await self.replicas.stats.remote()
        except (TimeoutError, RayError, RayServeException) as error:
            # Its text names processes, addresses and log files of the node: for whoever may ask.
            raise ServiceError(f"no replica answers: {type(error).__name__}") from None
        return Health(version=stats["version"])

    def _check_count(self, rows: int) -> None:
        if rows > (most := self.config.http.max_rows):
            raise HTTPException(413, f"{rows} rows: a request has at most {most} (http.max_rows)")

    async def _score_queries(self, request: RewardRequest) -> Rewards:
        """Rewards by the version whose template told prompts from responses."""
        loop, began, gone_s = asyncio.get_running_loop(), 0, 0.0
        until, caller = loop.time() + self.client.timeout_s, caller_name()
        while True:
            build = partial(self._read_queries, request, caller)
            version, made_by, rows, errors = await loop.run_in_executor(self._tokenizing, build)
            refuse(errors)
            try:
                scored = await self._score(
                    rows, made_by, caller=caller, version=version, timeout_s=until - loop.time()
                )
            except VersionGone:
                wait = backoff(began := began + 1)
                if (gone_s := gone_s + wait) > PATIENCE_S:
                    raise
                await asyncio.sleep(wait)
                continue
            rewards = scored.rewards[OWN]
            refuse({i: error for i, error in enumerate(rewards.errors) if error is not None})
            return rewards

    def _read_queries(
        self, request: RewardRequest, caller: str
    ) -> tuple[str, str, list[Row], dict[int, RowError]]:
        version, template = self._template_for(caller)
        rows, errors = openrlhf.read_rows(template, request.query, request.prompts)
        return version, template.spec.fingerprint, rows, errors

    def _template_for(self, caller: str) -> tuple[str, Template]:
        """The version that scores a caller of that name, and how its rows are built."""
        record = read_record(self.app_name)
        served = (
            record.chosen_for(caller) if record else Served(export=self.config.export, version="")
        )
        if served.version not in self._templates:
            template = open_template(served.export, self.config.max_length)
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
        here = await asyncio.to_thread(this_caller)
        return await self.client.score_rows(
            rows,
            tokenizer,
            caller=replace(here, name=caller),
            patience_s=PATIENCE_S,
            id=step or _get_serve_request_context().request_id,
            **options,
        )


def caller_name(own: str = "") -> str:
    """What queues, logs and trials know the client of this request by: its address, and its own."""
    address = _get_serve_request_context()._client.rpartition(":")[0]
    return " ".join(part for part in ("http", address, own) if part)
