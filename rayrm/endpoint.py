"""HTTP beside the handle: POST /score, OpenRLHF's POST /get_reward, GET /health, and GET /docs.

The ingress of the Serve application. It turns JSON into rows, passes them to the replicas as a
client does, and turns rewards into JSON. Knows nothing of packs or weights.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, WithJsonSchema
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_serve_request_context
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import rayrm
from rayrm.callers import this_caller
from rayrm.client import RewardClient, backoff
from rayrm.config import OWN, HttpSection, ServeConfig
from rayrm.data import MESSAGE_KEYS
from rayrm.engine import Rewards
from rayrm.errors import (
    ConfigError,
    InvalidRow,
    Overloaded,
    RowError,
    ServiceError,
    VersionGone,
)
from rayrm.export import load_template
from rayrm.foreign import open_model
from rayrm.template import Row, Template, is_ids
from rayrm.versions import Served, read_record

# A replica that has not said anything by then is no use to a load balancer.
HEALTH_SECONDS = 5.0

# A caller whose request got nothing done for so long is told to come back; and after so long where
# replicas have died, or are being started.
PATIENCE_S = 5.0
RETRY_AFTER_S = 5

# So many rows of a bad request are named: a message for each of thousands would help nobody.
NAMED = 10

# Characters of a field's name that are quoted where there is no such field.
QUOTED = 200

# Whatever it is, a row that is none of these gets its own error, and the others are scored.
TextOrIds = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "role": {"type": "string"},
                            "content": {"type": ["string", "null"]},
                            "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
                            **{key: {"type": ["string", "null"]} for key in MESSAGE_KEYS[1:]},
                        },
                        "required": ["role"],
                    },
                },
                {"type": "array", "items": {"type": "integer"}},
            ]
        }
    ),
]


Schemas = Annotated[
    Any,
    WithJsonSchema({"type": ["array", "null"], "items": {"type": "object"}}),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ScoreRow(Body):
    prompt: TextOrIds
    """Text, messages, or token ids."""
    response: TextOrIds
    """As the prompt is."""
    finished: bool = True
    """False where the sampler cut the response off."""
    tools: Schemas = None
    """What can be called, as JSON schemas, for the chat template."""


class ScoreRequest(Body):
    rows: Annotated[list[ScoreRow], FailFast()]
    tokenizer: str | None = None
    """Fingerprint (rayrm.fingerprint) of the tokenizer that made the ids; needed with ids."""


class Failure(Body):
    error: str
    """The name of a class of rayrm.errors."""
    message: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": why}
    for status, why in {
        400: "The body is not JSON.",
        401: "The token is missing or wrong.",
        413: "The body, or its number of rows, is above the limit.",
        422: "The body is JSON, but not of this schema; /get_reward: or a row has no reward.",
        429: "Too many rows are waiting: send again later.",
        503: "No replica answered.",
    }.items()
}


class ScoreResponse(Body):
    """Row by row, in the order of the request."""

    values: list[float | None]
    """Raw rewards; null where the row failed."""
    errors: list[Failure | None]
    truncated: list[bool]
    """The prompt was cut from the left."""
    unfinished: list[bool]
    versions: list[str]
    """The model that scored the row."""


class RewardRequest(BaseModel):
    """As OpenRLHF sends it; labels, which a reward model has no use for, are ignored."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    query: Annotated[list[str], FailFast()]
    """Prompt and response, decoded with their special tokens: a response without its end of turn
    was cut off."""
    prompts: Annotated[list[str], FailFast()]
    """What each query begins with: rendered by this model's chat template, or plain text."""


class RewardResponse(Body):
    rewards: list[float]
    scores: list[float]
    """The rewards again."""
    extra_logs: dict[str, list[float]]
    """unfinished and truncated, 1 or 0 for each row."""


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
        app.add_exception_handler(StarletteHTTPException, _on_http_error)
        app.add_exception_handler(RequestValidationError, _on_invalid_request)
        app.add_exception_handler(ServiceError, _on_service_error)
        app.add_middleware(Door, token=token, max_bytes=self.config.http.max_bytes)
        return app

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Rewards of rows, each a prompt and a response; a bad row gets an error of its own."""
        self._check_count(len(request.rows))
        rows = [Row(row.prompt, row.response, row.finished, row.tools) for row in request.rows]
        if request.tokenizer is None and any(is_ids(row.response) for row in rows):
            raise HTTPException(
                422, "rows hold token ids: send the fingerprint of their tokenizer as `tokenizer`"
            )
        rewards = await self._score(rows, request.tokenizer)
        return ScoreResponse(
            values=[value if np.isfinite(value) else None for value in rewards.values.tolist()],
            errors=[_failure(error) for error in rewards.errors],
            truncated=rewards.truncated.tolist(),
            unfinished=rewards.unfinished.tolist(),
            versions=rewards.versions,
        )

    async def get_reward(self, request: RewardRequest) -> RewardResponse:
        """OpenRLHF's remote reward model. It knows no error for one row: a bad row fails all."""
        self._check_count(len(request.query))
        if len(request.query) != len(request.prompts):
            raise HTTPException(
                422, f"{len(request.query)} queries, {len(request.prompts)} prompts: one for each"
            )
        rewards = await self._score_queries(request)
        values = rewards.values.tolist()
        return RewardResponse(
            rewards=values,
            scores=values,
            extra_logs={
                "unfinished": _ones(rewards.unfinished),
                "truncated": _ones(rewards.truncated),
            },
        )

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
        until = loop.time() + self.client.timeout_s
        while True:
            build = partial(self._rows, request, _caller_name())
            version, made_by, rows, errors = await loop.run_in_executor(self._tokenizing, build)
            _refuse(errors)
            try:
                rewards = await self._score(rows, made_by, version, until - loop.time())
            except VersionGone:
                wait = backoff(began := began + 1)
                if (gone_s := gone_s + wait) > PATIENCE_S:
                    raise
                await asyncio.sleep(wait)
                continue
            _refuse({i: error for i, error in enumerate(rewards.errors) if error is not None})
            return rewards

    def _rows(
        self, request: RewardRequest, caller: str
    ) -> tuple[str, str, list[Row], dict[int, RowError]]:
        version, template = self._template_for(caller)
        rows: list[Row] = []
        errors: dict[int, RowError] = {}
        for i, (query, prompt) in enumerate(zip(request.query, request.prompts, strict=True)):
            try:
                if not query.startswith(prompt):
                    raise InvalidRow("the query does not begin with its prompt")
                rows.append(template.sampled_row(prompt, query[len(prompt) :]))
            except RowError as error:
                errors[i] = error
        return version, template.spec.fingerprint, rows, errors

    def _template_for(self, caller: str) -> tuple[str, Template]:
        """The version that scores a caller of that name, and how its rows are built."""
        record = read_record(self.app_name)
        served = (
            record.chosen_for(caller) if record else Served(export=self.config.export, version="")
        )
        if served.version not in self._templates:
            directory, found = open_model(served.export)
            template = load_template(directory, found, self.config.max_length)
            wanted = {other.version for other in record.wanted} if record else set()
            kept = {version: t for version, t in self._templates.items() if version in wanted}
            self._templates = {**kept, served.version: template}
        return served.version, self._templates[served.version]

    async def _score(
        self,
        rows: list[Row],
        tokenizer: str | None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> Rewards:
        context = _get_serve_request_context()
        here = await asyncio.to_thread(this_caller)
        rewards = await self.client.score_rows(
            rows,
            tokenizer,
            version=version,
            timeout_s=timeout_s,
            caller=replace(here, name=_caller_name()),
            patience_s=PATIENCE_S,
            id=context.request_id,
        )
        return rewards[OWN]


class Door:
    """Turns a request away before its body is read: without the token, or too large.

    ASGI middleware. FastAPI looks at a token only after it has read the body, and its own limit on
    bodies leaves the connection open to whoever goes on sending.
    """

    def __init__(self, app: ASGIApp, token: bytes | None, max_bytes: int) -> None:
        self.app = app
        self.token = token
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._knows(headers.get("authorization", "")):
            refusal = _answer(401, "send the header Authorization: Bearer TOKEN", UNASKED)
            return await refusal(scope, receive, send)
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,18}", length):
            return await _answer(400, "Content-Length is no number", CLOSE)(scope, receive, send)
        if int(length) > self.max_bytes:
            return await _answer(413, self._limit, CLOSE)(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self._limit, CLOSE)
            return message

        await self.app(scope, counted, send)

    def _knows(self, authorization: str) -> bool:
        if self.token is None:
            return True
        # Headers are bytes, which Starlette shows as latin-1; the token is utf-8.
        return hmac.compare_digest(authorization.encode("latin-1"), b"Bearer " + self.token)

    @property
    def _limit(self) -> str:
        return f"the body is larger than {self.max_bytes} bytes (http.max_bytes): send fewer rows"


def read_token(http: HttpSection) -> bytes | None:
    """The token that scoring asks for; ConfigError where it is to be read and is not there."""
    if http.token_env:
        found = os.environ.get(http.token_env, "")
        where = f"http.token_env = {http.token_env!r}: this environment variable"
    elif http.token_file:
        file = Path(http.token_file)
        found = file.read_text() if file.exists() else ""
        where = f"http.token_file = {http.token_file!r}: this file"
    else:
        return None
    if not found.strip():
        raise ConfigError(f"{where} is missing or empty on the node of the endpoint")
    return found.strip().encode()


# The rest of the body stays unread: the connection is of no further use.
CLOSE = {"connection": "close"}
UNASKED = {"www-authenticate": "Bearer", **CLOSE}


def _answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    failure = {"error": HTTPStatus(status).phrase, "message": message}
    return JSONResponse(failure, status, headers)


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return _answer(error.status_code, error.detail, error.headers)


async def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    # Without the input, which FastAPI would send back: it can be large, or no JSON at all.
    assert isinstance(error, RequestValidationError)
    problems = [f"{_where(e['loc'])}: {e['msg']}" for e in error.errors()]
    return _answer(422, "; ".join(problems[:NAMED]))


def _where(loc: tuple[int | str, ...]) -> str:
    """The place in a request, whose own names for fields can be long."""
    return ".".join(str(part)[:QUOTED] for part in loc[1:])


async def _on_service_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Overloaded):
        return _answer(429, str(error), {"retry-after": str(math.ceil(error.retry_after_s))})
    return _answer(503, str(error), {"retry-after": str(RETRY_AFTER_S)})


def _caller_name() -> str:
    """What queues, logs and trials know the client of this request by: its address."""
    return f"http {_get_serve_request_context()._client.rpartition(':')[0]}".strip()


def _refuse(errors: Mapping[int, RowError]) -> None:
    """Fail a whole request for its bad rows, naming them."""
    if errors:
        named = [f"row {i}: {type(e).__name__}: {e}" for i, e in list(errors.items())[:NAMED]]
        left = f"; and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
        raise HTTPException(422, "; ".join(named) + left)


def _failure(error: RowError | None) -> Failure | None:
    return None if error is None else Failure(error=type(error).__name__, message=str(error))


def _ones(flags: NDArray[np.bool_]) -> list[float]:
    return flags.astype(float).tolist()
