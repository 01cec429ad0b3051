"""The reward service, as a real Serve application on the session's cluster."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import serve

from rayrm.errors import (
    ConfigError,
    EmptyResponse,
    ExportError,
    InvalidRow,
    InvalidTokenIds,
    RowTooLong,
    ServiceError,
    StepTimeout,
)
from rayrm.model.engine import RewardModel
from rayrm.serving.client import RewardClient
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import deploy
from rayrm.serving.replica import Replica
from rayrm.text.fingerprints import fingerprint
from tests.makers import tiny_tokenizer
from tests.service import assert_same, before_each_pack, stats, texts, total, until

ROOT = Path(__file__).parent.parent.parent
SECONDS_PER_PACK = 0.2
FRAGILE = "fragile"


class FragileReplica(Replica):
    """Takes a while for each pack; hangs or fails once for a file of that name."""

    def _load(self, config: ServeConfig) -> RewardModel:
        directory = Path(config.export).parent

        def slow() -> None:
            time.sleep(SECONDS_PER_PACK)
            if _take(directory / "fail"):
                raise RuntimeError("the kernel gave up")
            if (directory / "broken").exists():
                raise RuntimeError("no kernel ever worked")
            if _take(directory / "hang"):
                time.sleep(600)

        return before_each_pack(super()._load(config), slow)


def _take(file: Path) -> bool:
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def served(cluster: None, tiny_export: Path) -> Iterator[RewardClient]:
    deploy(
        ServeConfig(
            export=str(tiny_export), dtype="float32", app="tiny", replicas=2, tokens_per_pack=512
        )
    )
    yield RewardClient("tiny")
    serve.delete("tiny")


@pytest.fixture(scope="module")
def fragile(cluster: None, tiny_export: Path) -> Iterator[RewardClient]:
    config = ServeConfig(
        export=str(tiny_export),
        dtype="float32",
        app=FRAGILE,
        overlong="truncate",
        tokens_per_pack=512,
        hang_timeout_s=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrm.serving.application.Replica", FragileReplica)
        deploy(config)
    yield RewardClient(FRAGILE, timeout_s=60)
    serve.delete(FRAGILE)


@pytest.fixture(scope="module")
def local(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, "cpu", "float32")


def test_served_rewards_equal_those_in_one_process(
    served: RewardClient, local: RewardModel
) -> None:
    prompts, responses = texts(40, 4)
    finished = [i % 3 > 0 for i in range(len(prompts))]
    rewards = served.score(prompts, responses, finished=finished)
    assert_same(rewards, local.score(prompts, responses, finished=finished))
    assert np.isfinite(rewards.values).all() and rewards.unfinished.any()
    assert set(rewards.versions) == {local.version}


def test_messages_are_served_as_in_one_process(served: RewardClient, local: RewardModel) -> None:
    conversation = [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red. Ünïcödé 😀"},
        {"role": "user", "content": "Another."},
    ]
    prompts: list[Any] = [conversation, conversation, "Name a fruit."]
    responses: list[Any] = [[{"role": "assistant", "content": "Blue."}], "Green.", "Plum."]
    assert_same(served.score(prompts, responses), local.score(prompts, responses))


def test_token_ids_are_served_as_in_one_process(served: RewardClient, local: RewardModel) -> None:
    prompts: list[Any] = [[5, 6, 7], np.array([5, 6, 7]), np.array([8, 9], dtype=np.uint16), []]
    responses: list[Any] = [(10, 11), np.array([12]), [13], [14]]
    tokenizer = tiny_tokenizer()
    rewards = served.score(prompts, responses, tokenizer=tokenizer)
    assert np.isfinite(rewards.values).all()
    assert_same(rewards, local.score(prompts, responses, tokenizer=fingerprint(tokenizer)))
    others = served.score(prompts, responses, tokenizer="another")
    assert_same(others, local.score(prompts, responses, tokenizer="another"))
    assert all(isinstance(error, InvalidTokenIds) for error in others.errors)


def test_a_bad_row_gets_its_error_and_the_others_are_scored(
    served: RewardClient, local: RewardModel
) -> None:
    rows: list[tuple[Any, Any, type | None]] = [
        ("Name a fruit.", "Plum.", type(None)),
        ("Name a fruit.", "", EmptyResponse),
        ("Name a fruit.", "plum " * 300, RowTooLong),
        (None, "Plum.", InvalidRow),
        ("Name a fruit.", 3, InvalidRow),
        ("Name a fruit.", "half a pair \ud83d", InvalidRow),
        ("Name a fruit.", [{"role": "assistant"}], InvalidRow),
        ("Name a fruit.", [{"role": "user", "content": "Plum."}], InvalidRow),
        ("Name a fruit.", [1, 2], InvalidRow),
        ([1, 2], [3, 10**6], InvalidTokenIds),
        ([1, 2], [3, 2**40], InvalidTokenIds),
        ([1, 2], [3, 2**70], InvalidTokenIds),
        ([1, 2], [-1], InvalidTokenIds),
        ([1, 2], [3.5], InvalidRow),
        ("Name a fruit.", "Pear.", type(None)),
    ]
    prompts, responses, expected = zip(*rows, strict=True)
    with pytest.warns(UserWarning, match="without their tokenizer"):
        rewards = served.score(prompts, responses)
    with pytest.warns(UserWarning, match="without their tokenizer"):
        assert_same(rewards, local.score(prompts, responses))
    assert [type(error) for error in rewards.errors] == list(expected)
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        served.score(["a", "b"], ["c"])
    assert len(served.score([], [])) == 0


def test_a_prompt_and_equal_rows_are_computed_once(served: RewardClient) -> None:
    name = fingerprint(tiny_tokenizer())
    prompt = list(range(10, 110))
    responses = [[200 + r, *range(50, 59)] for r in range(8)] * 2
    before = total("tiny", "computed_tokens")
    rewards = served.score([prompt] * 16, responses, tokenizer=name)
    assert total("tiny", "computed_tokens") - before == 100 + 8 * 10
    np.testing.assert_array_equal(rewards.values[:8], rewards.values[8:])


def test_a_missing_application_is_named_with_those_that_run(served: RewardClient) -> None:
    with pytest.raises(ServiceError, match=r"no application 'tyni'; deployed: .*'tiny'"):
        RewardClient("tyni").score(["a"], ["b"])


def test_an_actor_of_another_job_and_namespace_can_call(
    served: RewardClient, local: RewardModel
) -> None:
    script = """
        import pickle, sys
        import ray
        from rayrm.serving.client import RewardClient

        @ray.remote(num_cpus=0)
        class Worker:
            def __init__(self, client):
                self.client = client

            def step(self):
                return self.client.score(["Name a fruit."] * 2, ["Plum.", ""])

        ray.init(sys.argv[1], namespace="elsewhere", log_to_driver=False)
        rewards = ray.get(Worker.remote(RewardClient("tiny")).step.remote())
        sys.stdout.buffer.write(pickle.dumps(rewards))
    """
    address = ray.get_runtime_context().gcs_address
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), address],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert_same(pickle.loads(out.stdout), local.score(["Name a fruit."] * 2, ["Plum.", ""]))


def test_a_wrong_export_is_refused_before_anything_starts(
    tmp_path: Path, tiny_export: Path
) -> None:
    with pytest.raises(ExportError, match=r"found neither rayrm\.json"):
        deploy(ServeConfig(export=str(tmp_path), app="nothing"))
    with pytest.raises(ConfigError, match="positions for 512"):
        deploy(
            ServeConfig(export=str(tiny_export), dtype="float32", app="nothing", max_length=1024)
        )


@pytest.mark.slow
def test_replicas_that_cannot_start_say_why(cluster: None, tiny_export: Path) -> None:
    class Broken(Replica):
        def __init__(self, config: ServeConfig) -> None:
            raise ExportError("not on this node")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ServiceError, match="not on this"):
        patch.setattr("rayrm.serving.application.Replica", Broken)
        deploy(ServeConfig(export=str(tiny_export), dtype="float32", app="broken"))
    serve.delete("broken")


def test_callers_at_once_share_forwards(fragile: RewardClient, local: RewardModel) -> None:
    before = stats(FRAGILE)[0]
    prompts, responses = texts(4, 3)
    with ThreadPoolExecutor(4) as callers:
        steps = callers.map(fragile.score, *zip(*_split(prompts, responses, 4), strict=True))
        values = np.concatenate([step.values for step in steps])
    after = stats(FRAGILE)[0]
    np.testing.assert_allclose(values, local.score(prompts, responses).values, atol=1e-5)
    assert after["calls"] - before["calls"] == 4
    assert after["forwards"] - before["forwards"] < 4


def _split(
    prompts: Sequence[str], responses: Sequence[str], parts: int
) -> list[tuple[Sequence[str], Sequence[str]]]:
    n = len(prompts) // parts
    return [(prompts[i : i + n], responses[i : i + n]) for i in range(0, len(prompts), n)]


def test_a_cut_prompt_is_marked(fragile: RewardClient, tiny_export: Path) -> None:
    prompts, responses = ["why? " * 200, "why?"], ["Because.", "Because."]
    rewards = fragile.score(prompts, responses)
    assert rewards.truncated.tolist() == [True, False]
    local = RewardModel.load(tiny_export, "cpu", "float32", overlong="truncate")
    assert_same(rewards, local.score(prompts, responses))


def test_a_pack_that_fails_once_is_computed_again(
    fragile: RewardClient, local: RewardModel, tiny_export: Path
) -> None:
    (tiny_export.parent / "fail").touch()
    prompts, responses = texts(4, 4)
    assert_same(fragile.score(prompts, responses), local.score(prompts, responses))
    assert not (tiny_export.parent / "fail").exists()


def test_a_replica_whose_model_is_broken_is_replaced_and_loses_no_row(
    fragile: RewardClient, local: RewardModel, tiny_export: Path
) -> None:
    before = stats(FRAGILE)[0]
    prompts, responses = texts(4, 5)
    broken = tiny_export.parent / "broken"
    broken.touch()
    step = fragile.submit(prompts, responses)
    until(lambda: not psutil.pid_exists(before["pid"]))
    broken.unlink()
    assert_same(step.result(), local.score(prompts, responses))


def test_a_step_that_takes_too_long_is_given_up_and_frees_the_replica(
    fragile: RewardClient,
) -> None:
    prompts, responses = texts(100, 4)
    with pytest.raises(StepTimeout, match=r"timeout_s = 0\.5") as late:
        fragile.score(prompts, responses, timeout_s=0.5)
    assert isinstance(late.value, TimeoutError)
    until(lambda: total(FRAGILE, "admitted_tokens") == 0)


def test_a_replica_that_is_killed_loses_no_row(fragile: RewardClient, local: RewardModel) -> None:
    prompts, responses = texts(40, 4)
    before = stats(FRAGILE)[0]
    with ThreadPoolExecutor(1) as caller:
        step = caller.submit(fragile.score, prompts, responses)
        until(lambda: stats(FRAGILE)[0]["forwards"] > before["forwards"])
        os.kill(before["pid"], signal.SIGKILL)
        rewards = step.result()
    assert_same(rewards, local.score(prompts, responses))
    assert before["pid"] not in [replica["pid"] for replica in stats(FRAGILE)]


def test_a_replica_that_hangs_is_replaced_and_loses_no_row(
    fragile: RewardClient, local: RewardModel, tiny_export: Path
) -> None:
    before = stats(FRAGILE)[0]
    (tiny_export.parent / "hang").touch()
    prompts, responses = texts(4, 6)  # that no test before has made it remember
    assert_same(fragile.score(prompts, responses), local.score(prompts, responses))
    assert before["pid"] not in [replica["pid"] for replica in stats(FRAGILE)]


def test_serving_loads_no_deepspeed() -> None:
    script = (
        "import sys, rayrm.serving.client, rayrm.serving.operations, rayrm.model.engine;"
        "assert not {'deepspeed', 'rayrm.training'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
