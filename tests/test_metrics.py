"""Metrics as Prometheus scrapes them from a node, and events as TensorBoard reads them."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from pytest import approx
from ray import serve
from ray.train.v2.api.result import Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayrm import RewardClient, ServeConfig, TrainConfig, deploy
from rayrm.errors import ConfigError, RowError, RowFailed, RowTooLong
from rayrm.model.engine import RewardModel
from rayrm.model.export import read_export
from rayrm.rows import Rewards, make_rows
from rayrm.serving.metrics import ServeMetrics
from rayrm.training.fit import make_trainer, run_directory
from rayrm.training.loop import Rank
from rayrm.training.metrics import EVALUATION, STEP, TrainMetrics
from tests.makers import make_base
from tests.service import samples_at, until

pytestmark = pytest.mark.usefixtures("cluster")

Samples = dict[str, float]

# Longer than Ray's agent remembers what it was told once; by default that is ten times as long.
REMEMBERED_S = 5


def scrape(*tag: str) -> Samples:
    """What the node tells of rayrm under the tag (key, value)."""
    node = ray.nodes()[0]
    return samples_at(
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", *tag
    )


def wait_for(tag: tuple[str, str], expected: Mapping[str, Any]) -> Samples:
    """A scrape, once all of these samples have these values: they are told one after the other."""
    end = time.monotonic() + 120
    while True:
        samples = scrape(*tag)
        if all(samples.get(name) == value for name, value in expected.items()):
            return samples
        assert time.monotonic() < end, f"{samples}, expected {dict(expected)}"
        time.sleep(0.2)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Steps of two pairs in fp32 on one CPU worker, under ZeRO 1: it tells the gradient's norm."""
    data = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": f"Name {'one ' * (i % 3)}{i}", "chosen": "apples", "rejected": "pears " * i}
        for i in range(1, 9)
    ]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return TrainConfig(
        name="metered",
        storage=str(tmp_path / "runs"),
        model={"path": str(make_base(tmp_path / "base"))},
        data={"train": str(data), "eval": str(data), "max_length": 128},
        train={"groups_per_step": 2, "dtype": "float32", "tensorboard": True},
        deepspeed={"zero_stage": 1},
    )


def train_and_scrape(values: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Samples]]:
    """On the rank: four steps; the history, and what is scraped after the second and the last."""
    rank = Rank(TrainConfig(**values))
    assert rank.metrics
    scraped = []
    for saved, step in enumerate((2, 4), start=1):
        while rank.step < step:
            rank.train_step()
        rank.evaluate()
        rank.save()
        figures = {*STEP, *EVALUATION} & rank.history[-1].keys()
        told: dict[str, Any] = {
            f"train_{figure}": approx(rank.history[-1][figure]) for figure in figures
        }
        told["train_checkpoint_seconds_count"] = saved
        told["train_tokens_total"] = sum(h["tokens"] for h in rank.history)
        told["train_step_seconds"] = approx(rank.history[-1]["seconds"])
        scraped.append(wait_for(("run", "metered"), told))
    rank.metrics.close()
    return rank.history, scraped


def test_a_runs_figures_are_scraped_and_charted_and_move_as_it_trains(config: TrainConfig) -> None:
    result = make_trainer(config, run_directory(config), train_and_scrape).fit()
    assert isinstance(result, Result) and result.return_value
    history, scraped = result.return_value
    for samples, step in zip(scraped, (2, 4), strict=True):
        told = history[step - 1]
        assert samples["train_tokens_per_second"] == approx(told["tokens"] / told["seconds"])
        assert samples["train_tokens_saved"] == 1 - told["tokens"] / told["tokens_unshared"] > 0
        assert samples["train_step_seconds"] == approx(told["seconds"])
    first, last = scraped
    names = {f"train_{figure}" for figure in (*STEP, *EVALUATION)}
    assert names <= first.keys()
    for name in names - {"train_accuracy", "train_eval_accuracy", "train_tokens_saved"}:
        assert first[name] != last[name], name

    charts = events(Path(config.storage) / "metered/tensorboard")
    for figure in ("loss", "accuracy", "margin", "learning_rate", "grad_norm"):
        assert charts[f"train/{figure}"] == [(h["step"], approx(h[figure])) for h in history]
    assert charts["eval/loss"] == [(h["step"], approx(h["eval_loss"])) for h in history[1::2]]
    assert [step for step, _ in charts["train/checkpoint_seconds"]] == [2, 4]


@pytest.fixture
def metered(cluster: None, tiny_export: Path) -> Iterator[RewardClient]:
    deploy(ServeConfig(export=str(tiny_export), dtype="float32", app="metered"))
    yield RewardClient("metered")
    serve.delete("metered")


def test_what_a_replica_answers_is_scraped_and_moves(
    metered: RewardClient, tiny_export: Path
) -> None:
    tag = ("application", "metered")
    prompts = ["Name a fruit."] * 3 + ["Name a colour."] * 2
    responses = ["Plum.", "A pear.", "", "Red, I would say.", "plum " * 300]
    first = metered.score(prompts, responses)
    values = first.values[[0, 1, 3]]
    (stats,) = serve.get_app_handle("metered").broadcast("stats").results(timeout_s=60)
    expected = {
        "serve_current": 1,
        "serve_requests_total": 1,
        "serve_rows_total": 5,
        "serve_latency_seconds_count": 1,
        "serve_latency_seconds_bucket +Inf": 1,
        "serve_waiting_tokens": 0,
        "serve_errors_total EmptyResponse": 1,
        "serve_errors_total RowTooLong": 1,
        "serve_reward_mean": approx(values.mean(), abs=1e-6),
        "serve_reward_std": approx(values.std(), abs=1e-6),
        "serve_tokens_total": stats["computed_tokens"],
    }

    local = RewardModel.load(tiny_export, "cpu", "float32")
    rows = [[prompts[i]] for i in (0, 1, 3)], [[responses[i]] for i in (0, 1, 3)]
    alone = sum(local.encode(make_rows(p, r)).groups[0].tokens for p, r in zip(*rows, strict=True))
    assert alone > stats["computed_tokens"]
    wait_for(tag, expected | {"serve_tokens_unshared_total": alone})

    second = metered.score(["Name a tree."], ["Oak."])
    values = np.append(values, second.values)
    (after,) = serve.get_app_handle("metered").broadcast("stats").results(timeout_s=60)
    assert after["computed_tokens"] > stats["computed_tokens"]
    moved = {
        "serve_requests_total": 2,
        "serve_rows_total": 6,
        "serve_latency_seconds_count": 2,
        "serve_tokens_total": after["computed_tokens"],
        "serve_reward_mean": approx(values.mean(), abs=1e-6),
        "serve_errors_total EmptyResponse": 1,
    }
    shown = wait_for(tag, moved)
    time.sleep(REMEMBERED_S)
    assert wait_for(tag, moved).keys() >= shown.keys(), "all is shown while nothing happens"


def test_what_a_version_tells_ends_with_it(
    cluster: None, tiny_export: Path, tmp_path: Path
) -> None:
    """In a replica that goes from one export to another, which has figures of held-out rewards."""
    evaluated = Path(shutil.copytree(tiny_export, tmp_path / "export"))
    record = read_export(evaluated)[1]
    record.name, record.reward_mean, record.reward_std = "evaluated", -1.0, 2.0
    record.write(evaluated)
    config = ServeConfig(export=str(tiny_export), dtype="float32", app="followed")
    old, new = read_export(tiny_export)[1].version, record.version
    deploy(config)
    try:
        RewardClient("followed").score(["Name a fruit."] * 2, ["Plum.", "A long pear."])
        told = {"serve_response_tokens": approx(2.125), "serve_current": 1}
        assert "serve_held_out_mean" not in wait_for(("version", old), told)
        deploy(config.model_copy(update={"export": str(evaluated)}))
        told = {"serve_current": 1, "serve_held_out_mean": -1, "serve_held_out_std": 2}
        assert "serve_reward_mean" not in wait_for(("version", new), told)
        # Until no step can be pinned to it.
        until(lambda: scrape("version", old).get("serve_current", 0) == 0)
        until(lambda: not scrape("version", old))
    finally:
        serve.delete("followed")


def test_the_rewards_of_equal_rows_count_as_often_as_they_were_asked_for(
    metered: RewardClient,
) -> None:
    scored = metered.score(["Name a nut."] * 4, ["Hazel."] * 3 + ["Pecan."])
    mean = scored.values.mean(dtype=np.float64)
    told = {"serve_reward_mean": approx(mean, abs=1e-6), "serve_repeated_responses": 0.5}
    wait_for(("application", "metered"), told)


def test_figures_are_shown_while_nothing_happens_and_until_the_run_ends(cluster: None) -> None:
    run, step = TrainMetrics("slow"), dict.fromkeys(STEP, 0.5) | {"step": 3}
    run.step(step | {"tokens": 10, "tokens_unshared": 20, "seconds": 2.0})
    run.evaluation(evaluation := dict.fromkeys(EVALUATION, 0.25) | {"step": 3})
    computed = {"tokens_per_second": 5, "tokens_saved": 0.5, "step_seconds": 2}
    told = {f"train_{key}": value for key, value in (evaluation | step | computed).items()}
    shown = wait_for(("run", "slow"), told)
    time.sleep(REMEMBERED_S)
    assert wait_for(("run", "slow"), told).keys() >= shown.keys()
    run.close()
    until(lambda: scrape("run", "slow").keys() == {"train_tokens_total"})


def test_a_request_that_fails_is_counted_as_an_error_of_its_rows(cluster: None) -> None:
    metrics = ServeMetrics()
    with pytest.raises(OverflowError), metrics.request(3), metrics.waiting(40, 60):
        raise OverflowError
    wait_for(("kind", "OverflowError"), {"serve_errors_total OverflowError": 3})


def events(directory: Path) -> dict[str, list[tuple[int, Any]]]:
    """Steps and values of every scalar, as TensorBoard shows them."""
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_a_resumed_run_withdraws_the_events_of_steps_it_takes_again(tmp_path: Path) -> None:
    figures = dict.fromkeys(STEP, 1.0) | {"tokens": 9, "tokens_unshared": 12, "seconds": 2.0}
    for first, last, loss in ((1, 5, 1.0), (4, 6, 2.0)):
        metrics = TrainMetrics("run", str(tmp_path), first - 1)
        for step in range(first, last + 1):
            metrics.step(figures | {"step": step, "loss": loss})
        metrics.close()
    assert events(tmp_path)["train/loss"] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_tensorboard_that_is_missing_is_named_before_anything_loads(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    values = config.model_dump(mode="json")
    TrainConfig(**{**values, "train": {}})
    with pytest.raises(ConfigError, match=r"train\.tensorboard .*pip install"):
        TrainConfig(**values)


class Counted:
    """A counter that can be read."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def inc(self, count: int, tags: dict[str, str]) -> None:
        self.counts[tags["kind"]] = self.counts.get(tags["kind"], 0) + count


def test_a_row_that_lacks_several_rewards_is_one_row_without_a_reward() -> None:
    metrics = object.__new__(ServeMetrics)
    counted = metrics.errors = Counted()  # type: ignore[assignment]
    long, failed = RowTooLong("long"), RowFailed("failed")
    none = np.zeros(3, dtype=bool)

    def rewards(*errors: RowError | None) -> Rewards:
        return Rewards(np.zeros(3, np.float32), list(errors), none, none, ["v"] * 3)

    metrics.failed([rewards(long, None, None), rewards(long, failed, None)])
    assert counted.counts == {"RowTooLong": 1, "RowFailed": 1}
