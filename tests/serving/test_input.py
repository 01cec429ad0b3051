"""Input that attacks: whatever is sent gets a documented answer, and the service goes on.

soak_input.py sends more of the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ray import serve
from ray.exceptions import RayActorError
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import Message, Receive, Scope, Send

from rayrm.errors import RowError, ServiceError
from rayrm.model.engine import RewardModel
from rayrm.rows import Rewards
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.http.endpoint import Endpoint
from rayrm.serving.http.failures import REFUSALS
from rayrm.serving.http.guard import RequestGuard
from rayrm.serving.operations import deploy
from rayrm.text.fingerprints import fingerprint
from tests.makers import tiny_tokenizer
from tests.service import ask, free_ports, rendered, rows

APP = "attacked"
CLIENT = RewardClient(APP)
TOKEN = "a-token-that-nobody-guesses"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
MADE_BY = fingerprint(tiny_tokenizer())

# Which of those is an answer to bad input: 429 and 503 are the service's own troubles.
ANSWERS = {200, 404, 405, *REFUSALS} - {429, 503}

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

FUZZ = settings(
    max_examples=100,
    phases=[Phase.generate],  # shrinking would take a request for each step
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def port(
    cluster: None, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Where the tiny export answers HTTP, with a token, few rows a request, and defaults."""
    (port,) = free_ports(1)
    token = tmp_path_factory.mktemp("secret") / "token"
    token.write_text(TOKEN)
    http = {"enabled": True, "port": port, "token_file": str(token), "max_rows": 64}
    serve.shutdown()  # another module's Serve opens no port
    deploy(ServeConfig(export=str(tiny_export), dtype="float32", app=APP, http=http))
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def local(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, "cpu", "float32")


@pytest.fixture(scope="module")
def cutting(tiny_export: Path) -> RewardModel:
    """Cuts the prompt of nearly every row."""
    return RewardModel.load(tiny_export, "cpu", "float32", max_length=24, overlong="truncate")


def processes() -> dict[str, psutil.Process]:
    """The proxy, the endpoint and the replica of this cluster."""
    titles = {
        "proxy": "ray::ProxyActor",
        "endpoint": f"ray::ServeReplica:{APP}:Endpoint",
        "replica": f"ray::ServeReplica:{APP}:Replica",
    }
    return {
        name: process
        for process in psutil.Process().children(recursive=True)
        for name, title in titles.items()
        if " ".join(process.cmdline()).startswith(title)
    }


# Rows -------------------------------------------------------------------------------------------

PIECES = [" \n", "\0", "<|im_end|>", "<|im_start|>assistant\n", "[INST]", "plum " * 300, "x" * 9999]
characters = st.characters(exclude_categories=[])  # lone surrogates too
texts = st.lists(st.sampled_from(PIECES) | st.text(characters, max_size=9), max_size=4).map("".join)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | texts, "content": texts},
        optional={"name": anything},
    ),
    max_size=3,
)
ids = st.lists(st.integers(0, 400), max_size=20) | st.lists(st.integers(), max_size=4)
sides = texts | messages | ids | anything
kinds = st.sampled_from([texts, messages, ids, sides])
many_rows = st.lists(kinds.flatmap(lambda kind: st.tuples(kind, kind, st.booleans())), max_size=6)
tokenizers = st.none() | st.just(MADE_BY) | texts

# What only a caller in Python can pass.
objects = st.sampled_from(
    [
        np.zeros((2, 2), np.int64),
        np.array([2**63], np.uint64),
        np.array([1.0]),
        np.array(["a"]),
        np.array(3),
        b"bytes",
        {1, 2},
        object(),
    ]
)


def score(scorer: RewardModel | RewardClient, given_rows: list[Any], made_by: Any) -> Rewards:
    prompts, responses, finished = ([row[i] for row in given_rows] for i in range(3))
    with warnings.catch_warnings(action="ignore"):
        return scorer.score(prompts, responses, finished=finished, tokenizer=made_by)


def outcomes(rewards: Rewards) -> list[str | None]:
    """Each row's error by name; fails unless a row has either a finite reward or one of those."""
    assert all(error is None or isinstance(error, RowError) for error in rewards.errors)
    failed = [error is not None for error in rewards.errors]
    assert np.isnan(rewards.values).tolist() == failed
    return [None if error is None else type(error).__name__ for error in rewards.errors]


def check_rows(port: int, local: RewardModel, given_rows: list[Any], made_by: Any) -> None:
    """Here, there, and each row by itself: the same reward, or the same error."""
    here = score(local, given_rows, made_by)
    there = score(CLIENT, given_rows, made_by)
    assert outcomes(there) == outcomes(here), given_rows
    np.testing.assert_allclose(there.values, here.values, atol=1e-5)
    for i, row in enumerate(given_rows):
        alone = score(local, [row], made_by)
        assert outcomes(alone) == outcomes(here)[i : i + 1], row
        np.testing.assert_allclose(alone.values, here.values[i : i + 1], atol=1e-5)


@FUZZ
@given(st.lists(st.tuples(sides | objects, sides | objects, st.booleans()), max_size=6), tokenizers)
def test_any_row_gets_its_reward_or_its_error_and_touches_no_other(
    port: int, local: RewardModel, given_rows: list[Any], made_by: Any
) -> None:
    check_rows(port, local, given_rows, made_by)


@pytest.mark.parametrize("nothing", ["", [], np.zeros(0, np.int32)], ids=["text", "list", "array"])
def test_rows_of_nothing_are_errors(port: int, local: RewardModel, nothing: Any) -> None:
    check_rows(port, local, [(nothing, nothing, True)] * 2, None)


@FUZZ
@given(many_rows, tokenizers)
def test_rows_that_are_cut_fail_alone_too(
    cutting: RewardModel, given_rows: list[Any], made_by: Any
) -> None:
    outcomes(score(cutting, given_rows, made_by))


# Requests ---------------------------------------------------------------------------------------

scoring = st.builds(
    lambda given_rows, made_by: {
        "rows": [dict(zip(("prompt", "response", "finished"), r, strict=True)) for r in given_rows],
        "tokenizer": made_by,
    },
    many_rows,
    tokenizers,
)
sampled = st.tuples(texts | texts.map(rendered), texts)
remote = st.lists(sampled, max_size=4).map(
    lambda pairs: {"query": [p + r for p, r in pairs], "prompts": [p for p, _ in pairs]}
)
documents = (scoring | remote | anything).map(lambda value: json.dumps(value).encode())
damaged = st.builds(
    lambda body, at, new: body[: at % (len(body) + 1)] + new + body[at % (len(body) + 1) :],
    documents,
    st.integers(0, 10**4),
    st.binary(max_size=4) | st.sampled_from([b"NaN", b"1e999", b"\\ud800", b"[" * 2000]),
)
bodies = documents | damaged | st.binary(max_size=99)
paths = st.sampled_from(["/score", "/get_reward"])
visible = st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")
tokens = st.just(AUTHORIZED) | st.text(visible, max_size=9).map(
    lambda value: {"Authorization": value}
)


def check_request(port: int, path: str, body: bytes, headers: dict[str, str]) -> None:
    """A documented status, and under each but 200 an error and its message."""
    status, answer = ask(port, path, body, headers)
    assert status in ANSWERS, (body, answer)
    assert (status == 401) == (headers != AUTHORIZED)
    if status != 200:
        assert answer.keys() == {"error", "message"} and len(answer["message"]) < 10_000


def check_schema(port: int, mode: GenerationMode, examples: settings) -> None:
    """Requests that OpenAPI's schema asks for, or forbids: answers as it has them."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")

    @examples
    @given(schema.as_strategy(generation_mode=mode))
    def conforms(case: schemathesis.Case[Any]) -> None:
        response = case.call(headers=AUTHORIZED, timeout=60)
        case.validate_response(response, checks=CHECKS)

    conforms()


@FUZZ
@given(paths, bodies, tokens)
def test_any_body_gets_a_documented_answer(
    port: int, path: str, body: bytes, headers: dict[str, str]
) -> None:
    check_request(port, path, body, headers)


@pytest.mark.parametrize("mode", GenerationMode)
def test_answers_are_those_of_the_schema(port: int, mode: GenerationMode) -> None:
    check_schema(port, mode, settings(FUZZ, max_examples=50))


def test_the_schema_has_every_refusal_with_its_body(port: int) -> None:
    _, schema = ask(port, "/openapi.json")
    for path in ("/score", "/get_reward"):
        responses = schema["paths"][path]["post"]["responses"]
        assert responses.keys() == {"200", *map(str, REFUSALS)}
        for status in responses.keys() - {"200"}:
            (content,) = responses[status]["content"].values()
            assert content["schema"] == {"$ref": "#/components/schemas/Failure"}


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("NaN", 200),
        ("1" + "0" * 400, 200),
        ("1" + "0" * 5000, 400),
        (f"[{2**63}, -1]", 200),
        ('"\\u0000"', 200),
        ('"\\ud800"', 200),
        ("[" * 900 + "]" * 900, 200),
        ('[{"role": "user", "content": "a", "x": ' + "[" * 900 + "]" * 900 + "}]", 200),
        ("[" * 20_000, 400),
        ('"\xff"', 400),
    ],
)
def test_values_at_the_limits_of_json(port: int, value: str, status: int) -> None:
    for row in (
        f'{{"prompt": {value}, "response": "b"}}',
        f'{{"prompt": [5], "response": {value}}}',
    ):
        for made_by in ("null", '"\\ud800"', f'"{MADE_BY}"'):
            good = '{"prompt": "a", "response": "b"}'
            body = f'{{"rows": [{row}, {good}], "tokenizer": {made_by}}}'
            got, answer = ask(port, "/score", body.encode("latin-1"), AUTHORIZED)
            unnamed = got == 422 and "`tokenizer`" in answer["message"]
            assert got == status or (unnamed and made_by == "null")
            assert got != 200 or answer["errors"][1] is None


def test_a_million_bad_rows_cost_one_error(port: int) -> None:
    """Two error objects for each would be gigabytes."""
    endpoint = processes()["endpoint"]

    def peak() -> int:
        status = Path(f"/proc/{endpoint.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024

    before = peak()
    for row in ("{}", "[]", "0"):
        body = b'{"rows": [%b]}' % ",".join([row] * 10**6).encode()
        status, answer = ask(port, "/score", body, AUTHORIZED)
        assert status == 422 and "rows.0" in answer["message"]
    assert peak() - before < 400


HEAD = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HEAD += f"Authorization: Bearer {TOKEN}\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("\0\xffGET", 400),
        (HEAD + "Content-Length: abc", 400),
        (HEAD + "Content-Length: -5", 400),
        (HEAD + "Content-Length: " + "9" * 40, 400),
        (HEAD + "Content-Length: 2\r\nContent-Length: 3", 400),
        (HEAD + "Content-Length: 2\r\nTransfer-Encoding: chunked", 400),
        (HEAD + "Transfer-Encoding: chunked", 400),  # {} is no length of a chunk
        (HEAD + "Content-Length: 2", 422),
        (HEAD.replace("application/json", "\xff/;=") + "Content-Length: 2", 422),
        (HEAD.replace(TOKEN, "\xe9\xff") + "Content-Length: 2", 401),
        (HEAD.replace("Bearer ", "Bearer x\r\nAuthorization: Bearer ") + "Content-Length: 2", 401),
        (HEAD.replace("POST", "BREW") + "Content-Length: 2", 400),
        (HEAD.replace("POST", "PUT") + "Content-Length: 2", 405),
    ],
)
def test_a_malformed_head_is_refused(port: int, head: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(head.encode("latin-1") + b"\r\n\r\n{}")
        with connection.makefile("rb") as reply:
            assert reply.readline().split()[1] == str(status).encode()


def through_door(*headers: tuple[bytes, bytes], token: str = "tökén") -> int:
    """The status with which a POST with these headers leaves the door; 204 behind it."""
    statuses: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})

    async def receive() -> Message:
        raise AssertionError("nothing is read at the door")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "headers": list(headers)}
    asyncio.run(RequestGuard(app, token.encode(), 1000)(scope, receive, send))
    return statuses[0]


RIGHT = (b"authorization", "Bearer tökén".encode())


def test_a_token_is_compared_as_bytes() -> None:
    assert through_door(RIGHT) == 204
    for wrong in (b"", b"Bearer", b"Bearer t\xf6k\xe9n", b"Bearer tok", RIGHT[1] + b"x", b"\xff"):
        assert through_door((b"authorization", wrong)) == 401
    assert through_door() == 401


@settings(FUZZ, max_examples=300)
@given(st.binary(max_size=30) | st.integers().map(lambda n: str(n).encode()), st.binary(max_size=9))
def test_no_length_and_no_token_breaks_the_door(length: bytes, token: bytes) -> None:
    status = through_door((b"content-length", length), RIGHT)
    small = length.isdigit() and len(length) <= 18 and int(length) <= 1000
    assert (status == 204) == small and status in (204, 400, 413)
    assert through_door((b"authorization", token), (b"content-length", length)) == 401


# What it tells ----------------------------------------------------------------------------------


def test_it_listens_on_loopback_alone(port: int) -> None:
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening if c.laddr.port == port} == {"127.0.0.1"}


def test_health_docs_metrics_and_refusals_tell_no_secret(port: int, tiny_export: Path) -> None:
    assert ask(port, "/score", rows(["a", "a"], ["b", 3]), AUTHORIZED)[0] == 200
    environment = processes()["endpoint"].environ()
    secrets = {
        TOKEN,
        str(tiny_export),
        os.getcwd(),
        *(value for value in environment.values() if len(value) > 8),
    }
    pages = [
        *(ask(port, path) for path in ("/health", "/docs", "/redoc", "/openapi.json", "/nothing")),
        *(ask(port, path) for path in ("/-/healthz", "/-/routes", "/score")),
        *(ask(port, "/score", body) for body in (b"{", b'{"rows": 3}', b"\xff")),
        ask(port, "/score", b"{}", {}),
    ]
    assert len({status for status, _ in pages}) > 3
    (node,) = ray.nodes()
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(metrics) as response:
        scraped = response.read().decode()
    assert APP in scraped
    ours = [line for line in scraped.splitlines() if "rayrm" in line or "serve" in line]
    for text in (*map(str, pages), *ours):
        assert not [secret for secret in secrets if secret in text]


def test_health_does_not_tell_where_a_replica_died() -> None:
    class Dead:
        async def remote(self) -> None:
            raise RayActorError(error_msg="ip: 192.0.2.2, /tmp/ray/session/logs/worker.err")

    endpoint: Any = SimpleNamespace(replicas=SimpleNamespace(stats=Dead()))
    with pytest.raises(ServiceError) as raised:
        asyncio.run(Endpoint.health(endpoint))
    assert str(raised.value) == "no replica answers: RayActorError"
