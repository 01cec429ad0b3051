"""HTTP in front of a real Serve application, asked over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from rayrm.errors import (
    ConfigError,
    Overloaded,
    ServiceError,
    StepTimeout,
    UnknownReward,
    VersionGone,
)
from rayrm.model.engine import RewardModel
from rayrm.model.export import RECORD, read_identity
from rayrm.serving.application import build
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.http.failures import on_service_error
from rayrm.serving.http.guard import read_token
from rayrm.serving.operations import deploy, rollback, try_out
from rayrm.serving.record import Served, change_record, read_record
from rayrm.serving.transports.handle import REPLICA
from rayrm.text.fingerprints import fingerprint
from tests.makers import tiny_tokenizer
from tests.service import AUTHORIZED, TOKEN, ask, assert_same, free_ports, rendered, rows, texts

ROOT = Path(__file__).parent.parent.parent
MAX_BYTES = 2**18
PROMPTS = ["What is the capital of France?"] * 3 + ["Name three fruits."]
RESPONSES = ["The capital of France is Paris.", "London.", "A city.", "apples, pears and plums"]


@pytest.fixture(scope="module")
def port(
    cluster: None, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Where the tiny export answers HTTP, with a token and small limits."""
    (port,) = free_ports(1)
    token = tmp_path_factory.mktemp("secret") / "token"
    token.write_text(TOKEN + "\n")
    config = ServeConfig(
        export=str(tiny_export),
        dtype="float32",
        app="web",
        http={
            "enabled": True,
            "port": port,
            "token_file": str(token),
            "max_bytes": MAX_BYTES,
            "max_rows": 64,
        },
    )
    serve.shutdown()  # another module's Serve opens no port
    deploy(config)
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def local(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, "cpu", "float32")


def test_http_gives_the_rewards_of_one_process(port: int, local: RewardModel) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    prompts: list[Any] = [*PROMPTS, messages]
    responses: list[Any] = [*RESPONSES, [{"role": "assistant", "content": "Ünïcödé 😀"}]]
    request = rows(prompts, responses)
    request["rows"][1]["finished"] = False
    status, answer = ask(port, "/score", request)
    expected = local.score(prompts, responses, finished=[i != 1 for i in range(len(prompts))])
    assert status == 200
    np.testing.assert_allclose(answer["values"], expected.values, atol=1e-5)
    assert answer["errors"] == [None] * 5
    assert answer["unfinished"] == [False, True, False, False, False]
    assert answer["truncated"] == [False] * 5
    assert answer["versions"] == [local.version] * 5


def test_ids_come_with_their_tokenizer(port: int, local: RewardModel) -> None:
    name = fingerprint(tiny_tokenizer())
    request = rows([[5, 6, 7]] * 2, [[8], [9, 10]])
    status, answer = ask(port, "/score", {**request, "tokenizer": name})
    expected = local.score([[5, 6, 7]] * 2, [[8], [9, 10]], tokenizer=name)
    assert status == 200
    np.testing.assert_allclose(answer["values"], expected.values, atol=1e-5)
    _, answer = ask(port, "/score", {**request, "tokenizer": "another"})
    assert [error["error"] for error in answer["errors"]] == ["InvalidTokenIds"] * 2
    status, answer = ask(port, "/score", request)
    assert status == 422 and "`tokenizer`" in answer["message"]


def test_a_bad_row_is_null_with_its_error_and_the_others_are_scored(
    port: int, local: RewardModel
) -> None:
    responses: list[Any] = [
        "Plum.",
        "",
        "plum " * 300,
        3,
        None,
        {"role": "assistant"},
        "half \ud83d",
        "Pear.",
    ]
    status, answer = ask(port, "/score", rows(["Name a fruit."] * 8, responses))
    assert status == 200
    expected = local.score(["Name a fruit."] * 8, responses)
    assert answer["errors"] == [
        error and {"error": type(error).__name__, "message": str(error)}
        for error in expected.errors
    ]
    assert [error and error["error"] for error in answer["errors"]] == [
        None,
        "EmptyResponse",
        "RowTooLong",
        *["InvalidRow"] * 4,
        None,
    ]
    assert answer["values"][1:7] == [None] * 6
    np.testing.assert_allclose(answer["values"][::7], expected.values[::7], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "JSON decode error"),
        (b"[" * 50_000, "JSON|parsing"),
        (b'{"rows": [{"prompt": "a"}]}', r"rows\.0\.response: Field required"),
        (b'{"rows": [{"prompt": "a", "response": "b", "finishd": 1}]}', r"rows\.0\.finishd: Extra"),
        (b'{"prompts": []}', "rows: Field required"),
    ],
)
def test_a_request_that_is_none_says_where(port: int, body: bytes, message: str) -> None:
    status, answer = ask(port, "/score", body)
    assert status in (400, 422)
    assert re.search(message, answer["message"])


def test_scoring_asks_for_the_token_and_nothing_else_does(port: int) -> None:
    request = rows(["a"], ["b"])
    for path, body in (("/score", request), ("/get_reward", {"query": ["ab"], "prompts": ["a"]})):
        for wrong in ({}, {"Authorization": "Bearer a secre"}, {"Authorization": TOKEN}):
            status, answer = ask(port, path, body, wrong)
            assert status == 401 and answer["error"] == "Unauthorized"
        assert ask(port, path, body)[0] == 200
    for path in ("/health", "/docs", "/openapi.json"):
        assert ask(port, path, headers={})[0] == 200


def test_health_and_docs_say_what_is_there(port: int, local: RewardModel) -> None:
    assert ask(port, "/health") == (200, {"version": local.version})
    _, schema = ask(port, "/openapi.json")
    assert {"/score", "/get_reward", "/health"} <= schema["paths"].keys()
    assert schema["paths"]["/score"]["post"]["security"] == [{"HTTPBearer": []}]
    assert b"swagger" in ask(port, "/docs")[1]
    status, answer = ask(port, "/nothing", b"{}")
    assert (status, answer["error"]) == (404, "Not Found")


def test_health_is_503_while_no_replica_answers(port: int) -> None:
    stats = serve.get_deployment_handle(REPLICA, "web").stats.remote().result(timeout_s=60)
    os.kill(stats["pid"], signal.SIGSTOP)
    try:
        status, answer = ask(port, "/health")
    finally:
        os.kill(stats["pid"], signal.SIGCONT)
    assert status == 503 and "no replica answers" in answer["message"]
    assert ask(port, "/health")[0] == 200


def test_too_many_rows_are_refused(port: int) -> None:
    status, answer = ask(port, "/score", rows(["a"] * 65, ["b"] * 65))
    assert status == 413 and "65 rows" in answer["message"]
    request = {"query": ["ab"] * 65, "prompts": ["a"] * 65}
    assert ask(port, "/get_reward", request)[0] == 413


def begin(port: int, head: str, token: str = TOKEN) -> socket.socket:
    """A connection that has sent the head of a POST."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=120)
    head = f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n{head}"
    connection.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
    return connection


def test_a_large_body_is_refused_before_it_is_sent(port: int) -> None:
    connection = begin(port, f"Content-Length: {10**12}")
    with connection, connection.makefile("rb") as reply:
        assert b"413" in reply.readline()
        assert b"max_bytes" in reply.read()  # until the server closes the connection


def test_without_the_token_no_body_is_read(port: int) -> None:
    connection = begin(port, "Transfer-Encoding: chunked", token="wrong")
    with connection, connection.makefile("rb") as reply:
        assert b"401" in reply.readline()
        assert b"Unauthorized" in reply.read()  # until the server closes the connection


def test_a_body_of_unknown_length_is_cut_off_when_it_gets_too_large(port: int) -> None:
    connection = begin(port, "Transfer-Encoding: chunked")
    connection.settimeout(0.05)  # for the answer to come, after each chunk
    reply, sent = b"", 0
    with connection:
        while not reply and sent < 100 * MAX_BYTES:
            connection.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
            sent += 2**16
            with contextlib.suppress(TimeoutError):
                reply = connection.recv(2**16)
        connection.settimeout(120)
        while more := connection.recv(2**16):  # until the server closes the connection
            reply += more
    assert b"413" in reply and b"max_bytes" in reply
    assert MAX_BYTES < sent < 8 * MAX_BYTES


def test_a_body_within_the_limit_may_come_in_chunks(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps(rows(PROMPTS, RESPONSES)).encode()
    pieces = [body[i : i + 50] for i in range(0, len(body), 50)]
    headers = {"Content-Type": "application/json", **AUTHORIZED}
    connection.request("POST", "/score", iter(pieces), headers, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("form", [rendered, str], ids=["rendered", "plain"])
def test_openrlhf_gets_the_reward_of_prompt_and_response(
    port: int, local: RewardModel, form: Any
) -> None:
    prompts = [form(prompt) for prompt in PROMPTS]
    ends = ["<|im_end|>", "", "<|im_end|>\n", "<|im_end|>"]
    query = [p + r + end for p, r, end in zip(prompts, RESPONSES, ends, strict=True)]
    query[0] = f"<|pad|><|pad|>{query[0]}"
    request = {"query": query, "prompts": prompts, "labels": ["", None, "x", "y"]}
    status, answer = ask(port, "/get_reward", request)
    expected = local.score(PROMPTS, RESPONSES, finished=[bool(end) for end in ends])
    assert status == 200
    np.testing.assert_allclose(answer["rewards"], expected.values, atol=1e-5)
    assert answer["scores"] == answer["rewards"]
    assert answer["extra_logs"] == {"unfinished": [0, 1, 0, 0], "truncated": [0, 0, 0, 0]}


@pytest.mark.parametrize(
    ("query", "prompt", "message"),
    [
        ("Name a fruit. Plum.", "Name a colour.", "InvalidRow: the query does not begin with"),
        ("Name a fruit.", "Name a fruit.", "EmptyResponse"),
        ("a" + "plum " * 300, "a", "RowTooLong"),
        ("[INST] a [/INST] Plum.", "[INST] a [/INST]", "rendered by another template"),
        (rendered("a") + "<|im_end|>", rendered("a"), "EmptyResponse"),
    ],
)
def test_openrlhf_gets_no_reward_where_a_row_has_none(
    port: int, query: str, prompt: str, message: str
) -> None:
    request = {"query": ["ab", query], "prompts": ["a", prompt]}
    status, answer = ask(port, "/get_reward", request)
    assert status == 422 and "rewards" not in answer
    assert "row 1: " in answer["message"] and message in answer["message"]


def test_queries_and_prompts_are_as_many(port: int) -> None:
    status, answer = ask(port, "/get_reward", {"query": ["ab", "ab"], "prompts": ["a"]})
    assert status == 422 and "2 queries, 1 prompts" in answer["message"]


def openrlhf(port: int) -> tuple[int, Any]:
    """The answer to PROMPTS and RESPONSES as OpenRLHF sends them."""
    prompts = [rendered(prompt) for prompt in PROMPTS]
    query = [f"{p}{r}<|im_end|>" for p, r in zip(prompts, RESPONSES, strict=True)]
    return ask(port, "/get_reward", {"query": query, "prompts": prompts})


@pytest.fixture(params=["handle", "http", "process"])
def client(request: pytest.FixtureRequest, port: int, local: RewardModel) -> RewardClient:
    """Each way to the same model."""
    url = f"http://127.0.0.1:{port}"
    return {
        "handle": RewardClient("web"),
        "http": RewardClient(url=url, token=TOKEN),
        "process": RewardClient(model=local),
    }[request.param]


def test_every_way_to_a_model_gives_the_same_rewards_and_errors(
    client: RewardClient, local: RewardModel
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    prompts: list[Any] = [*PROMPTS, [{"role": "user", "content": "Ünïcödé 😀"}], "a", "a", 3]
    responses: list[Any] = [
        *RESPONSES,
        [{"role": "assistant", "content": "Blue."}],
        "",
        "plum " * 300,
        "b",
    ]
    finished = [i != 1 for i in range(len(prompts))]
    told = [None, tools, *[None] * 6]  # which the template refuses
    for options in ({"finished": finished}, {"tools": told}):
        expected = local.score(prompts, responses, **options)
        assert_same(client.score(prompts, responses, **options), expected)
    tokenizer = tiny_tokenizer()
    ids: tuple[list[Any], list[Any]] = (
        [[5, 6, 7], np.array([8, 9])],
        [[10], np.array([2**20])],
    )
    assert_same(client.score(*ids, tokenizer=tokenizer), local.score(*ids, tokenizer=tokenizer))
    with pytest.raises(UnknownReward, match="no reward 'safety'"):
        client.score(["a"], ["b"], rewards=["safety"])
    assert_same(client.score(["a"], ["b"], version=local.version), local.score(["a"], ["b"]))
    with pytest.raises(VersionGone, match="gone@1 is not served"):
        client.score(["a"], ["b"], version="gone@1")


def test_a_step_over_http_is_pinned_by_its_first_answer(
    port: int, local: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayrm.serving.transports import http as over_http

    sent: list[dict[str, Any]] = []
    plain = over_http.body_of

    def noting(*asked: Any) -> dict[str, Any]:
        sent.append(plain(*asked))
        return sent[-1]

    monkeypatch.setattr(over_http, "body_of", noting)
    client = RewardClient(url=f"http://127.0.0.1:{port}/", token=TOKEN, caller="rollout-3")
    assert_same(client.score(*texts(20, 8)), local.score(*texts(20, 8)))
    first, *others = sent
    assert first["version"] is None and {body["version"] for body in others} == {local.version}
    assert len(others) >= 2 and len({body["step"] for body in sent}) == 1
    assert {body["caller"] for body in sent} == {"rollout-3"}
    assert first["outstanding"] > others[-1]["outstanding"] > 0


def test_over_http_it_is_said_what_is_wrong(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(ServiceError, match="answered 401: send the header Authorization"):
        RewardClient(url=url, token="guess").score(["a"], ["b"])
    with pytest.raises(ServiceError, match="answered 404"):
        RewardClient(url=f"{url}/nothing", token=TOKEN).score(["a"], ["b"])
    with pytest.raises(ServiceError, match="answered 413: 65 rows"):
        RewardClient(url=url, token=TOKEN).score(["a"] * 65, [str(i) for i in range(65)])
    (nobody,) = free_ports(1)
    with pytest.raises(ServiceError, match=f"nothing answers at http://127.0.0.1:{nobody}"):
        RewardClient(url=f"http://127.0.0.1:{nobody}").score(["a"], ["b"])


def test_a_caller_over_http_loads_neither_ray_nor_torch(port: int, local: RewardModel) -> None:
    script = f"""
import json, sys
from rayrm import RewardClient
client = RewardClient(url="http://127.0.0.1:{port}", token={TOKEN!r})
rewards = client.score({PROMPTS!r}, {RESPONSES!r})
heavy = {{"ray", "torch", "transformers", "pandas", "datasets"}} & set(sys.modules)
print(json.dumps([rewards.values.tolist(), sorted(heavy)]))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    values, heavy = json.loads(out.stdout)
    np.testing.assert_allclose(values, local.score(PROMPTS, RESPONSES).values, atol=1e-5)
    assert heavy == []


def test_a_step_in_two_requests_is_scored_by_one_version(
    port: int, local: RewardModel, other_export: Path
) -> None:
    """A part that comes when another version is served has the version that the first was told."""
    named = rows(PROMPTS, RESPONSES, rewards=["default"], step="one", caller="me")
    _, first = ask(port, "/score", {**named, "part": "0"})
    assert first["version"] == local.version
    old = read_record("web")
    assert old is not None
    deploy(old.config.model_copy(update={"export": str(other_export)}))
    try:
        status, answer = ask(port, "/score", {**named, "part": "1", "version": first["version"]})
        assert status in (200, 410)  # replicas hold it for some seconds more
        if status == 200:
            assert answer["rewards"]["default"]["versions"] == [local.version] * 4
        assert ask(port, "/score", named)[1]["version"] != local.version
    finally:
        rollback("web")


def test_openrlhf_is_scored_by_the_canary_where_its_address_is_drawn(
    port: int, local: RewardModel, other_export: Path
) -> None:
    canary = RewardModel.load(other_export, "cpu", "float32")
    drawn = set()
    try:
        for share in (0.0, 0.3, 0.7, 1.0):
            served = try_out("web", str(other_export), share)
            record = read_record("web")
            assert record is not None
            drawn.add(chosen := record.version_for("http 127.0.0.1").version)
            model = {canary.version: canary, local.version: local}[chosen]
            status, answer = openrlhf(port)
            assert status == 200
            expected = model.score(PROMPTS, RESPONSES).values
            np.testing.assert_allclose(answer["rewards"], expected, atol=1e-5)
            assert ask(port, "/score", rows(PROMPTS, RESPONSES))[1]["versions"] == [chosen] * 4
        assert drawn == {local.version, served.version}
    finally:
        rollback("web")
    assert openrlhf(port)[1]["rewards"] == pytest.approx(
        list(local.score(PROMPTS, RESPONSES).values)
    )


def rename(export: Path, name: str) -> None:
    """Another name, and so another version, of the same rewards."""
    record = export / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"name": name}))


def test_queries_are_not_built_by_the_changed_template_of_a_served_export(
    port: int, other_export: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(other_export, tmp_path / "changed"))
    rename(changed, "changed")
    try:
        version = try_out("web", str(changed), 1.0).version
        template = changed / "chat_template.jinja"
        template.write_text(template.read_text().replace("m['content']", "m['content'] | upper"))
        status, answer = openrlhf(port)
        assert status == 503 and f"not {version}, which was deployed" in answer["message"]
        assert ask(port, "/score", rows(PROMPTS, RESPONSES))[1]["versions"] == [version] * 4
    finally:
        rollback("web")


def test_http_gives_up_on_a_version_that_no_replica_has(
    port: int, tiny_export: Path, tmp_path: Path
) -> None:
    """It asks a few times, with growing pauses, and then says 410."""

    def refused() -> int:
        stats = serve.get_deployment_handle(REPLICA, "web").stats.remote().result(timeout_s=30)
        return int(stats["refused"])

    record, before = read_record("web"), refused()
    assert record is not None
    export = Path(shutil.copytree(tiny_export, tmp_path / "gone"))
    rename(export, "gone")
    (export / "model.safetensors").unlink()
    gone = Served(export=str(export), version=read_identity(str(export))[1].version)
    change_record("web", lambda _: record.model_copy(update={"current": gone}))
    try:
        for answer in (openrlhf(port), ask(port, "/score", rows(["a"], ["b"]))):
            assert answer[0] == 410 and "gone@" in answer[1]["message"]
        assert 2 * 3 <= refused() - before <= 2 * 6
    finally:
        change_record("web", lambda _: record)


def test_the_handle_works_beside_http(port: int, local: RewardModel) -> None:
    rewards = RewardClient("web").score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(rewards.values, local.score(PROMPTS, RESPONSES).values, atol=1e-5)


def test_a_port_that_serve_does_not_listen_on_is_refused(port: int, tiny_export: Path) -> None:
    http = {"enabled": True, "port": port + 1 if port < 65535 else port - 1}
    with pytest.raises(ServiceError, match=f"answers HTTP on 127.0.0.1:{port}"):
        deploy(ServeConfig(export=str(tiny_export), dtype="float32", app="second", http=http))


@pytest.mark.slow
def test_the_same_application_comes_from_a_serve_config(
    port: int, tiny_export: Path, local: RewardModel
) -> None:
    config = yaml.safe_load((ROOT / "jobs/deploy/serve.yaml").read_text())
    (application,) = config["applications"]
    config["http_options"]["port"] = port
    application |= {"name": "declared", "route_prefix": "/declared"}
    application["args"] |= {
        "export": str(tiny_export),
        "dtype": "float32",
        "replicas": 1,
        "gpus_per_replica": 0,
        "cpus_per_replica": 1,
        "labels": {},
        "tokens_per_pack": 512,
        "http": {"enabled": True},
    }
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)
    status, answer = ask(port, "/declared/score", rows(PROMPTS, RESPONSES), {})
    assert status == 200
    np.testing.assert_allclose(answer["values"], local.score(PROMPTS, RESPONSES).values, atol=1e-5)
    assert ask(port, "/declared/openapi.json")[0] == 200
    rewards = RewardClient("declared").score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(rewards.values, answer["values"], atol=1e-5)
    serve.delete("declared")


def test_a_serve_config_is_one_that_serve_takes() -> None:
    config = yaml.safe_load((ROOT / "jobs/deploy/serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "rayrm.serving.application:build"
    build(application.args)
    same = yaml.safe_load((ROOT / "jobs/configs/serve-gpu.yaml").read_text())
    assert {**application.args, "app": application.name} == {
        **same,
        "http": application.args["http"],
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"export": "/e", "replica": 2}, "did you mean 'replicas'"),
        ({"export": "/e", "http": {"enable": True}}, r"unknown key 'http\.enable'"),
        ({"export": "e"}, "must be absolute"),
        ({"export": "/e", "app": "x"}, "the application's name"),
        ({"export": "/e", "http": {"port": 1}}, r"http_options\.port"),
        ({"export": "/e", "http": {"token_env": "A", "token_file": "/a"}}, "both set"),
    ],
)
def test_a_wrong_arg_of_a_serve_config_is_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(args)


def test_a_token_that_is_missing_is_an_error_not_an_open_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def token(**http: str) -> bytes | None:
        return read_token(ServeConfig(export="e", http=http).http)

    monkeypatch.setenv("RAYRM_TEST_TOKEN", "t")
    assert token(token_env="RAYRM_TEST_TOKEN") == b"t"
    assert token() is None
    (tmp_path / "empty").write_text("\n")
    for wrong in (
        {"token_env": "RAYRM_NO_TOKEN"},
        {"token_file": str(tmp_path / "none")},
        {"token_file": str(tmp_path / "empty")},
    ):
        with pytest.raises(ConfigError, match="missing or empty"):
            token(**wrong)


def test_whoever_is_refused_hears_when_to_come_back() -> None:
    asked: Any = None
    for error, status, seconds in (
        (Overloaded("full", 1.2), 429, "2"),
        (StepTimeout("late"), 503, "5"),
    ):
        answer = asyncio.run(on_service_error(asked, error))
        assert (answer.status_code, answer.headers["retry-after"]) == (status, seconds)
        assert json.loads(bytes(answer.body))["message"] == str(error)


@pytest.mark.slow
def test_a_port_that_another_program_has_is_named(cluster: None, tiny_export: Path) -> None:
    serve.shutdown()
    (taken,) = free_ports(1)
    config = ServeConfig(
        export=str(tiny_export),
        dtype="float32",
        app="late",
        http={"enabled": True, "port": taken},
    )
    refused = pytest.raises(ServiceError, match=f"not start on 127.0.0.1:{taken} .*Failed to bind")
    with socket.create_server(("127.0.0.1", taken)), refused:
        deploy(config)
    serve.shutdown()


@pytest.mark.slow
def test_a_serve_without_http_is_not_taken_for_one_with(port: int, tiny_export: Path) -> None:
    serve.shutdown()
    serve.start(proxy_location="Disabled")
    with pytest.raises(ServiceError, match="already without HTTP"):
        deploy(
            ServeConfig(
                export=str(tiny_export), dtype="float32", app="late", http={"enabled": True}
            )
        )
