"""What tests of the service share: texts to score, and looking into replicas and endpoints."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayActorError

from rayrm.model.engine import RewardModel
from rayrm.packing import TokenGroup
from rayrm.rows import Rewards
from rayrm.serving.queue import Values
from tests.makers import tiny_tokenizer

TOKEN = "a secret"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def free_ports(n: int) -> list[int]:
    """Ports below those that the system gives to anyone who asks for some, and above Ray's."""
    found: set[int] = set()
    while len(found) < n:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def before_each_pack(model: RewardModel, what: Callable[[], None]) -> RewardModel:
    """The model, which does that before it computes."""
    compute = model.score_groups

    def score_groups(groups: Sequence[TokenGroup], **_: Any) -> list[Values]:
        what()
        return compute(groups)

    model.score_groups = score_groups  # type: ignore[method-assign]
    return model


def stats(app: str) -> list[dict[str, Any]]:
    """Of each replica that lives."""
    while True:
        try:
            replicas = serve.get_deployment_handle("Replica", app)
            return replicas.broadcast("stats").results(timeout_s=60)
        except RayActorError:  # Serve has not noticed yet
            time.sleep(0.1)


def total(app: str, key: str) -> int:
    return sum(replica[key] for replica in stats(app))


def texts(groups: int, responses: int) -> tuple[list[str], list[str]]:
    prompts = [f"Question {g}: " + "why? " * (g % 7) for g in range(groups)]
    return (
        [prompt for prompt in prompts for _ in range(responses)],
        [
            f"Answer {r} to {g}: " + "because " * (r + g % 5)
            for g in range(groups)
            for r in range(responses)
        ],
    )


def assert_same(served: Rewards, local: Rewards) -> None:
    np.testing.assert_allclose(served.values, local.values, atol=1e-5)
    assert [(type(e), str(e)) for e in served.errors] == [(type(e), str(e)) for e in local.errors]
    np.testing.assert_array_equal(served.truncated, local.truncated)
    np.testing.assert_array_equal(served.unfinished, local.unfinished)


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(
    port: int, path: str, body: object = None, headers: dict[str, str] = AUTHORIZED
) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST where there is a body."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    method = "GET" if data is None else "POST"
    connection.request(method, path, data, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(text, parse_constant=pytest.fail) if is_json else text


def rows(prompts: list[Any], responses: list[Any], **more: Any) -> dict[str, Any]:
    pairs = zip(prompts, responses, strict=True)
    return {"rows": [{"prompt": p, "response": r} for p, r in pairs], **more}


def rendered(prompt: str) -> str:
    """A prompt as OpenRLHF's --data.apply_chat_template sends it."""
    message = [{"role": "user", "content": prompt}]
    text = tiny_tokenizer().apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def samples_at(url: str, key: str, value: str) -> dict[str, float]:
    """What Prometheus would scrape there of rayrm with the tag: by name, or name and kind."""
    with urllib.request.urlopen(url) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {
            " ".join([sample.name.removeprefix("ray_rayrm_"), *kind]): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("ray_rayrm_") and sample.labels.get(key) == value
            for kind in [[v for k, v in sample.labels.items() if k in ("kind", "le")]]
        }
