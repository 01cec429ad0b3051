"""What an HTTP transport makes of a service that refuses, goes away, or was never there."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rayrm.errors import Overloaded, ServiceError
from rayrm.rows import Row
from rayrm.serving.chunk import Step
from rayrm.serving.ticket import Caller, Ticket
from rayrm.serving.transports import Away, Target
from rayrm.serving.transports.http import HttpTransport

REFUSED = json.dumps({"error": "Overloaded", "message": "busy"})
PROXY = "<html>Bad gateway</html>"


class Scripted(BaseHTTPRequestHandler):
    """Answers with the server's next status and body."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = self.server.script.pop(0)  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Retry-After", "0.25")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def send(transport: HttpTransport) -> None:
    step = Step([Row("q", "a")])
    (keys,) = step.cut(1, 0)
    chunk = step.chunk(keys, None)
    ticket = Ticket("step", "0", Caller("me", "", ""))
    asyncio.run(_send(transport, Target(1), chunk, ticket))


async def _send(transport: HttpTransport, *call: object) -> None:
    await transport.call(*call)  # type: ignore[arg-type]


def test_a_service_that_has_refused_is_there_and_may_go_away_for_a_while(
    server: HTTPServer,
) -> None:
    transport = HttpTransport(f"http://127.0.0.1:{server.server_port}")
    server.script = [(429, REFUSED), (502, PROXY)]  # type: ignore[attr-defined]
    with pytest.raises(Overloaded, match="busy") as refused:
        send(transport)
    assert refused.value.retry_after_s == 0.25
    with pytest.raises(Away, match="answered 502"):
        send(transport)
    server.server_close()
    with pytest.raises(Away):
        send(transport)


def test_what_was_never_there_is_no_service_that_may_come_back(server: HTTPServer) -> None:
    transport = HttpTransport(f"http://127.0.0.1:{server.server_port}")
    server.script = [(502, PROXY)]  # type: ignore[attr-defined]
    with pytest.raises(ServiceError, match=r"answered 502.*Bad gateway"):
        send(transport)
    server.server_close()
    with pytest.raises(ServiceError, match="nothing answers at"):
        send(transport)
