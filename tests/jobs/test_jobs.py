"""The commands: what they print, write and refuse, run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rayrm.model.hardware import fast_dtype
from tests.makers import make_export

ROOT = Path(__file__).parent.parent.parent


def run(
    *arguments: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("job", ["train", "serve", "evaluate", "score"])
def test_help_does_not_wait_for_torch_or_ray(job: str) -> None:
    code = (
        "import runpy, sys; sys.argv = ['job', '--help']\n"
        f"try: runpy.run_path('jobs/{job}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'ray', 'deepspeed'} & sys.modules.keys()))"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower() or "python jobs/" in result.stdout


def test_the_command_lists_what_it_does_and_loads_nothing_heavy() -> None:
    for arguments in ([], ["--help"], ["train", "--help"], ["serve", "-h"], ["plan", "--help"]):
        code = (
            "import sys; from rayrm.commands import main\n"
            f"try: main({arguments!r})\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "sys.exit(bool({'torch', 'ray', 'deepspeed'} & sys.modules.keys()))"
        )
        result = run("-c", code)
        assert result.returncode == 0, result.stderr
        assert "usage: rayrm" in result.stdout
    wrong = run("-c", "from rayrm.commands import main; main(['trian'])")
    assert wrong.returncode == 1 and "no command 'trian'" in wrong.stderr


def test_train_help_lists_every_override() -> None:
    text = run("jobs/train.py", "--help").stdout
    assert "--train.learning_rate" in text and "--deepspeed.zero_stage" in text


def test_a_wrong_override_stops_before_anything_loads() -> None:
    wrong = ["jobs/train.py", "jobs/configs/quickstart.yaml", "--train.epoch", "3"]
    result = run(*wrong)
    assert result.returncode == 1
    assert "train.epoch" in result.stderr and "epochs" in result.stderr
    assert "Traceback" not in result.stderr
    code = (
        f"import runpy, sys; sys.argv = {wrong!r}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: sys.exit(bool({'torch', 'ray', 'deepspeed'} & sys.modules.keys()))"
    )
    assert run("-c", code).returncode == 0


def test_evaluate_writes_all_figures_as_json(tiny_export: Path, tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    records = [
        {"prompt": f"Name {i}", "chosen": "apples", "rejected": "pears", "subset": "ab"[i % 2]}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "figures" / "out.json"
    result = run("jobs/evaluate.py", tiny_export, data, "--json", out)
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    assert figures["pairs"] == 6
    assert 0 <= figures["accuracy"] <= 1
    assert {k: v["pairs"] for k, v in figures["subsets"].items()} == {"a": 3, "b": 3}
    assert figures["version"].startswith("tiny@")
    assert "accuracy" in result.stdout


def test_evaluate_writes_a_report_of_two_exports(tiny_export: Path, tmp_path: Path) -> None:
    other = make_export(tmp_path, "qwen2")
    data = tmp_path / "rm-bench.json"
    records = [
        {"prompt": f"p{i}", "chosen": [*"abc"], "rejected": [*"def"], "domain": domain}
        for i, domain in enumerate(["chat", "code"])
    ]
    data.write_text(json.dumps(records))
    out = tmp_path / "figures.json"
    report = ("--report", tmp_path / "report")
    result = run("jobs/evaluate.py", tiny_export, data, "--against", other, *report, "--json", out)
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    columns = [figures, figures["against"]]
    assert [f["pairs"] for f in columns] == [18, 18]
    assert columns[0]["version"] != columns[1]["version"]
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines()[1:-1])
    for key in ("easy", "normal", "hard", "mean"):
        expected = [f"{f['rm_bench'][key]:.3f}" for f in columns]
        assert lines[f"RM-Bench {key}"].split() == expected
    assert lines["version"].split() == [f["version"] for f in columns]
    assert lines["dtype"].split() == [f["dtype"] for f in columns] == [fast_dtype("cpu")] * 2
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(f["version"] in page for f in columns)
    assert f"<td>{columns[1]['rm_bench']['hard']:.3f}</td>" in page
    assert result.stdout.endswith(f"report: {tmp_path}/report/report.html\n")


def test_paths_of_jobs_begin_at_the_users_home(tiny_export: Path, tmp_path: Path) -> None:
    """As a job gets them, for which no shell expands what stands in quotes or behind a =."""
    (tmp_path / "export").symlink_to(tiny_export)
    data = '{"prompt": "Name one", "chosen": "apples", "rejected": "pears"}\n'
    (tmp_path / "test.jsonl").write_text(data)
    files = ("~/test.jsonl", "--json=~/out/figures.json", "--report=~/report", "--dtype=float32")
    result = run("jobs/evaluate.py", "~/export", *files, env={"HOME": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["pairs"] == 1
    assert (tmp_path / "report" / "report.html").exists()
    result = run("jobs/score.py", "~/export", "~/a.jsonl", "~/a", env={"HOME": str(tmp_path)})
    assert f"{tmp_path / 'a'}: must end in" in result.stderr


def test_evaluate_says_what_is_missing_and_where(tiny_export: Path, tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text('{"prompt": "Name one", "chosen": "apples", "rejected": "pears"}\n')
    for export, records, missing in (
        (tmp_path / "no-export", data, "no-export"),
        (tiny_export, tmp_path / "no-data.jsonl", "no-data.jsonl"),
    ):
        result = run("jobs/evaluate.py", export, records)
        assert result.returncode == 1
        assert str(tmp_path / missing) in result.stderr
        assert "Error: " in result.stderr and "Traceback" not in result.stderr
