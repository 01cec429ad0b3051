"""The claim that rayrm trains as TRL does: make parity, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.makers import make_base

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_training_gives_the_losses_and_rewards_of_trl(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    subprocess.run(["make", ".venv-trl/.installed"], cwd=ROOT, check=True)
    command = [sys.executable, "jobs/parity.py", "--model", str(base)]
    command += ["--directory", str(tmp_path / "parity")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = [line.split() for line in run.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [int(step) for step, *_ in steps] == list(range(1, 21))
    losses = {float(loss) for _, loss, *_ in steps}
    assert len(losses) == 20 and "of 160 rows" in run.stdout
