"""Preference losses: each a config class and a pure function of rewards.

All of it in fp32. Rewards are [K], pairs index into them, results are sums that Pairs.weight
weighs: the caller divides by the weights of the whole optimizer step, so that a step's result does
not depend on how it was cut. Knows nothing of models, packs or ranks, and loads torch only where a
loss is computed, since configurations hold the classes.

To add a loss: a class, a function, and a place for both in Loss and LOSSES.
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

    label is the probability that chosen wins. choice int64 [N] counts from 0: the pairs of one are
    one response chosen before several. weight fp32 [N] is that of the pair, or of its choice. tie
    bool [N]: the two were judged equal, which only losses that use ties are given.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    label: Tensor
    choice: Tensor
    weight: Tensor
    tie: Tensor


class Objective(Section):
    """What a run minimises; the base of every loss's settings."""

    ranks: ClassVar[bool] = False
    """Sums over choices of one response out of several, of which all pairs belong together."""
    uses_ties: ClassVar[bool] = False
    """Sums over responses that were judged equal, too."""

    objective: str
    weighting: Literal["pair", "prompt"] = "pair"
    """What weighs the same in a step: every pair (in plackett_luce every choice of one response
    out of several), or every prompt, whose pairs are averaged."""


class BradleyTerry(Objective):
    """Each pair by itself."""

    objective: Literal["bradley_terry"] = "bradley_terry"
    centering: float = Field(0.0, ge=0)
    """Coefficient of (r_chosen + r_rejected)², which keeps rewards around 0."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels taken to be flipped."""


class PlackettLuce(Objective):
    """Each response against all that its record ranks below it."""

    ranks: ClassVar[bool] = True

    objective: Literal["plackett_luce"]


class RaoKupper(Objective):
    """Each pair by itself, and each two responses that a record ranks equal."""

    uses_ties: ClassVar[bool] = True

    objective: Literal["rao_kupper"]
    theta: float = Field(2.0, gt=1)
    """How readily two responses are judged equal: those of one quality with (θ-1)/(θ+1)."""


def bradley_terry(rewards: Tensor, pairs: Pairs, config: BradleyTerry) -> Tensor:
    """Weighted sum of the pairs' negative log-likelihoods under Bradley-Terry, a scalar.

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
    """Weighted sum of the choices' negative log-likelihoods under Plackett-Luce, a scalar.

    A choice of response c before the responses S costs -log(e^r_c / (e^r_c + Σ_s e^r_s)). Over a
    ranking, whose every response but the last is chosen before all below it, that sums to the
    negative log-likelihood of the ranking (Plackett 1975; ListMLE, Xia et al. 2008; for rewards,
    Zhu et al. 2023, arXiv:2301.11270). Over a pair it is Bradley-Terry.

    Tied responses are in neither's S: each is chosen before what ranks below both. By Luce's axiom
    (what else is on offer does not change the odds) every such factor is a probability under the
    model; that of all orders that break the ties would take a sum over factorially many.
    """
    import torch

    rewards = _in_fp32(rewards)
    behind = rewards[pairs.rejected] - rewards[pairs.chosen]
    # log(1 + Σ e^behind) by choice, with the largest exponent taken out. There are at most as many
    # choices as pairs; to ask a GPU how many would wait for it.
    zeros = torch.zeros_like(behind)
    largest = zeros.scatter_reduce(0, pairs.choice, behind.detach(), "amax")
    others = zeros.scatter_add(0, pairs.choice, (behind - largest[pairs.choice]).exp())
    loss = largest + torch.log1p(others + torch.expm1(-largest))
    weight = zeros.scatter(0, pairs.choice, pairs.weight.to(zeros.dtype))
    return (weight * loss).sum()


def rao_kupper(rewards: Tensor, pairs: Pairs, config: RaoKupper) -> Tensor:
    """Weighted sum of the pairs' and ties' negative log-likelihoods, a scalar.

    Bradley-Terry with ties (Rao and Kupper 1967; for rewards, Liu et al. 2024, arXiv:2410.05328).
    With d = r_c - r_r - margin: chosen wins with σ(d - log θ), rejected with σ(-d - log θ), and
    the two are judged equal with (θ²-1)·σ(d - log θ)·σ(-d - log θ); the three add up to 1.
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
    """At least; fp64 stays."""
    import torch

    assert rewards.ndim == 1, "rewards must be [K]: [K, 1] against [K] would broadcast to K by K"
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def _named(values: Any) -> Any:
    """Settings that name no objective are Bradley-Terry's."""
    return {"objective": "bradley_terry", **values} if isinstance(values, Mapping) else values


Loss = Annotated[
    BradleyTerry | PlackettLuce | RaoKupper,
    Field(discriminator="objective"),
    BeforeValidator(_named),
]

LOSSES: dict[str, Callable[[Tensor, Pairs, Any], Tensor]] = {
    "bradley_terry": bradley_terry,
    "plackett_luce": plackett_luce,
    "rao_kupper": rao_kupper,
}
