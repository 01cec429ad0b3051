"""The benchmark counts what agrees, and says what is absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import bench, bench_gpu
from tests.jobs.test_jobs import run
from tests.makers import make_base


class Answered:
    """A side that has answered."""

    def __init__(self, name: str, seconds: float, rewards: list[float]) -> None:
        self.name = name
        self.answers = [{"seconds": seconds, "rewards": rewards, "peak_bytes": 1}]

    def seconds(self) -> float:
        return float(self.answers[0]["seconds"])  # type: ignore[arg-type]


def test_a_prompt_counts_once_in_the_unique_tokens_of_a_step() -> None:
    step = bench.Step("", [[5, 6, 7]] * 2 + [[8]], [[5, 6, 7, 1], [5, 6, 7, 2, 3], [8, 9]])
    assert step.unique_tokens == 3 + 1 + 2 + 2


def test_a_ratio_is_given_only_where_the_rewards_agree() -> None:
    step = bench.grpo("", 2, 2, 99)
    rewards = np.random.default_rng(0).normal(size=4).tolist()
    sides = [
        Answered("rayrm", 2.0, rewards),
        Answered("vllm", 5.0, [r + 1e-3 for r in rewards]),
        Answered("padded", 5.0, rewards[::-1]),
    ]
    figures = bench.scoring_figures(step, sides, 1.0)["sides"]  # type: ignore[arg-type]
    assert figures["vllm"]["ratio"] == 2.5
    assert figures["padded"]["ratio"] is None
    assert figures["rayrm"]["of_ceiling"] == 0.5


def test_a_ratio_is_given_only_where_the_first_losses_agree() -> None:
    ours = {"loss": [0.7, 0.1], "seconds": [9.0, 2.0], "peak_bytes": 1}
    theirs = {"loss": [0.71, 0.4], "seconds": [9.0, 8.0], "peak_bytes": 1}
    others = {"loss": [0.9, 0.1], "seconds": [9.0, 8.0], "peak_bytes": 1}
    same = bench.training_figures({"rayrm": [ours], "trl": [theirs]}, [4, 4], 1.0)["sides"]
    assert same["trl"]["ratio"] == 4.0
    assert same["rayrm"]["per_second"] == 2.0
    assert (
        bench.training_figures({"rayrm": [ours], "trl": [others]}, [4, 4], 1.0)["sides"]["trl"][
            "ratio"
        ]
        is None
    )


@pytest.mark.slow
def test_a_peer_without_its_environment_is_absent_and_the_others_are_measured(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    result = run(
        "-c",
        "import sys; from pathlib import Path; from jobs import bench\n"
        f"bench.PYTHON = {{peer: Path({str(tmp_path / 'none')!r}) for peer in bench.PYTHON}}\n"
        "sys.argv = ['bench', 'score-single-64', 'train-pairs', 'train-ranked', 'strict',\n"
        "            '--repeats', '1',\n"
        f"            '--model', {str(base)!r}, '--directory', {str(tmp_path / 'bench')!r}]\n"
        "bench.main()",
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "bench" / "figures.json").read_text())["workloads"]
    assert set(figures["score-single-64"]["sides"]) == {"rayrm", "padded"}
    assert set(figures["train-pairs"]["sides"]) == {"rayrm"}
    assert figures["train-pairs"]["pairs_per_step"] == 16
    assert set(figures["train-ranked"]["sides"]) == {"rayrm"}
    assert figures["train-ranked"]["pairs_per_step"] > 1
    assert "absent" in result.stdout
    assert figures["strict"]["ratio"] > 0
    assert figures["strict"]["moved"]["loose"] > figures["strict"]["moved"]["strict"] == 0


def test_the_bench_of_a_gpu_runs_on_cpu_too_and_its_sides_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {("llama", "tiny"): (64, 2, 4, 2, 128), ("qwen2", "tiny"): (64, 2, 4, 2, 128)}
    monkeypatch.setattr(bench_gpu, "SHAPES", tiny)
    question = bench.grpo("tiny", 4, 3, 49152).save(tmp_path)
    files = [question["rows"], question["prompts"], str(tmp_path / "figures.json")]
    command = ["bench_gpu.py", *files, "--device", "cpu", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", command)
    bench_gpu.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name in ("llama tiny", "qwen2 tiny"):
        assert figures[name]["correlation"] > 0.99 and figures[name]["of_padded"] > 0
        assert figures[name]["of_matrix_rate"] > 0 and figures[name]["train_of_matrix_rate"] > 0
    assert capsys.readouterr().out.count(" tiny") == 2
