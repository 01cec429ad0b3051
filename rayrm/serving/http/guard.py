"""Guard the HTTP endpoint: refuse a request without the token, or too large, before reading it."""

from __future__ import annotations

import hmac
import os
import re
from pathlib import Path

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrm.errors import ConfigError
from rayrm.serving.config import HttpSection
from rayrm.serving.http.failures import answer

# The rest of the body stays unread: the connection is of no further use.
CLOSE = {"connection": "close"}
UNASKED = {"www-authenticate": "Bearer", **CLOSE}


class RequestGuard:
    """Refuses a request before its body is read: without the token, or too large.

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
            refusal = answer(401, "send the header Authorization: Bearer TOKEN", UNASKED)
            return await refusal(scope, receive, send)
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,18}", length):
            return await answer(400, "Content-Length is no number", CLOSE)(scope, receive, send)
        if int(length) > self.max_bytes:
            return await answer(413, self._limit, CLOSE)(scope, receive, send)
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
