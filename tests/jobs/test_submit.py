"""Jobs as a user submits them, on a head of their own with token authentication."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest

from rayrm import RewardModel
from tests.makers import make_base
from tests.service import free_ports, samples_at

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent

PROMPTS = ["Name a fruit.", "Name a fruit.", "Name a colour."]
RESPONSES = ["Plum.", "", "Blue."]

SCORE = f"""
import json, ray, rayrm
ray.init()
rewards = rayrm.RewardClient().score({PROMPTS!r}, {RESPONSES!r})
errors = [type(error).__name__ for error in rewards.errors]
print(json.dumps([rewards.values.tolist(), errors, rewards.versions[0], rayrm.__file__]))
"""


@dataclass(frozen=True)
class Head:
    """A cluster of one node: its dashboard, its files and the environment that reaches it."""

    url: str
    directory: Path
    environment: dict[str, str]

    def submit(self, *entrypoint: str | Path) -> subprocess.CompletedProcess[str]:
        """Follow a job of this checkout to its end; stdout holds all that the user sees."""
        options = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml"]
        return subprocess.run(
            [BIN / "ray", "job", "submit", *options, "--", "python", *map(str, entrypoint)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def get(self, path: str, token: str | None = None) -> Any:
        """What the dashboard's API tells."""
        token = token or (self.directory / "home/.ray/auth_token").read_text()
        headers = {"Authorization": f"Bearer {token}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, None, headers)) as told:
            return json.load(told)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    directory = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))  # sockets' paths must be short
    gcs, dashboard, agent, client = free_ports(4)
    url = f"http://127.0.0.1:{dashboard}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {
        "HOME": str(directory / "home"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": url,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody else's requests to wait for
    }
    subprocess.run(
        [BIN / "ray", "get-auth-token", "--generate"],
        env=environment,
        capture_output=True,
        check=True,
    )
    flags = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "min-worker-port": 0,  # any that is free
        "max-worker-port": 0,
        "temp-dir": directory,
        "num-cpus": 4,
        "object-store-memory": 128 * 2**20,
        "system-config": json.dumps({"metrics_report_interval_ms": 1000}),
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{flag}={value}" for flag, value in flags.items()]
    with (directory / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        head = Head(url, directory, environment)
        until = time.monotonic() + 300
        while not answers(head):
            assert process.poll() is None and time.monotonic() < until, log
            time.sleep(0.5)
        yield head
    finally:
        process.terminate()  # ends what it started, too
        process.wait(60)
        shutil.rmtree(directory, ignore_errors=True)


def answers(head: Head) -> bool:
    try:
        return bool(head.get("/api/version"))
    except (URLError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model and twelve pairs, outside of what a job uploads."""
    directory = tmp_path_factory.mktemp("job")
    make_base(directory / "base")
    pairs = [
        {"prompt": f"Name fruit {i}", "chosen": "apples", "rejected": "pears " * i}
        for i in range(1, 13)
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return directory


def train(files: Path, name: str, data: str = "pairs.jsonl") -> list[str | Path]:
    return [
        "jobs/train.py",
        "jobs/configs/quickstart.yaml",
        *("--name", name, "--storage", files / "runs"),
        *("--model.path", files / "base"),
        *("--data.train", files / data, "--data.eval", files / "pairs.jsonl"),
        *("--train.groups_per_step", "4", "--train.warmup_steps", "0"),
        *("--cluster.workers", "1"),
    ]


@pytest.fixture(scope="module")
def trained(head: Head, files: Path) -> subprocess.CompletedProcess[str]:
    return head.submit(*train(files, "fruit"))


@pytest.fixture(scope="module")
def deployed(
    head: Head, files: Path, trained: subprocess.CompletedProcess[str]
) -> subprocess.CompletedProcess[str]:
    return head.submit("jobs/serve.py", files / "runs/fruit/export", "--dtype", "float32")


@pytest.fixture(scope="module")
def scored(
    head: Head, deployed: subprocess.CompletedProcess[str]
) -> subprocess.CompletedProcess[str]:
    return head.submit("-c", SCORE)


def test_nothing_is_told_without_the_token(head: Head) -> None:
    for token in ("wrong", "0" * 64):
        with pytest.raises(HTTPError) as refused:
            head.get("/api/jobs/", token)
        assert refused.value.code in (401, 403)
    strangers = {**head.environment, "HOME": str(head.directory)}
    refusal = Head(head.url, head.directory, strangers).submit("-c", "print(1)")
    assert refusal.returncode != 0 and "uthentication" in refusal.stdout


def test_a_job_trains_and_its_log_is_followed(
    trained: subprocess.CompletedProcess[str], files: Path
) -> None:
    assert trained.returncode == 0, trained.stdout
    assert f"export: {files}/runs/fruit/export" in trained.stdout
    assert re.search(r"held-out accuracy: [01]\.\d+ on 12 pairs", trained.stdout)
    assert "training fruit" in trained.stdout and "3/3" in trained.stdout


def test_a_job_that_cannot_go_on_fails_with_the_typed_error(head: Head, files: Path) -> None:
    (files / "bad.jsonl").write_text('{"prompt": "Name one", "chosen": "apples", "rejected": ""}\n')
    wrong = head.submit(*train(files, "wrong"), "--train.epoch", "3")
    bad = head.submit(*train(files, "bad", "bad.jsonl"))
    for failed, error in (
        (wrong, "ConfigError: unknown key 'train.epoch'; did you mean 'epochs'?"),
        (bad, f"DataError: {files / 'bad.jsonl'}, row 1: `rejected` is empty"),
    ):
        assert failed.returncode == 1, failed.stdout
        assert failed.stdout.rstrip().splitlines()[-1].startswith(error), failed.stdout
        assert failed.stdout.count("Traceback") <= 1, failed.stdout
    codes = [job["driver_exit_code"] for job in head.get("/api/jobs/") if job["status"] == "FAILED"]
    assert codes == [1, 1]


def test_an_application_outlives_its_job_and_a_third_job_scores(
    files: Path,
    deployed: subprocess.CompletedProcess[str],
    scored: subprocess.CompletedProcess[str],
) -> None:
    assert deployed.returncode == 0, deployed.stdout
    assert "application 'rayrm' serves fruit@" in deployed.stdout
    assert scored.returncode == 0, scored.stdout
    line = next(line for line in scored.stdout.splitlines() if line.startswith("[["))
    values, errors, version, package = json.loads(line)
    local = RewardModel.load(files / "runs/fruit/export", "cpu", "float32")
    np.testing.assert_allclose(values, local.score(PROMPTS, RESPONSES).values, atol=1e-5)
    assert errors == ["NoneType", "EmptyResponse", "NoneType"]
    assert version == local.version
    assert "working_dir_files" in package, "the code that ran is what was submitted"


def test_run_job_and_application_are_found_through_the_dashboard(
    head: Head,
    trained: subprocess.CompletedProcess[str],
    deployed: subprocess.CompletedProcess[str],
) -> None:
    (run,) = [r for r in head.get("/api/train/v2/runs/v1")["train_runs"] if r["name"] == "fruit"]
    assert run["status"] == "FINISHED"
    assert run["run_settings"]["train_loop_config"]["train"]["groups_per_step"] == 4
    submitted = {job["submission_id"]: job for job in head.get("/api/jobs/")}
    job = submitted[run["job_details"]["submission_id"]]
    assert job["status"] == "SUCCEEDED" and "jobs/train.py" in job["entrypoint"]
    application = head.get("/api/serve/applications/")["applications"]["rayrm"]
    assert application["status"] == "RUNNING"
    assert application["deployments"]["Replica"]["replicas"][0]["state"] == "RUNNING"


def test_prometheus_finds_what_was_trained_and_scored(
    head: Head, files: Path, scored: subprocess.CompletedProcess[str]
) -> None:
    discovery = head.directory / "session_latest/prom_metrics_service_discovery.json"
    (targets,) = json.loads(discovery.read_text())
    urls = [f"http://{target}/metrics" for target in targets["targets"]]
    history = json.loads((files / "runs/fruit/export/rayrm.json").read_text())["history"]
    tokens = sum(figures["tokens"] for figures in history)
    until = time.monotonic() + 120
    while True:
        samples: dict[str, float] = {}
        for url in urls:
            samples |= samples_at(url, "run", "fruit") | samples_at(url, "application", "rayrm")
        if samples.get("serve_rows_total") == 3 and samples.get("train_tokens_total") == tokens:
            return
        assert time.monotonic() < until, samples
        time.sleep(0.5)
