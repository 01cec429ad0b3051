"""How many GPUs for what: policy, critic, rollout workers and reward replicas of a PPO run.

    rayrm plan [--gpus 8 32 64] [--score 25000] [--generate 4000] [--train 9000]

Arithmetic on tokens per second and GPU, which you measure: --score by `jobs/bench.py score-grpo`,
--generate and --train in a run of your own. For every split of the GPUs it computes how long a step
takes when rewards are computed while the next step is sampled, as in jobs/ppo.py, and prints the
shortest whose parts fit into memory. Knows nothing of networks, of stragglers, or of how a
framework lays out activations: what it assumes is printed with the plan.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

GB = 1e9

# Bytes a parameter: bf16 weights; and with bf16 gradients, fp32 weights and both moments of Adam.
FROZEN = 2
TRAINED = 16


@dataclass(frozen=True)
class Run:
    """What is trained, on what. Sizes in parameters, lengths in tokens, rates a GPU and second."""

    policy: float = 7e9
    """Parameters of the policy, and of the critic."""
    reward: float = 7e9
    """Parameters of the reward model."""
    memory: float = 80.0
    """GB of a GPU."""
    activations: float = 20.0
    """GB that a learner's GPU needs beside weights and optimizer."""
    cache: float = 131072.0
    """Bytes of keys and values a token: 2 · layers · key/value heads · head size · 2."""
    prompts: int = 128
    """Prompts of a step."""
    responses: int = 8
    """Responses to each prompt."""
    prompt: int = 512
    """Tokens of a prompt."""
    response: int = 512
    """Tokens of a response."""
    epochs: int = 1
    """Passes of the learner over a step."""
    score: float = 25_000.0
    """Tokens that a replica scores in a second, on one GPU."""
    generate: float = 4_000.0
    """Tokens that a rollout worker samples in a second, on one GPU."""
    train: float = 9_000.0
    """Tokens that a GPU of the learner trains policy or critic on in a second."""


@dataclass(frozen=True)
class Split:
    """GPUs of each part, and seconds of a step."""

    learner: int
    rollout: int
    replicas: int
    sampling: float
    scoring: float
    learning: float

    @property
    def waiting(self) -> float:
        """Scoring that sampling does not cover."""
        return max(0.0, self.scoring - self.sampling)

    @property
    def step(self) -> float:
        return self.sampling + self.waiting + self.learning


def best(run: Run, gpus: int) -> Split | None:
    """The split with the shortest step, of those that fit; None where none does."""
    return min(splits(run, gpus), key=lambda split: (split.step, split.replicas), default=None)


def splits(run: Run, gpus: int) -> Iterator[Split]:
    for replicas in range(1, gpus - 1):
        for rollout in range(1, gpus - replicas):
            learner = gpus - replicas - rollout
            if fits(run, learner, rollout):
                yield seconds(run, learner, rollout, replicas)


def seconds(run: Run, learner: int, rollout: int, replicas: int) -> Split:
    """Every prompt is scored once for its responses, and trained on once for each of them."""
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
    """Whether each part's share is within its GPUs' memory."""
    return max(learner_gb(run, learner), rollout_gb(run, rollout), replica_gb(run)) <= run.memory


def learner_gb(run: Run, gpus: int) -> float:
    """Of each GPU: policy and critic under ZeRO-3, the reference beside them."""
    return (2 * TRAINED + FROZEN) * run.policy / gpus / GB + run.activations


def rollout_gb(run: Run, gpus: int) -> float:
    """Of each GPU: a policy of its own, and keys and values of its share of the step at once."""
    rows = math.ceil(run.prompts / gpus) * run.responses
    return (FROZEN * run.policy + rows * (run.prompt + run.response) * run.cache) / GB


def replica_gb(run: Run) -> float:
    """Weights twice, since a new version is loaded beside the old one, and a pack's activations."""
    return 2 * FROZEN * run.reward / GB + 4


def describe(run: Run, gpus: int) -> str:
    split = best(run, gpus)
    if split is None:
        return f"| {gpus} | does not fit: no split leaves every part enough memory |"
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
