"""Preference losses: pure functions of rewards. Know nothing of models, packs or ranks.

All of it in fp32 and with logsigmoid. Rewards are [K], pairs index into them, results are sums over
pairs: the caller divides by the pairs of the whole optimizer step, so that a step's result does
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

    label is the probability that chosen wins.
    """

    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    label: Tensor


def bradley_terry(
    rewards: Tensor, pairs: Pairs, *, centering: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """Summed negative log-likelihood of the pairs under Bradley-Terry, a scalar.

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
    return (loss + centering * (chosen + rejected) ** 2).sum()
