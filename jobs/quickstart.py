"""Generate preferences, train, evaluate, serve and score, on one small machine.

All files are in runs/quickstart/. A second run resumes or reuses the training; to start over,
run `make clean` or remove the directory.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

# Set before Ray and torch are imported: their default logs would bury the table.
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TRANSFORMERS_VERBOSITY": "error",
}
warnings.filterwarnings("ignore", category=FutureWarning)

import ray  # noqa: E402
import torch  # noqa: E402
from ray import serve  # noqa: E402

from rayrm import RewardClient, RewardModel, ServeConfig, TrainConfig, deploy, fit  # noqa: E402
from rayrm.data.records import Group, read_groups  # noqa: E402
from rayrm.data.sample import baseline_accuracy, write_sample  # noqa: E402
from rayrm.evaluation.evaluate import evaluate  # noqa: E402
from rayrm.model.hardware import fast_dtype, matrix_rate  # noqa: E402
from rayrm.model.net import DTYPES, RewardNet  # noqa: E402
from rayrm.training.setup import load_model  # noqa: E402

CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
RUN = Path("runs/quickstart")

# For CPUs without bf16 in hardware: 28 steps instead of 40, at a higher learning rate.
SLOW = ["--train.epochs", "0.7", "--train.learning_rate", "3e-4", "--train.warmup_steps", "3"]

# Tokens of the generated data, each prompt counted once, and parameters of the base's layers.
TRAIN_TOKENS, TEST_TOKENS, WEIGHTS = 78_700, 16_500, 106_000_000

# Seconds for starting processes, and the share of the remaining time spent in matrix products.
STARTING_S, PRODUCTS = 60, 0.5


class Actor:
    """A rollout worker that requests rewards; in PPO it would sample the responses itself."""

    def __init__(self) -> None:
        self.client = RewardClient()

    def step(self, groups: list[Group]) -> tuple[int, int]:
        """Score a step; return the number of responses, and of groups whose top one is a best one.

        A best response is one that is rejected in no preference.
        """
        prompts = [group.prompt for group in groups for _ in group.responses]
        responses = [response for group in groups for response in group.responses]
        rewards = iter(self.client.score(prompts, responses).values.tolist())
        best = 0
        for group in groups:
            values = [next(rewards) for _ in group.responses]
            beaten = {p.rejected for p in group.preferences}
            best += values.index(max(values)) not in beaten
        return len(responses), best


def main() -> None:
    started = time.perf_counter()
    dtype = fast_dtype("cpu")
    slow = dtype == "float32"
    config = TrainConfig.load(CONFIG, SLOW if slow else [])
    torch.set_num_threads(os.cpu_count() or 1)
    say(f"computing in {dtype}: about {expected_minutes(config, dtype):.0f} minutes expected")
    if slow:
        say("this CPU is slow in bfloat16: 28 steps, not 40; half the pairs to evaluate the base")

    say("1/5  generating preferences")
    train_file, test_file = write_sample(RUN / "data")
    test, _ = read_groups(str(test_file))

    say("2/5  evaluating the base model with an untrained head on held-out pairs")
    model, template = load_model(config)
    net = RewardNet(model) if slow else RewardNet(model, torch.bfloat16)
    untrained = RewardModel(net, template, tokens_per_pack=2048)
    before = evaluate(untrained, test[: len(test) // 2] if slow else test, progress=True)
    del untrained, model

    say("3/5  training with Ray Train and DeepSpeed ZeRO on two workers")
    ray.init(num_cpus=max(2, os.cpu_count() or 1), log_to_driver=False, logging_level=logging.ERROR)
    result = fit(config)

    say("4/5  deploying two replicas of the export")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    deploy(ServeConfig(export=result.export, replicas=2, tokens_per_pack=2048))

    say("5/5  scoring a step of groups from two actors")
    step = test[:64]
    remote_actor = ray.remote(Actor).options(num_cpus=0)
    actors: list[Any] = [remote_actor.remote() for _ in range(2)]
    began = time.perf_counter()
    scored = ray.get([a.step.remote(step[i::2]) for i, a in enumerate(actors)])
    seconds = time.perf_counter() - began
    serve.delete("rayrm")
    ray.shutdown()

    words = baseline_accuracy(records(train_file), records(test_file))
    print(accuracy_table(before, result.metrics, words))
    rewards, best = (sum(column) for column in zip(*scored, strict=True))
    tokens, unshared = (sum(h[k] for h in result.history) for k in ("tokens", "tokens_unshared"))
    training = sum(h["seconds"] for h in result.history)
    print(
        f"training: {len(result.history)} steps, {tokens / training:.0f} tokens/s, "
        f"{1 - tokens / unshared:.0%} of tokens saved by computing each prompt once\n"
        f"service:  {rewards} rewards in {seconds:.1f} s; highest reward on a best response in "
        f"{best} of {len(step)} groups\n"
        f"export:   {result.export}\n"
        f"report:   {result.report}\n"
        f"took {(time.perf_counter() - started) / 60:.1f} minutes"
    )


def expected_minutes(config: TrainConfig, dtype: str) -> float:
    """Estimate the total minutes from the matmul rate of this machine, measured for a second."""
    trained = config.train.epochs * TRAIN_TOKENS
    products = 2 * WEIGHTS * (3 * trained + 2 * TEST_TOKENS)
    return (STARTING_S + products / PRODUCTS / matrix_rate(DTYPES[dtype], 1.0)) / 60


def accuracy_table(before: dict[str, Any], after: dict[str, Any], words: float) -> str:
    """Return a table of held-out accuracy, base and trained, overall and by skill."""
    lines = ["", f"{'held-out accuracy':24}{'pairs':>7}{'base':>8}{'trained':>9}"]
    rows = [("all", before, after)]
    rows += [(f"  {k}", before["subsets"][k], after["subsets"][k]) for k in after["subsets"]]
    lines += [
        f"{name:24}{new['pairs']:>7}{old['accuracy']:>8.3f}{new['accuracy']:>9.3f}"
        for name, old, new in rows
    ]
    return "\n".join([*lines, f"{'bag of words + length':24}{'':7}{'':8}{words:>9.3f}", ""])


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def say(what: str) -> None:
    print(what, flush=True)


if __name__ == "__main__":
    main()
