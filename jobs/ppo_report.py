"""Report the results of jobs/ppo.py runs: jobs/ppo_report.py PICTURE RUN/ppo.json …

Prints a table row for each seed: reward (as the learner sees it), latent quality and finished share
of responses to held-out prompts, before → after training, the first two with the paired t over the
prompts; KL, clipping, seconds and the share of them spent waiting for rewards. Draws reward and KL.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from rayrm.config import local_path

COLUMNS = "seed, reward, t, quality, t, finished, KL, clipped, seconds, waited"


def paired_t(before: Sequence[float], after: Sequence[float]) -> float:
    """Return Student's t of the paired differences, 0 if all differences are equal."""
    gains = [b - a for a, b in zip(before, after, strict=True)]
    spread = stdev(gains)
    return fmean(gains) / (spread / math.sqrt(len(gains))) if spread else 0.0


def outcome(run: dict[str, Any]) -> str:
    """Return a run as a row of the table; KL is the last step's, clipping the mean of all steps."""
    history, row = run["history"], [str(run["settings"]["seed"])]
    for key in ("reward", "quality", "finished"):
        before, after = ([judged[key] for judged in run[when]] for when in ("before", "after"))
        row += [f"{fmean(before):.2f} → {fmean(after):.2f}", f"{paired_t(before, after):.1f}"]
    del row[-1]  # the share of finished responses gets no t
    seconds, waited = (sum(h[key] for h in history) for key in ("seconds", "waited"))
    row += [f"{history[-1]['kl']:.1f}", f"{fmean(h['clipped'] for h in history):.3f}"]
    return f"| {' | '.join([*row, f'{seconds:.0f}', f'{waited / seconds:.1%}'])} |"


def draw(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot reward and KL to the reference over the steps, one line per seed."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    titles = {"reward": "mean reward", "kl": "KL to the reference, nats per response"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for run in runs:
            steps, values = ([h[k] for h in run["history"]] for k in ("step", key))
            axes.plot(steps, values, label=f"seed {run['settings']['seed']}")
        axes.set(title=title, xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("picture", type=local_path)
    parser.add_argument("runs", type=local_path, nargs="+")
    args = parser.parse_args()
    runs = [json.loads(file.read_text()) for file in args.runs]
    print(f"| {COLUMNS.replace(', ', ' | ')} |\n{'|---' * len(COLUMNS.split(','))}|")
    for run in runs:
        print(outcome(run))
    draw(runs, args.picture)


if __name__ == "__main__":
    main()
