"""The wheel, installed where there is no checkout: the command trains, evaluates and serves."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from functools import partial
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path

import pytest

from tests.makers import make_base
from tests.service import free_ports

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files alone; all else is what this environment has."""
    source = tmp_path_factory.mktemp("source")
    for name in ("rayrm", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, cwd=site)
    return site


def test_what_it_imports_is_what_it_asks_for(installed: Path) -> None:
    (metadata,) = installed.glob("rayrm-*.dist-info")
    asked = PathDistribution(metadata).requires or []
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-") for line in asked}
    imported = {
        module.partition(".")[0]
        for file in (installed / "rayrm").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for module in modules(node)
    }
    foreign = imported - sys.stdlib_module_names - {"rayrm"}
    homes = packages_distributions()
    distributions = {m: {d.lower().replace("_", "-") for d in homes[m]} for m in foreign}
    assert {m for m, found in distributions.items() if not found & names} == set()


def modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_the_command_trains_evaluates_scores_and_serves_without_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets' paths must be short
    base = make_base(tmp_path / "base")
    words = ["red", "blue", "pink", "green"]
    pairs = [
        {"prompt": f"Name {n}.", "chosen": f"apples {word}", "rejected": f"pears {word}"}
        for n in range(8)
        for word in words
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "train.yaml").write_text(
        json.dumps(
            {
                "name": "wheel",
                "data": {"train": "pairs.jsonl", "eval": "pairs.jsonl", "max_length": 128},
                "model": {"path": str(base)},
                "train": {"learning_rate": 1e-2, "dtype": "float32"},
            }
        )
    )

    command = [sys.executable, str(installed / "bin/rayrm")]
    env = {**os.environ, "PYTHONPATH": str(installed), "RAY_TMPDIR": short}

    def rayrm(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=env,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    export = str(tmp_path / "runs/wheel/export")
    assert f"export: {export}" in rayrm("train", "train.yaml")
    assert "accuracy" in rayrm("evaluate", export, "pairs.jsonl")
    rows = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "32 rows scored" in rayrm("score", export, "rows.jsonl", "scored.jsonl")
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert all(isinstance(row["reward"], float) for row in scored)

    (port,) = free_ports(1)
    http = ["--http.enabled", "true", "--http.port", str(port), "--dtype", "float32"]
    serve = [*command, "serve", export, *http]
    # A test in the background ignores Ctrl-C, and what it starts would too.
    with subprocess.Popen(
        serve,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as it:
        assert it.stdout is not None
        try:
            assert any("Ctrl-C stops it" in line for line in it.stdout)
            body = json.dumps({"rows": rows[:4]}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/score", body, headers)
            with urllib.request.urlopen(request) as answered:
                values = json.load(answered)["values"]
            assert values == pytest.approx([row["reward"] for row in scored[:4]], abs=2e-2)
        finally:
            it.send_signal(signal.SIGINT)
    assert it.returncode == 0
