"""Tool calls, names, thoughts and tools reach the model by every way that rows take to it."""

from __future__ import annotations

import http.client
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import serve
from transformers import AutoTokenizer

from rayrm.data.records import MESSAGE_KEYS, read_groups
from rayrm.errors import InvalidRow
from rayrm.evaluation.evaluate import score
from rayrm.model.engine import RewardModel
from rayrm.model.export import RECORD, Export, with_fingerprints
from rayrm.rows import Row, make_rows
from rayrm.serving.chunk import Step
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import deploy
from rayrm.training.dataset import encode_groups
from tests.makers import make_export
from tests.service import free_ports

# Writes all that a message may hold, and tools.
TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>\
{{ m.role }} {{ m.name }} {{ m.tool_call_id }}
{{ m.reasoning_content }}{{ m.thinking }}{{ m.content or '' }}\
{% for call in m.tool_calls or [] %}{{ call.name }}{{ call.arguments | tojson }}{% endfor %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

USER = {"role": "user", "content": "weather?"}
TOOLS = [{"name": "weather", "parameters": {"city": {"type": "string"}}}]
ANSWER = [{"role": "assistant", "content": "It is 18."}]


def call(name: str, arguments: Any) -> dict[str, Any]:
    calls = [{"name": name, "arguments": arguments}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def tool(id: str) -> dict[str, Any]:
    return {"role": "tool", "content": "18", "tool_call_id": id}


# What somebody may ask, and with which tools: each differs from another in one thing.
ASKED: list[tuple[list[dict[str, Any]], Any]] = [
    ([USER], None),
    ([USER], TOOLS),
    ([USER], [TOOLS[0], {"name": "time"}]),
    ([{**USER, "name": "ann"}], None),
    ([{**USER, "reasoning_content": "hm"}], None),
    ([{**USER, "thinking": "well"}], None),
    ([USER, call("weather", {"a": 1, "b": 2}), tool("1")], None),
    ([USER, call("weather", {"b": 2, "a": 1}), tool("1")], None),
    ([USER, call("delete", {"a": 1, "b": 2}), tool("1")], None),
    ([USER, call("weather", {"a": 1, "b": 2}), tool("2")], None),
]
PROMPTS: list[Any] = [prompt for prompt, _ in ASKED]
ALL_TOOLS = [tools for _, tools in ASKED]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_export(tmp_path_factory.mktemp("keys"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    record = Export(**json.loads((directory / RECORD).read_text()))
    with_fingerprints(directory, record).write(directory)
    return directory


@pytest.fixture(scope="module")
def model(export: Path) -> RewardModel:
    return RewardModel.load(export, "cpu", "float32")


@pytest.fixture(scope="module")
def expected(model: RewardModel) -> np.ndarray[Any, Any]:
    rewards = model.score(PROMPTS, [ANSWER] * len(PROMPTS), tools=ALL_TOOLS)
    assert rewards.errors == [None] * len(PROMPTS)
    return rewards.values


def test_what_differs_in_a_key_or_in_tools_gets_another_reward(
    model: RewardModel, expected: np.ndarray[Any, Any]
) -> None:
    assert len(set(expected.tolist())) == len(ASKED)
    said: list[Any] = [[{**ANSWER[0], key: "so"}] for key in MESSAGE_KEYS[1:]]
    said += [[{**ANSWER[0], "tool_calls": [{"name": "f", "arguments": {}}]}], ANSWER]
    rewards = model.score([[USER]] * len(said), said)
    assert rewards.errors == [None] * len(said)
    # The template writes both thoughts at one place.
    assert len(set(rewards.values.tolist())) == len(said) - 1


def test_keys_without_a_value_and_keys_that_mean_nothing_change_no_reward(
    model: RewardModel, expected: np.ndarray[Any, Any]
) -> None:
    empty: dict[str, Any] = dict.fromkeys(MESSAGE_KEYS)
    prompts = [[{**empty, **m, "id": 7} for m in prompt] for prompt in PROMPTS]
    tools = [of or [] for of in ALL_TOOLS]
    rewards = model.score(prompts, [ANSWER] * len(prompts), tools=tools)
    np.testing.assert_allclose(rewards.values, expected, atol=1e-5)


def test_a_group_has_the_tools_of_its_prompt(
    model: RewardModel, expected: np.ndarray[Any, Any]
) -> None:
    groups: list[Any] = [[ANSWER, ANSWER] for _ in PROMPTS]
    rewards = model.score(PROMPTS, groups=groups, tools=ALL_TOOLS)
    np.testing.assert_allclose(rewards.values[::2], expected, atol=1e-5)
    np.testing.assert_allclose(rewards.values[1::2], expected, atol=1e-5)
    for wrong in ([TOOLS], [TOOLS] * 2 * len(PROMPTS)):
        with pytest.raises(ValueError, match="tools: give a list of JSON schemas per prompt"):
            model.score(PROMPTS, groups=groups, tools=wrong)


def test_tools_that_are_none_fail_their_row_alone(model: RewardModel) -> None:
    bad: list[Any] = [
        TOOLS[0],
        ["weather"],
        "weather",
        [{"name": {1}}],
        [{"name": "\ud83d"}],
        TOOLS,
    ]
    rewards = model.score([[USER]] * len(bad), [ANSWER] * len(bad), tools=bad)
    assert [type(error) for error in rewards.errors] == [InvalidRow] * 5 + [type(None)]
    made_by = model.template.spec.fingerprint
    (error,) = model.score([[5, 6]], [[7]], tools=[TOOLS], tokenizer=made_by).errors
    assert isinstance(error, InvalidRow) and "leave tools out" in str(error)


def test_a_chunk_tells_prompts_apart_and_arrives_with_their_tools(
    model: RewardModel, expected: np.ndarray[Any, Any]
) -> None:
    twice = make_rows(PROMPTS * 2, [ANSWER] * 2 * len(PROMPTS), tools=ALL_TOOLS * 2)
    step = Step([*twice, Row("weather?", "18", True, TOOLS), Row("weather?", "18")])
    (keys,) = step.cut(1, 8192)
    assert len(keys) == len(ASKED) + 2
    chunk = pickle.loads(pickle.dumps(step.chunk(keys, None)))
    assert len(chunk.prompts.kinds) == len(keys)
    assert len(set(chunk.prompts.hashes.tolist())) == len(keys)
    rows = [step.rows[step.places[key][0]] for key in keys]
    assert chunk.rows() == rows
    at = {i: k for k, key in enumerate(keys) for i in step.places[key]}
    encoded = model.encode(chunk.rows())
    rewards = model.collect(encoded, model.score_groups(encoded.groups)).values
    arrived = [rewards[at[i]] for i in range(2 * len(ASKED))]
    np.testing.assert_allclose(arrived, [*expected, *expected], atol=1e-5)


def test_training_and_evaluation_see_what_is_served(
    model: RewardModel,
    expected: np.ndarray[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = [{"role": "assistant", "content": "9"}]
    records = [
        {"prompt": prompt, "tools": tools, "chosen": ANSWER, "rejected": other}
        for prompt, tools in ASKED
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    groups, _ = read_groups(str(file))
    data = encode_groups(groups, model.template, "truncate")
    assert len(data) == len(ASKED)
    rows = make_rows(PROMPTS, [ANSWER] * len(PROMPTS), tools=ALL_TOOLS)
    for i, ids in enumerate(model.template.encode(rows)):
        assert isinstance(ids, np.ndarray)
        assert data[i].tokens.rows[0].tolist() == ids.tolist()
    evaluated = [group.rewards[0] for group in score(model, groups)]
    np.testing.assert_allclose(evaluated, expected, atol=1e-5)


@pytest.fixture(scope="module")
def port(cluster: None, export: Path) -> Iterator[int]:
    (port,) = free_ports(1)
    http_section = {"enabled": True, "port": port}
    serve.shutdown()  # another module's Serve opens no port
    deploy(ServeConfig(export=str(export), app="keys", dtype="float32", http=http_section))
    yield port
    serve.shutdown()


def test_the_handle_and_http_carry_them(port: int, expected: np.ndarray[Any, Any]) -> None:
    responses: list[Any] = [ANSWER] * len(PROMPTS)
    rewards = RewardClient("keys").score(PROMPTS, responses, tools=ALL_TOOLS)
    np.testing.assert_allclose(rewards.values, expected, atol=1e-5)
    rows = [{"prompt": prompt, "response": ANSWER, "tools": tools} for prompt, tools in ASKED] + [
        {"prompt": [USER], "response": ANSWER, "tools": "weather"}
    ]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/score", json.dumps({"rows": rows}), headers)
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    assert reply.status == 200
    np.testing.assert_allclose(answer["values"][:-1], expected, atol=1e-5)
    assert answer["errors"][-1]["error"] == "InvalidRow"
    assert "tools must be a list" in answer["errors"][-1]["message"]
