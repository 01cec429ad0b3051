"""Answer failed HTTP requests: with a status, and a body with the error's name and message."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from rayrm.errors import Overloaded, RowError, UnknownReward, VersionGone

# Seconds to wait before retrying when replicas have died or are starting.
RETRY_AFTER_S = 5

# Maximum number of a request's problems that are listed: there may be thousands.
NAMED = 10

# Maximum number of characters of an unknown field's name that are quoted.
QUOTED = 200


class Failure(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    error: str
    """Name of a class of rayrm.errors, or the status in words."""
    message: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": why}
    for status, why in {
        400: "The body is not JSON.",
        401: "The token is missing or wrong.",
        404: "No reward of that name is served.",
        410: "The requested version is not served, or no longer.",
        413: "The body, or its number of rows, is above the limit.",
        422: "The body is JSON, but not of this schema; or, for /get_reward, a row has no reward.",
        429: "Too many rows are waiting: send again later.",
        503: "No replica answered.",
    }.items()
}


def answer(
    status: int, message: str, headers: Mapping[str, str] | None = None, error: str = ""
) -> JSONResponse:
    failure = {"error": error or HTTPStatus(status).phrase, "message": message}
    return JSONResponse(failure, status, headers)


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return answer(error.status_code, error.detail, error.headers)


async def on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    # Without the input, which FastAPI would send back: it can be large, or not JSON.
    assert isinstance(error, RequestValidationError)
    problems = [f"{_where(e['loc'])}: {e['msg']}" for e in error.errors()]
    return answer(422, first(problems))


async def on_service_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a ServiceError or UnknownReward."""
    status, headers = 503, {"retry-after": str(RETRY_AFTER_S)}
    if isinstance(error, Overloaded):
        status, headers = 429, {"retry-after": str(math.ceil(error.retry_after_s))}
    elif isinstance(error, VersionGone):
        status, headers = 410, {}
    elif isinstance(error, UnknownReward):
        status, headers = 404, {}
    return answer(status, str(error), headers, type(error).__name__)


def refuse(errors: Mapping[int, RowError]) -> None:
    """Fail the whole request with 422 if it has bad rows, and list them."""
    if errors:
        named = [f"row {i}: {type(error).__name__}: {error}" for i, error in errors.items()]
        raise HTTPException(422, first(named))


def first(problems: Sequence[str]) -> str:
    """Join the first problems, and say how many more there are."""
    left = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return "; ".join(problems[:NAMED]) + left


def _where(loc: tuple[int | str, ...]) -> str:
    """Return a field's path in the request; names that the client chose are cut to QUOTED."""
    return ".".join(str(part)[:QUOTED] for part in loc[1:])
