"""The PPO job: its arithmetic by hand; a run whose replica dies and whose reward model changes."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from ray import serve

from jobs import ppo_report
from jobs.ppo import (
    Learner,
    Rollout,
    RolloutWorker,
    Settings,
    forward,
    gae,
    log_probs,
    score,
    train,
)
from rayrm.data.sample import questions
from rayrm.model.engine import RewardModel
from rayrm.model.hardware import fast_dtype
from rayrm.rows import Rewards
from rayrm.serving.config import ServeConfig
from rayrm.serving.operations import deploy
from tests.service import stats, until

APP = "ppo"


@pytest.fixture(scope="module")
def settings(cluster: None, tiny_export: Path) -> Iterator[Settings]:
    deploy(ServeConfig(export=str(tiny_export), dtype="float32", app=APP, replicas=2))
    threads = torch.get_num_threads()
    yield Settings(
        str(tiny_export),
        str(tiny_export.parent / "base"),
        dtype="float32",
        prompts_per_worker=2,
        responses_per_prompt=2,
        rows_per_minibatch=4,
        held_out=8,
        max_response=12,
        temperature=0.8,
        trained_layers=1,
        learning_rate=1e-2,
    )
    torch.set_num_threads(threads)  # what runs here besides actors has set others
    serve.delete(APP)


@pytest.fixture(scope="module")
def worker(settings: Settings) -> RolloutWorker:
    return RolloutWorker(settings, 0)


@pytest.fixture(scope="module")
def sampled(worker: RolloutWorker) -> Rollout:
    return worker.sample(["Name a fruit.", "Name three colours, please."], 8)


def rewards_of(rollout: Rollout) -> Rewards:
    n = len(rollout.ids)
    nothing = torch.zeros(n, dtype=torch.bool).numpy()
    values = torch.linspace(-1, 1, n).numpy()
    return Rewards(values, [None] * n, nothing, nothing, ["tiny@1"] * n)


def test_advantages_are_the_weighted_sums_of_the_errors_that_follow() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    rewards, values = torch.randn(2, 4) * mask, torch.randn(2, 4) * mask
    found = gae(rewards, values, 0.8)
    for b, length in enumerate((4, 2)):
        later = [*values[b, 1:length].tolist(), 0.0]
        errors = [float(rewards[b, t] + later[t] - values[b, t]) for t in range(length)]
        for t in range(length):
            sums = sum(0.8 ** (u - t) * errors[u] for u in range(t, length))
            assert found[b, t] == pytest.approx(sums, abs=1e-6)
    assert not found[1, 2:].any()


def test_a_response_ends_with_its_first_end_or_is_unfinished(
    worker: RolloutWorker, sampled: Rollout
) -> None:
    assert set(sampled.finished.tolist()) == {True, False}
    ends = set(worker.ends.tolist())
    for response, finished in zip(sampled.rows()[1], sampled.finished.tolist(), strict=True):
        assert not ends & set(response[:-1])
        assert (response[-1] in ends) == finished
        assert finished or len(response) == 12


def test_prompts_are_what_the_reward_model_was_trained_on(
    worker: RolloutWorker, sampled: Rollout, tiny_export: Path
) -> None:
    prompts, responses = sampled.rows()
    rewards = worker.send([sampled]).result()
    assert rewards.errors == [None] * 16
    assert rewards.unfinished.tolist() == [not finished for finished in sampled.finished.tolist()]
    local = RewardModel.load(tiny_export, "cpu", "float32")
    made_by = worker.tokenizer
    expected = local.score(
        prompts, responses, finished=sampled.finished.tolist(), tokenizer=made_by
    )
    assert rewards.values == pytest.approx(expected.values, abs=1e-5)


def test_log_probabilities_are_at_the_temperature() -> None:
    logits, tokens = 4 * torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    expected = (logits / 0.7).softmax(-1).gather(2, tokens[..., None])[..., 0].log()
    assert torch.allclose(log_probs(logits, tokens, 0.7), expected, atol=1e-5)


def test_log_probabilities_are_of_the_tokens_as_they_were_sampled(
    settings: Settings, worker: RolloutWorker, sampled: Rollout
) -> None:
    assert worker.settings.max_response == sampled.old.shape[1]
    kept = sampled.kept
    # The reference is the policy here: computed at once, and token by token with a cache, in bf16.
    assert (sampled.old - sampled.reference)[kept].abs().max() < 0.1
    surprise = []  # beyond what is to be expected at this temperature
    with torch.inference_mode():
        for b, (prompt, response) in enumerate(zip(*sampled.rows(), strict=True)):
            row = torch.tensor([prompt + response])
            logits = forward(worker.policy, row, torch.ones_like(row))[:, len(prompt) - 1 : -1]
            alone = log_probs(logits, torch.tensor([response]), settings.temperature)[0]
            assert (alone - sampled.old[b][kept[b]]).abs().max() < 0.1
            chances = (logits[0].float() / settings.temperature).log_softmax(-1)
            surprise += (-alone + (chances.exp() * chances).sum(-1)).tolist()
    assert abs(fmean(surprise)) < 0.2


def test_the_score_is_the_last_tokens_reward_and_moving_away_costs(
    settings: Settings, sampled: Rollout
) -> None:
    learner = Learner(settings)
    sampled.rewards = rewards_of(sampled)
    assert sampled.rewards.values[0] == -1
    sampled.rewards.values[0] = math.nan
    batch = learner.estimate(sampled)
    assert len(batch["ids"]) == 15, "a row without a reward is left out"
    kept, values = batch["kept"], batch["returns"] - batch["advantages"]
    scores = torch.linspace(-1, 1, 16).where(sampled.finished, settings.unfinished_reward)[1:]
    penalty = settings.kl_penalty * (sampled.old - sampled.reference)[1:] * kept
    for b in range(15):
        rewards = -penalty[b]
        rewards[int(kept[b].sum()) - 1] += scores[b]
        row = (rewards[None], values[b][None])
        assert torch.allclose(gae(*row, 0.95)[0], batch["advantages"][b], atol=1e-5)
    sampled.rewards = None


def test_only_the_last_layers_are_trained_and_they_are(
    settings: Settings, sampled: Rollout
) -> None:
    learner = Learner(settings)
    before = learner.weights()
    sampled.rewards = rewards_of(sampled)
    figures = learner.update(sampled)
    assert 0 < figures["clipped"] < 1
    changed = {name for name, w in learner.weights().items() if not torch.equal(w, before[name])}
    assert changed and all("layers.1." in name or "norm" in name for name in changed)
    sampled.rewards = None


def test_rewards_are_learned_from_in_the_scale_of_the_held_out_ones(settings: Settings) -> None:
    none = torch.zeros(3, dtype=torch.bool).numpy()
    rewards = Rewards(torch.tensor([3, 3, math.nan]).numpy(), [None] * 3, none, none, ["v"] * 3)
    scaled = replace(settings, reward_mean=-1.0, reward_std=2.0)
    scores = score(rewards, torch.tensor([True, False, False]), scaled).tolist()
    assert scores[:2] == [2.0, settings.unfinished_reward] and math.isnan(scores[2])


def test_paired_t_by_hand() -> None:
    # Gains 1, 2, 3: mean 2, standard deviation 1.
    assert ppo_report.paired_t([0, 0, 1], [1, 2, 4]) == pytest.approx(2 / (1 / math.sqrt(3)))
    assert ppo_report.paired_t([0, 1], [0, 1]) == 0


def test_questions_are_judged_where_they_are_sampled(worker: RolloutWorker) -> None:
    asked = questions(0, "test", 8)
    weights = worker.policy.state_dict()
    judged = worker.evaluate(weights, asked)
    assert judged == worker.evaluate(weights, asked), "the same luck"
    assert len(judged) == 8 and all(judge["quality"] in (0, 1, 2) for judge in judged)
    cut_off = [judge["reward"] for judge in judged if not judge["finished"]]
    assert set(cut_off) == {worker.settings.unfinished_reward}


def test_a_run_goes_on_through_a_killed_replica_and_a_new_version(
    settings: Settings,
    other_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What kills and deploys waits until the service has answered some steps of the run."""

    def disturb() -> None:
        calls = sum(replica["calls"] for replica in stats(APP))
        until(lambda: sum(replica["calls"] for replica in stats(APP)) >= calls + 8)
        os.kill(stats(APP)[0]["pid"], signal.SIGKILL)
        deploy(ServeConfig(export=str(other_export), dtype="float32", app=APP, replicas=2))

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    runs: list[dict[str, Any]] = []
    steps = 6
    while not runs or disturbing.is_alive():
        runs.append(train(replace(settings, dtype="auto", steps=steps, seed=len(runs))))
    runs.append(train(replace(settings, dtype="auto", steps=steps, seed=len(runs))))
    for run in runs:
        assert run["settings"]["dtype"] == fast_dtype("cpu")
        assert len(run["history"]) == steps
        assert all(
            math.isfinite(h["reward"]) and h["waited"] < h["seconds"] for h in run["history"]
        )
        assert len(run["before"]) == len(run["after"]) == 8
    assert any(h["clipped"] > 0 for run in runs for h in run["history"])
    versions = [h["version"] for run in runs for h in run["history"]]
    assert versions[0] != versions[-1]
    files = [tmp_path / f"{n}.json" for n in range(len(runs))]
    for file, run in zip(files, runs, strict=True):
        file.write_text(json.dumps(run))
    picture = tmp_path / "ppo.png"
    monkeypatch.setattr("sys.argv", ["ppo_report.py", str(picture), *map(str, files)])
    ppo_report.main()
    assert capsys.readouterr().out.count("\n| ") == len(runs) + 1
    assert picture.stat().st_size > 10_000
