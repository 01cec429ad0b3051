"""Dashboard and alert rules on a real Prometheus, while a run trains and a policy goes astray.

The reward model is trained on preferences that have a bias, as people's have: whatever is said more
often is preferred. The policy first answers like the held-out data, then finds that out, then says
one thing to everything. Needs prometheus and promtool, which Debian has as the package prometheus.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve

from rayrm import RewardClient, ServeConfig, TrainConfig, deploy, fit
from rayrm.errors import EmptyResponse
from rayrm.model.export import read_export
from rayrm.serving.operations import try_out
from tests.makers import make_base
from tests.service import free_ports, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

DEPLOY = Path(__file__).parent.parent.parent / "jobs/deploy"
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

APP, RUN = "watched", "biased"
USUAL = 7, 9  # fruits in an answer
SWEET, SOUR = ["plum", "fig", "date"], ["quince", "sloe", "lime"]
SECONDS = 2  # instead of a rule's minutes


class Prometheus:
    """Our config and rules, but for where targets are listed and how long is waited."""

    def __init__(self, directory: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}/api/v1"
        self.started = time.time()
        rules = (DEPLOY / "alerts.yaml").read_text()
        (directory / "alerts.yaml").write_text(re.sub(r"for: \d+m", f"for: {SECONDS}s", rules))
        node = ray.nodes()[0]
        targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"]
        (directory / "targets.json").write_text(json.dumps([{"targets": targets}]))
        config = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
        config["global"] = dict.fromkeys(config["global"], "1s")
        (scrape,) = config["scrape_configs"]
        scrape["file_sd_configs"][0]["files"] = [str(directory / "targets.json")]
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
        flags = {
            "config.file": directory / "prometheus.yaml",
            "storage.tsdb.path": directory / "data",
            "web.listen-address": f"127.0.0.1:{port}",
        }
        self.log = directory / "prometheus.log"
        with self.log.open("w") as log:
            command = [installed("prometheus"), *(f"--{flag}={v}" for flag, v in flags.items())]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self.scrapes)

    def scrapes(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return bool(self.ask("query", query="up == 1"))
        except OSError:
            return False

    def ask(self, what: str, **parameters: Any) -> list[dict[str, Any]]:
        """The series that it answers with."""
        with urllib.request.urlopen(f"{self.url}/{what}?{urllib.parse.urlencode(parameters)}") as r:
            series: list[dict[str, Any]] = json.load(r)["data"]["result"]
        return series

    def shown(self, expression: str) -> bool:
        """Whether there was a value at any moment so far."""
        end = time.time()
        series = self.ask("query_range", query=expression, start=self.started, end=end, step=1)
        return any(value != "NaN" for each in series for _, value in each["values"])

    def firing(self) -> set[str]:
        alerts = self.ask("query", query='ALERTS{alertstate="firing"}')
        return {alert["metric"]["alertname"].removeprefix("Rayrm") for alert in alerts}


def installed(program: str) -> str:
    path = shutil.which(program)
    assert path, f"{program} is not here: apt-get install prometheus"
    return path


@pytest.fixture(scope="module")
def prometheus(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"))
    yield prometheus
    prometheus.process.terminate()
    prometheus.process.wait(30)


def answer(luck: random.Random, fruits: list[str], count: int) -> str:
    return " ".join(luck.choices(fruits, k=count))


def write_preferences(file: Path, seed: int, pairs: int) -> Path:
    """Mostly sweet fruits are preferred to sour ones, and more to fewer."""
    luck = random.Random(seed)
    with file.open("w") as lines:
        for i in range(pairs):
            fruits, count = luck.choice([SWEET, SOUR]), luck.randint(*USUAL)
            better, worse = answer(luck, SWEET, count), answer(luck, SOUR, count)
            if i % 2:
                better, worse = answer(luck, fruits, USUAL[1]), answer(luck, fruits, USUAL[0])
            chosen, rejected = (better, worse) if luck.random() < 0.8 else (worse, better)
            pair = {"prompt": f"Name fruit {i}", "chosen": chosen, "rejected": rejected}
            lines.write(json.dumps(pair) + "\n")
    return file


@pytest.fixture(scope="module")
def export(prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("watch")
    config = TrainConfig(
        name=RUN,
        storage=str(directory),
        model={"path": str(make_base(directory / "base", initializer_range=0.05))},
        data={
            "train": str(write_preferences(directory / "train.jsonl", 0, 480)),
            "eval": str(write_preferences(directory / "eval.jsonl", 1, 96)),
            "max_length": 256,
        },
        train={
            "groups_per_step": 16,
            "epochs": 2,
            "learning_rate": 3e-3,
            "dtype": "float32",
            "export_dtype": "float32",
            "eval_every": 10,
            "checkpoint_every": 10,
        },
        deepspeed={"zero_stage": 1},
    )
    result = fit(config)
    assert result.metrics["accuracy"] > 0.6, result.metrics
    return result.export


@pytest.fixture(scope="module")
def client(prometheus: Prometheus, export: str) -> Iterator[RewardClient]:
    """The export behind one replica, which a copy of it shadows."""
    deploy(
        ServeConfig(
            export=export, dtype="float32", app=APP, tokens_per_pack=512, max_queue_tokens=2048
        )
    )
    copy = Path(shutil.copytree(export, Path(export).parent / "copy"))
    record = read_export(copy)[1]
    record.model_copy(update={"name": "copy"}).write(copy)
    try_out(APP, str(copy))
    yield RewardClient(APP)
    serve.delete(APP)


def step(client: RewardClient, answers: Callable[[], str]) -> None:
    """64 questions, four answers to each."""
    prompts = [f"Name fruit {number}" for number in range(64)]
    client.score(prompts, groups=[[answers() for _ in range(4)] for _ in prompts])


def test_a_policy_that_answers_like_the_held_out_data_raises_no_alert(
    prometheus: Prometheus, client: RewardClient
) -> None:
    luck = random.Random(2)
    for _ in range(4):
        step(client, lambda: answer(luck, luck.choice([SWEET, SOUR]), luck.randint(*USUAL)))
    until(lambda: prometheus.shown("ray_rayrm_serve_reward_mean"))
    time.sleep(2 * SECONDS + 2)
    assert prometheus.firing() == set()


def test_a_policy_that_says_ever_more_raises_the_alert(
    prometheus: Prometheus, client: RewardClient
) -> None:
    luck = random.Random(3)
    for count in (14, 20, 27, 34):
        step(client, lambda: answer(luck, SWEET, luck.randint(count, count + 5)))  # noqa: B023
    until(lambda: {"RewardFollowsLength", "RewardsLeaveHeldOut"} <= prometheus.firing())


def test_a_policy_that_says_one_thing_to_everything_raises_the_alert(
    prometheus: Prometheus, client: RewardClient
) -> None:
    for _ in range(4):
        step(client, lambda: "plum " * 30 + "plum")
    until(lambda: {"ResponsesRepeat", "RewardsAlike"} <= prometheus.firing())
    assert "RewardFollowsLength" not in prometheus.firing(), "it is over"


@pytest.fixture(scope="module")
def everything(prometheus: Prometheus, client: RewardClient) -> Prometheus:
    """After what counters count besides: a row without a reward, refusals, rows not shadowed."""
    assert isinstance(client.score(["Name a fruit"], [""]).errors[0], EmptyResponse)
    luck = random.Random(4)
    prompts = [f"Name fruit {number}" for number in range(400)]
    callers = [RewardClient(APP, caller=f"caller {n}") for n in range(4)]
    steps = [
        caller.submit(prompts, [answer(luck, SWEET + SOUR, 30) for _ in prompts])
        for caller in callers
    ]
    for each in steps:
        each.result()
    return prometheus


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_of_the_dashboard_shows_something(
    everything: Prometheus, panel: dict[str, Any]
) -> None:
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "20s")
        expression = re.sub(r"\$(application|run)", ".*", expression)
        until(lambda: everything.shown(expression))  # noqa: B023 a rate needs two scrapes


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_rule_looks_at_something(everything: Prometheus, rule: dict[str, Any]) -> None:
    """Its expression up to what is too much."""
    looked_at, limit = rule["expr"].splitlines()
    assert re.match(r"[<>=]", limit)
    until(lambda: everything.shown(looked_at))


def test_each_alert_is_raised_by_what_it_is_for_and_by_nothing_else() -> None:
    tests = Path(__file__).parent.parent / "alerts.yaml"
    done = subprocess.run(
        [installed("promtool"), "test", "rules", tests], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(rule["alert"] in tests.read_text() for rule in RULES)
