"""Transport over HTTP, to an application with http.enabled, from outside its cluster.

Sends POST /score, which serving/http/score.py defines. Imports neither Ray nor torch. Does not know
about replicas.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
from asyncio import AbstractEventLoop
from typing import Any
from weakref import WeakKeyDictionary

import httpx2
import numpy as np

from rayrm import errors
from rayrm.errors import Overloaded, RowError, ServiceError, UnknownReward, VersionGone
from rayrm.rows import Rewards, Row
from rayrm.serving.chunk import Chunk
from rayrm.serving.ticket import Caller, Ticket
from rayrm.serving.transports import Answer, Away, Target

# Timeout of connecting, in seconds. Scoring takes as long as its rows need and has no separate one.
CONNECT_S = 10.0

# Statuses that a proxy answers with while its backend is down.
BACKEND_DOWN = (502, 503, 504)


class HttpTransport:
    """Posts chunks to the application at a URL; its endpoint distributes them over replicas.

    A step is therefore cut as for one replica, and neither the number of replicas nor the version
    is queried: the first answer decides which version scores the rest.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.token = token
        self.name = f"the reward service at {self.url}"
        self._reached = False
        self._clients: WeakKeyDictionary[AbstractEventLoop, httpx2.AsyncClient] = (
            WeakKeyDictionary()
        )

    def caller(self, name: str | None) -> Caller:
        here = f"{getpass.getuser()}@{socket.gethostname()}/{os.getpid()}"
        return Caller(name or here, job="", actor="")

    async def find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        return Target(1, version=version, rewards=rewards)

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        try:
            response = await self._client().post("/score", json=body_of(target, chunk, ticket))
        except httpx2.TransportError as error:
            if self._reached:
                raise Away(f"{error!r}") from error
            raise ServiceError(f"nothing answers at {self.url}: {error!r}") from error
        if response.status_code != 200:
            raise self._refusal(response)
        self._reached = True
        answer = response.json()
        rewards = {name: from_json(named) for name, named in answer["rewards"].items()}
        return Answer(rewards, answer["version"])

    def _refusal(self, response: httpx2.Response) -> Exception:
        """Return the exception that a response other than 200 stands for."""
        status = response.status_code
        try:
            failure = response.json()
            kind, message = failure["error"], failure["message"]
        except (ValueError, KeyError, TypeError):
            if status in BACKEND_DOWN and self._reached:
                return Away(f"{self.url} answered {status}")
            kind, message = "", response.text[:200]
        else:
            self._reached = True  # a refusal of the service counts too
        if status == 429:
            return Overloaded(message, float(response.headers.get("retry-after", 1.0)))
        for known in (VersionGone, UnknownReward):
            if kind == known.__name__:
                return known(message)
        return ServiceError(f"{self.name} answered {status}: {message}")

    def _client(self) -> httpx2.AsyncClient:
        """Return the HTTP client of this event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            timeout = httpx2.Timeout(None, connect=CONNECT_S)
            self._clients[loop] = httpx2.AsyncClient(
                base_url=self.url, headers=headers, timeout=timeout
            )
        return self._clients[loop]


def body_of(target: Target, chunk: Chunk, ticket: Ticket) -> dict[str, Any]:
    """Return the body of a request to /score."""
    return {
        "rows": [as_json(row) for row in chunk.rows()],
        "tokenizer": chunk.tokenizer,
        "rewards": list(target.rewards),
        "version": ticket.version or None,
        "step": ticket.step,
        "part": ticket.part,
        "outstanding": ticket.outstanding,
        "caller": ticket.caller.name,
    }


def as_json(row: Row) -> dict[str, Any]:
    """Convert a row to the JSON that /score accepts."""
    plain = {
        "prompt": _plain(row.prompt),
        "response": _plain(row.response),
        "finished": row.finished,
    }
    return {**plain, "tools": list(row.tools)} if row.tools else plain


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def from_json(of: dict[str, Any]) -> Rewards:
    """Convert an answer of /score, or one named entry of it, to Rewards."""
    values = [np.nan if value is None else value for value in of["values"]]
    return Rewards(
        np.array(values, dtype=np.float32),
        [_row_error(failure) for failure in of["errors"]],
        np.array(of["truncated"], dtype=bool),
        np.array(of["unfinished"], dtype=bool),
        of["versions"],
    )


def _row_error(failure: dict[str, str] | None) -> RowError | None:
    if failure is None:
        return None
    kind = getattr(errors, failure["error"], RowError)
    error: RowError = kind(failure["message"])
    return error
