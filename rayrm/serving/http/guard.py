"""Guard the HTTP endpoint: refuse requests without the token, or too large, before reading them."""

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

# The rest of the body stays unread, so the connection cannot be used again.
CLOSE = {"connection": "close"}
UNAUTHORIZED = {"www-authenticate": "Bearer", **CLOSE}


class RequestGuard:
    """ASGI middleware that refuses a POST without the token, or too large, before reading its body.

    FastAPI checks a token only after it has read the body, and its own limit on bodies leaves the
    connection open to a client that keeps sending.
    """

    def __init__(self, app: ASGIApp, token: bytes | None, max_bytes: int) -> None:
        self.app = app
        self.token = token
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._authorized(headers.get("authorization", "")):
            refusal = answer(401, "send the header Authorization: Bearer TOKEN", UNAUTHORIZED)
            return await refusal(scope, receive, send)
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,18}", length):
            return await answer(400, "Content-Length is not a number", CLOSE)(scope, receive, send)
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

    def _authorized(self, authorization: str) -> bool:
        """Return whether the Authorization header holds the token, if one is required."""
        if self.token is None:
            return True
        # Starlette decodes header bytes as latin-1; the token is UTF-8.
        return hmac.compare_digest(authorization.encode("latin-1"), b"Bearer " + self.token)

    @property
    def _limit(self) -> str:
        return f"the body is larger than {self.max_bytes} bytes (http.max_bytes): send fewer rows"


def read_token(http: HttpSection) -> bytes | None:
    """Return the token that scoring requires, None if none is configured.

    Raises ConfigError if the configured token is missing or empty.
    """
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
