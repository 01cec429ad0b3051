"""Compare training in rayrm and TRL: losses and final rewards of 20 fp32 steps of 4 pairs.

Both start from the same checkpoint, head included, and see the same token ids in the same order.
rayrm uses Ray Train with two workers and ZeRO-2, and computes each prompt once. TRL's RewardTrainer
pads the pairs in one process, in a separate environment that `make parity` creates. Exits with 1 if
losses differ by more than 1e-3 or final rewards by more than 1e-2.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rayrm import RewardModel, TrainConfig, fit
from rayrm.config import at_home, local_path
from rayrm.data.records import read_groups
from rayrm.data.sample import generate
from rayrm.model.net import save_weights
from rayrm.packing import TokenGroup
from rayrm.training.dataset import PreferenceData, Schedule, encode_groups
from rayrm.training.setup import load_model

STEPS, PAIRS = 20, 4
LOSS_TOLERANCE, REWARD_TOLERANCE = 1e-3, 1e-2
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=at_home, default="SmolLM2-135M-Instruct", help="base model of both"
    )
    parser.add_argument(
        "--directory", type=local_path, default=Path("runs/parity"), help="for files; emptied first"
    )
    args = parser.parse_args()
    shutil.rmtree(args.directory, ignore_errors=True)
    args.directory.mkdir(parents=True)

    pairs = write_pairs(args.directory / "pairs.jsonl")
    config = make_config(args.model, pairs, args.directory)
    start, data = write_start(config, args.directory / "start")
    config.model.path = str(start)

    theirs = train_with_trl(config, data, args.directory / "ids.jsonl")
    ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    ours = fit(config)
    ray.shutdown()
    losses = np.array([[step["loss"] for step in ours.history], theirs["loss"]])
    rewards = np.array([score(ours.export, in_order(config, data)), theirs["rewards"]])
    sys.exit(report(losses, rewards))


def write_pairs(file: Path) -> Path:
    """Write one pair for each of the first prompts of the generated preferences."""
    records, _ = generate(0, STEPS * PAIRS, 0)
    first = {record["prompt"][0]["content"]: record for record in reversed(records)}
    file.write_text("".join(json.dumps(record) + "\n" for record in first.values()))
    return file


def make_config(model: str, pairs: Path, directory: Path) -> TrainConfig:
    return TrainConfig(
        name="rayrm",
        storage=str(directory),
        model={"path": model},
        data={"train": str(pairs), "max_length": 256, "overlong": "drop"},
        train={
            "groups_per_step": PAIRS,
            "learning_rate": 5e-5,
            "warmup_steps": 4,
            "weight_decay": 0.01,
            "dtype": "float32",
            "export_dtype": "float32",
        },
        deepspeed={"zero_stage": 2},
        cluster={"workers": 2},
    )


def write_start(config: TrainConfig, directory: Path) -> tuple[Path, PreferenceData]:
    """Write the checkpoint that both start from, head included; return it and the encoded pairs."""
    model, template = load_model(config)
    save_weights(model, model.state_dict(), directory, model.dtype)
    template.tokenizer.save_pretrained(directory)
    groups, _ = read_groups(config.data.train)
    return directory, encode_groups(groups, template, "error")


def in_order(config: TrainConfig, data: PreferenceData) -> list[list[list[int]]]:
    """Return the [chosen, rejected] ids of every pair, in the order that rayrm trains in."""
    train = config.train
    schedule = Schedule(
        len(data), train.groups_per_step, train.epochs, train.seed, data.fingerprint
    )
    groups = [data[i] for step in range(schedule.steps) for i in schedule[step]]
    return [[g.tokens.rows[i].tolist() for i in (*g.chosen, *g.rejected)] for g in groups]


def train_with_trl(config: TrainConfig, data: PreferenceData, file: Path) -> dict[str, Any]:
    """Train with TRL's RewardTrainer; return each step's loss and the final rewards [pairs, 2]."""
    keys = ("chosen_ids", "rejected_ids")
    lines = [json.dumps(dict(zip(keys, pair, strict=True))) for pair in in_order(config, data)]
    file.write_text("\n".join(lines))
    python = HERE.parent / ".venv-trl" / "bin" / "python"
    command: list[Any] = [python, HERE / "peers" / "train_trl.py", config.model.path, file]
    train = config.train
    command += ["--pairs-per-step", PAIRS, "--micro-batch", PAIRS, "--dtype", train.dtype]
    command += ["--learning-rate", train.learning_rate, "--warmup-steps", train.warmup_steps]
    command += ["--weight-decay", train.weight_decay, "--score"]
    run = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def score(export: str, pairs: list[list[list[int]]]) -> np.ndarray[Any, Any]:
    """Return the export's rewards [pairs, 2], computed in packs."""
    model = RewardModel.load(export, dtype="float32")
    rows = [TokenGroup.from_rows([np.array(ids, dtype=np.int32) for ids in p]) for p in pairs]
    return np.array(model.score_groups(rows))


def report(losses: np.ndarray[Any, Any], rewards: np.ndarray[Any, Any]) -> int:
    """Print the comparison and return the exit code.

    losses: [2, steps]. rewards: [2, pairs, 2]. Index 0 is rayrm, 1 is TRL.
    """
    print(f"\n{'step':>4}{'rayrm':>12}{'TRL':>12}{'difference':>14}")
    for step, (ours, theirs) in enumerate(losses.T, 1):
        print(f"{step:>4}{ours:>12.6f}{theirs:>12.6f}{abs(ours - theirs):>14.1e}")
    loss, reward = (float(np.abs(a - b).max()) for a, b in (losses, rewards))
    print(
        f"\nlargest difference of a loss {loss:.1e} (at most {LOSS_TOLERANCE:g}), of the final "
        f"reward of {rewards[0].size} rows {reward:.1e} (at most {REWARD_TOLERANCE:g}; their "
        f"standard deviation is {rewards[1].std():.2f})"
    )
    return int(loss > LOSS_TOLERANCE or reward > REWARD_TOLERANCE)


if __name__ == "__main__":
    main()
