"""Preference losses: pure functions of rewards. Know nothing of models, packs or ranks.

All of it in fp32. Rewards are [K], pairs index into them, results are sums that Pairs.weight
weighs: the caller divides by the weights of the whole optimizer step, so that a step's result does
not depend on how it was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """N preferred pairs over K rewards: chosen and rejected int64 [N], margin and label fp32 [N].

    label is the probability that chosen wins. choice int64 [N] counts from 0: the pairs of one are
    one response chosen before several. weight fp32 [N] is that of the pair, or of its choice.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    label: Tensor
    choice: Tensor
    weight: Tensor


def bradley_terry(
    rewards: Tensor, pairs: Pairs, *, centering: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted sum of the pairs' negative log-likelihoods under Bradley-Terry, a scalar.

    Per pair, with d = r_c - r_r - margin and p the label: -p·log σ(d) - (1-p)·log σ(-d)
    (InstructGPT eq. 1, arXiv:2203.02155; margin: Llama 2 eq. 2, arXiv:2307.09288). Label smoothing
    ε turns p into p(1-ε) + (1-p)ε (cDPO). Centering adds coef·(r_c + r_r)² (arXiv:2312.09244).
    """
    assert rewards.ndim == 1, "rewards must be [K]: [K, 1] against [K] would broadcast to K by K"
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    chosen, rejected = rewards[pairs.chosen], rewards[pairs.rejected]
    difference = chosen - rejected - pairs.margin
    label = pairs.label * (1 - label_smoothing) + (1 - pairs.label) * label_smoothing
    loss = -(label * F.logsigmoid(difference) + (1 - label) * F.logsigmoid(-difference))
    return (pairs.weight * (loss + centering * (chosen + rejected) ** 2)).sum()


def plackett_luce(rewards: Tensor, pairs: Pairs) -> Tensor:
    """Weighted sum of the choices' negative log-likelihoods under Plackett-Luce, a scalar.

    A choice of response c before the responses S costs -log(e^r_c / (e^r_c + Σ_s e^r_s)). Over a
    ranking, whose every response but the last is chosen before all below it, that sums to the
    negative log-likelihood of the ranking (Plackett 1975; ListMLE, Xia et al. 2008; for rewards,
    Zhu et al. 2023, arXiv:2301.11270). Over a pair it is Bradley-Terry.

    Tied responses are in neither's S: each is chosen before what ranks below both. By Luce's axiom
    (what else is on offer does not change the odds) every such factor is a probability under the
    model; that of all orders that break the ties would take a sum over factorially many.
    """
    assert rewards.ndim == 1, "rewards must be [K]: [K, 1] against [K] would broadcast to K by K"
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    behind = rewards[pairs.rejected] - rewards[pairs.chosen]
    # log(1 + Σ e^behind) by choice, with the largest exponent taken out. There are at most as many
    # choices as pairs; to ask a GPU how many would wait for it.
    zeros = torch.zeros_like(behind)
    largest = zeros.scatter_reduce(0, pairs.choice, behind.detach(), "amax")
    others = zeros.scatter_add(0, pairs.choice, (behind - largest[pairs.choice]).exp())
    loss = largest + torch.log1p(others + torch.expm1(-largest))
    weight = zeros.scatter(0, pairs.choice, pairs.weight.to(zeros.dtype))
    return (weight * loss).sum()
