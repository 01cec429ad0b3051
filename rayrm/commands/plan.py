"""Split the GPUs of a PPO run between learner, rollout workers and reward replicas.

    rayrm plan [--gpus 8 32 64] [--score 25000] [--generate 4000] [--train 9000]

Computes from throughputs in tokens per second and GPU, which you measure: --score with
`jobs/bench.py score-grpo`, --generate and --train in your own run. For every split of the GPUs it
computes the duration of a step if rewards are computed while the next step is sampled, as in
jobs/ppo.py, and prints the fastest split whose parts fit into memory. Does not know about networks,
stragglers, or a framework's activation memory; the assumed values are printed with the plan.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

GB = 1e9

# Bytes per parameter: bf16 weights; in training also bf16 gradients, fp32 weights, Adam's moments.
FROZEN = 2
TRAINED = 16


@dataclass(frozen=True)
class Run:
    """The models, lengths, GPUs and throughputs of a PPO run."""

    policy: float = 7e9
    """Number of parameters of the policy, and of the critic."""
    reward: float = 7e9
    """Number of parameters of the reward model."""
    memory: float = 80.0
    """Memory of a GPU in GB."""
    activations: float = 20.0
    """GB per GPU of the learner for all but weights, gradients and optimizer state."""
    cache: float = 131072.0
    """Bytes of KV cache per token: 2 · layers · key/value heads · head size · 2."""
    prompts: int = 128
    """Prompts per step."""
    responses: int = 8
    """Responses per prompt."""
    prompt: int = 512
    """Tokens per prompt."""
    response: int = 512
    """Tokens per response."""
    epochs: int = 1
    """Passes of the learner over the rows of a step."""
    score: float = 25_000.0
    """Tokens per second that a reward replica scores, on one GPU."""
    generate: float = 4_000.0
    """Tokens per second that a rollout worker samples, on one GPU."""
    train: float = 9_000.0
    """Tokens per second on which a GPU of the learner trains one model, policy or critic."""


@dataclass(frozen=True)
class Split:
    """Number of GPUs of each part, and seconds per step of its work."""

    learner: int
    rollout: int
    replicas: int
    sampling: float
    scoring: float
    learning: float

    @property
    def waiting(self) -> float:
        """Return the seconds of scoring that do not overlap with sampling."""
        return max(0.0, self.scoring - self.sampling)

    @property
    def step(self) -> float:
        """Return the duration of a step in seconds."""
        return self.sampling + self.waiting + self.learning


def best(run: Run, gpus: int) -> Split | None:
    """Return the split with the shortest step that fits into memory, None if none fits."""
    return min(splits(run, gpus), key=lambda split: (split.step, split.replicas), default=None)


def splits(run: Run, gpus: int) -> Iterator[Split]:
    """Yield all splits of the GPUs that fit into memory."""
    for replicas in range(1, gpus - 1):
        for rollout in range(1, gpus - replicas):
            learner = gpus - replicas - rollout
            if fits(run, learner, rollout):
                yield seconds(run, learner, rollout, replicas)


def seconds(run: Run, learner: int, rollout: int, replicas: int) -> Split:
    """Return the split with its times. Responses share their prompt in scoring, not in training."""
    rows = run.prompts * run.responses
    scored = run.prompts * (run.prompt + run.responses * run.response)
    trained = 2 * run.epochs * rows * (run.prompt + run.response)  # policy and critic
    return Split(
        learner,
        rollout,
        replicas,
        sampling=rows * run.response / (run.generate * rollout),
        scoring=scored / (run.score * replicas),
        learning=trained / (run.train * learner),
    )


def fits(run: Run, learner: int, rollout: int) -> bool:
    """Return whether every part fits into the memory of its GPUs."""
    return max(learner_gb(run, learner), rollout_gb(run, rollout), replica_gb(run)) <= run.memory


def learner_gb(run: Run, gpus: int) -> float:
    """Return GB per GPU: policy, critic and frozen reference under ZeRO-3, and activations."""
    return (2 * TRAINED + FROZEN) * run.policy / gpus / GB + run.activations


def rollout_gb(run: Run, gpus: int) -> float:
    """Return GB per GPU: the whole policy, and the KV cache of all its rows of a step."""
    rows = math.ceil(run.prompts / gpus) * run.responses
    return (FROZEN * run.policy + rows * (run.prompt + run.response) * run.cache) / GB


def replica_gb(run: Run) -> float:
    """Return GB per GPU: weights twice, because of hot swaps, and 4 GB for a pack's activations."""
    return 2 * FROZEN * run.reward / GB + 4


def describe(run: Run, gpus: int) -> str:
    """Return the best split as a row of the Markdown table."""
    split = best(run, gpus)
    if split is None:
        return f"| {gpus} | does not fit: no split gives every part enough memory |"
    memory = learner_gb(run, split.learner), rollout_gb(run, split.rollout), replica_gb(run)
    return " | ".join(
        [
            f"| {gpus}",
            f"{split.learner} ({memory[0]:.0f} GB each)",
            f"{split.rollout} ({memory[1]:.0f} GB)",
            f"{split.replicas} ({memory[2]:.0f} GB)",
            f"{split.rollout / split.replicas:.1f}",
            f"{split.step:.0f} s: {split.sampling:.0f} + {split.learning:.0f}",
            f"{split.scoring:.0f} s beside sampling",
            f"{split.waiting / split.step:.0%} |",
        ]
    )


HEADER = """
| GPUs | learner | rollout workers | reward replicas | workers a replica | step: sampling + learning | scoring | of a step spent waiting |
|---|---|---|---|---|---|---|---|"""  # noqa: E501


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 64], help="plan for each")
    for field in fields(Run):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args(arguments))
    counts = args.pop("gpus")
    run = replace(Run(), **args)
    print(", ".join(f"{field.name} {getattr(run, field.name):g}" for field in fields(Run)))
    print(HEADER)
    for gpus in counts:
        print(describe(run, gpus))
