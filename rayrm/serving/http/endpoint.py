"""The HTTP endpoint: the ingress of the Serve application.

Routes requests to the protocols and turns errors into status codes; each protocol has its own file.
Does not know about packs or weights.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as StarletteHTTPException

import rayrm
from rayrm.errors import ServiceError, UnknownReward
from rayrm.serving.config import ServeConfig
from rayrm.serving.http import openrlhf, score
from rayrm.serving.http.failures import (
    REFUSALS,
    on_http_error,
    on_invalid_request,
    on_service_error,
)
from rayrm.serving.http.guard import RequestGuard, read_token
from rayrm.serving.http.scoring import Body, Scoring

# What answers POST at each path: a function that makes the handler from Scoring.
PROTOCOLS: dict[str, Any] = {"/score": score.handler, "/get_reward": openrlhf.handler}

# Seconds in which a replica must answer /health, for the load balancer's sake.
HEALTH_SECONDS = 5.0


class Health(Body):
    version: str
    """The version that a replica serves."""


@serve.ingress()
class Endpoint:
    """The ingress that answers HTTP requests by calling replicas through a handle."""

    def __init__(self, config: ServeConfig, replicas: DeploymentHandle[Any]) -> None:
        self.config = config
        self.replicas = replicas
        self.scoring = Scoring(serve.get_replica_context().app_name, config)
        # An unreadable template fails at start; a changed one only refuses sampled text.
        with suppress(ServiceError):
            self.scoring.template_for("")

    def __serve_build_asgi_app__(self) -> FastAPI:
        token = read_token(self.config.http)
        app = FastAPI(title="rayrm", version=rayrm.__version__)
        # Only documents the token: RequestGuard checks it.
        bearer = [Depends(HTTPBearer(auto_error=False))] if token else []
        for path, handler in PROTOCOLS.items():
            app.post(path, dependencies=bearer, responses=REFUSALS)(handler(self.scoring))
        app.get("/health", responses={503: REFUSALS[503]})(self.health)
        app.add_exception_handler(StarletteHTTPException, on_http_error)
        app.add_exception_handler(RequestValidationError, on_invalid_request)
        app.add_exception_handler(ServiceError, on_service_error)
        app.add_exception_handler(UnknownReward, on_service_error)
        app.add_middleware(RequestGuard, token=token, max_bytes=self.config.http.max_bytes)
        return app

    async def health(self) -> Health:
        """Return the served version, or 503 if no replica answers."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                stats = await self.replicas.stats.remote()
        except (TimeoutError, RayError, RayServeException) as error:
            # Without its text, which would show processes, addresses and log files to anyone.
            raise ServiceError(f"no replica answers: {type(error).__name__}") from None
        return Health(version=stats["version"])
