"""Define preference losses; each is a config class and a pure function of rewards.

Losses are computed in fp32. Rewards are [K], pairs index into them, and a result is a sum weighted
by Pairs.weight: the caller divides by the total weight of the optimizer step, so that a step's
result does not depend on how it was split. Does not know about models, packs or ranks. Imports
torch only inside the functions, because configs import the classes.

To add a loss, write a class and a function, and add them to Loss and LOSSES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from rayrm.config import Section

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """N preferred pairs over K rewards: chosen and rejected int64 [N], margin and label fp32 [N].

    label: probability that chosen wins. choice int64 [N], from 0: pairs with the same choice are
    one response chosen over several. weight fp32 [N]: weight of the pair, or of its whole choice.
    tie bool [N]: the two were judged equal; only losses that use ties get ties.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    label: Tensor
    choice: Tensor
    weight: Tensor
    tie: Tensor


class Objective(Section):
    """The base class of every loss's settings."""

    ranks: ClassVar[bool] = False
    """The loss sums over choices of one response out of several; a choice's pairs stay together."""
    uses_ties: ClassVar[bool] = False
    """The loss also sums over pairs of responses that were judged equal."""

    objective: str
    weighting: Literal["pair", "prompt"] = "pair"
    """What has equal weight in a step. pair: every pair, or in plackett_luce every choice of one
    response out of several. prompt: every prompt; its pairs or choices are averaged."""


class BradleyTerry(Objective):
    """One loss term per pair."""

    objective: Literal["bradley_terry"] = "bradley_terry"
    centering: float = Field(0.0, ge=0)
    """Coefficient of (r_chosen + r_rejected)², which keeps rewards around 0."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels that are assumed to be flipped."""


class PlackettLuce(Objective):
    """One loss term per choice: a response against all responses that its record ranks below it."""

    ranks: ClassVar[bool] = True

    objective: Literal["plackett_luce"]


class RaoKupper(Objective):
    """One loss term per pair, and per two responses that a record ranks equal."""

    uses_ties: ClassVar[bool] = True

    objective: Literal["rao_kupper"]
    theta: float = Field(2.0, gt=1)
    """How readily two responses tie: with equal rewards, with probability (θ-1)/(θ+1)."""


def bradley_terry(rewards: Tensor, pairs: Pairs, config: BradleyTerry) -> Tensor:
    """Return the weighted sum of the pairs' negative log-likelihoods under Bradley-Terry.

    Per pair, with d = r_c - r_r - margin and p the label: -p·log σ(d) - (1-p)·log σ(-d)
    (InstructGPT eq. 1, arXiv:2203.02155; margin: Llama 2 eq. 2, arXiv:2307.09288). Label smoothing
    ε turns p into p(1-ε) + (1-p)ε (cDPO). Centering adds coef·(r_c + r_r)² (arXiv:2312.09244).
    """
    from torch.nn.functional import logsigmoid

    rewards = _in_fp32(rewards)
    chosen, rejected = rewards[pairs.chosen], rewards[pairs.rejected]
    difference = chosen - rejected - pairs.margin
    flipped = config.label_smoothing
    label = pairs.label * (1 - flipped) + (1 - pairs.label) * flipped
    loss = -(label * logsigmoid(difference) + (1 - label) * logsigmoid(-difference))
    return (pairs.weight * (loss + config.centering * (chosen + rejected) ** 2)).sum()


def plackett_luce(rewards: Tensor, pairs: Pairs, config: PlackettLuce) -> Tensor:
    """Return the weighted sum of the choices' negative log-likelihoods under Plackett-Luce.

    A choice of response c over the responses S costs -log(e^r_c / (e^r_c + Σ_s e^r_s)). In a
    ranking every response but the last is chosen over all below it, and the costs add up to the
    negative log-likelihood of the ranking (Plackett 1975; ListMLE, Xia et al. 2008; for rewards,
    Zhu et al. 2023, arXiv:2301.11270). For a pair it equals Bradley-Terry.

    Tied responses are not in each other's S: each is chosen over the responses below both. By
    Luce's axiom (other options do not change the odds of two) each factor is a probability under
    the model. The likelihood of all orders that break the ties would be a sum over factorially
    many.
    """
    import torch

    rewards = _in_fp32(rewards)
    gap = rewards[pairs.rejected] - rewards[pairs.chosen]
    # log(1 + Σ e^gap) per choice, stabilized by the largest gap. Buffers have one entry per pair,
    # enough for all choices, because counting the choices would synchronize the GPU.
    zeros = torch.zeros_like(gap)
    largest = zeros.scatter_reduce(0, pairs.choice, gap.detach(), "amax")
    scaled_sum = zeros.scatter_add(0, pairs.choice, (gap - largest[pairs.choice]).exp())
    loss = largest + torch.log1p(scaled_sum + torch.expm1(-largest))
    weight = zeros.scatter(0, pairs.choice, pairs.weight.to(zeros.dtype))
    return (weight * loss).sum()


def rao_kupper(rewards: Tensor, pairs: Pairs, config: RaoKupper) -> Tensor:
    """Return the weighted sum of the pairs' and ties' negative log-likelihoods under Rao-Kupper.

    Bradley-Terry with ties (Rao and Kupper 1967; for rewards, Liu et al. 2024, arXiv:2410.05328).
    With d = r_c - r_r - margin, chosen wins with probability σ(d - log θ), rejected with
    σ(-d - log θ), and they tie with (θ²-1)·σ(d - log θ)·σ(-d - log θ); the three add up to 1.
    """
    from torch import where
    from torch.nn.functional import logsigmoid

    rewards = _in_fp32(rewards)
    difference = rewards[pairs.chosen] - rewards[pairs.rejected] - pairs.margin
    wins = logsigmoid(difference - math.log(config.theta))
    loses = logsigmoid(-difference - math.log(config.theta))
    equal = wins + loses + math.log(config.theta**2 - 1)
    decided = pairs.label * wins + (1 - pairs.label) * loses
    return -(pairs.weight * where(pairs.tie, equal, decided)).sum()


def _in_fp32(rewards: Tensor) -> Tensor:
    """Return rewards in fp32; fp64 stays fp64."""
    import torch

    assert rewards.ndim == 1, "rewards must be [K]: [K, 1] against [K] would broadcast to K by K"
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def _with_default_objective(values: Any) -> Any:
    """Return settings with the objective bradley_terry if they name none."""
    return {"objective": "bradley_terry", **values} if isinstance(values, Mapping) else values


Loss = Annotated[
    BradleyTerry | PlackettLuce | RaoKupper,
    Field(discriminator="objective"),
    BeforeValidator(_with_default_objective),
]

LOSSES: dict[str, Callable[[Tensor, Pairs, Any], Tensor]] = {
    "bradley_terry": bradley_terry,
    "plackett_luce": plackett_luce,
    "rao_kupper": rao_kupper,
}
