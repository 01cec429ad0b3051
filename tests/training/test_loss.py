"""Bradley-Terry and Plackett-Luce by hand, and a step that does not depend on how it was cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
import torch

from rayrm.packing import TokenGroup
from rayrm.training import loss as losses
from rayrm.training.config import TrainConfig
from rayrm.training.loss import LOSSES, BradleyTerry, Pairs, PlackettLuce, RaoKupper
from tests.tiny import furthest, random_groups, scored, tiny_model


def bradley_terry(rewards: torch.Tensor, compared: Pairs, **settings: float) -> torch.Tensor:
    return losses.bradley_terry(rewards, compared, BradleyTerry(**settings))


def plackett_luce(rewards: torch.Tensor, compared: Pairs) -> torch.Tensor:
    return losses.plackett_luce(rewards, compared, PlackettLuce(objective="plackett_luce"))


def rao_kupper(rewards: torch.Tensor, compared: Pairs, theta: float) -> torch.Tensor:
    config = RaoKupper(objective="rao_kupper", theta=theta)
    return losses.rao_kupper(rewards, compared, config)


def pairs(
    chosen: Sequence[int],
    rejected: Sequence[int],
    margin: Sequence[float] | None = None,
    label: Sequence[float] | None = None,
    choice: Sequence[int] | None = None,
    weight: Sequence[float] | None = None,
    tie: Sequence[bool] | None = None,
) -> Pairs:
    """One choice for each chosen response, unless given; weights of 1, and no ties."""
    n = len(chosen)
    numbers = {c: i for i, c in enumerate(dict.fromkeys(chosen))}
    return Pairs(
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.tensor(margin or [0.0] * n),
        torch.tensor(label or [1.0] * n),
        torch.tensor(choice or [numbers[c] for c in chosen]),
        torch.tensor(weight or [1.0] * n),
        torch.tensor(tie or [False] * n),
    )


def ranking(order: Sequence[int]) -> tuple[list[int], list[int]]:
    """All pairs of a ranking, best first, the way round in which records may come."""
    both = [(order[i], order[j]) for j in range(len(order)) for i in range(j)]
    return [a for a, _ in both], [b for _, b in both]


# One pair with rewards 1.5 and 0.5. log(1 + e^-1) = 0.3132617, log(1 + e^1) = 1.3132617.
@pytest.mark.parametrize(
    ("margin", "label", "centering", "smoothing", "expected"),
    [
        (0.0, 1.0, 0.0, 0.0, 0.3132617),
        (0.5, 1.0, 0.0, 0.0, 0.4740770),  # log(1 + e^-0.5)
        (2.0, 1.0, 0.0, 0.0, 1.3132617),  # log(1 + e^1)
        (0.0, 1.0, 0.01, 0.0, 0.3532617),  # + 0.01 · (1.5 + 0.5)²
        (0.0, 1.0, 0.0, 0.1, 0.4132617),  # 0.9 · 0.3132617 + 0.1 · 1.3132617
        (0.0, 0.7, 0.0, 0.0, 0.6132617),  # 0.7 · 0.3132617 + 0.3 · 1.3132617
        (0.0, 0.0, 0.0, 0.0, 1.3132617),
        (0.0, 0.7, 0.0, 0.1, 0.6532617),  # p = 0.7 · 0.9 + 0.3 · 0.1 = 0.66
        (0.5, 0.7, 0.02, 0.0, 0.7040770),  # 0.7 · 0.4740770 + 0.3 · 0.9740770 + 0.02 · 4
    ],
)
def test_golden_values(
    margin: float, label: float, centering: float, smoothing: float, expected: float
) -> None:
    loss = bradley_terry(
        torch.tensor([1.5, 0.5]),
        pairs([0], [1], [margin], [label]),
        centering=centering,
        label_smoothing=smoothing,
    )
    assert loss.ndim == 0
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_a_ranking_sums_over_its_pairs() -> None:
    """Rewards 2, 1, 0: log(1 + e^-1) twice and log(1 + e^-2) = 0.1269280."""
    loss = bradley_terry(torch.tensor([2.0, 1.0, 0.0]), pairs([0, 0, 1], [1, 2, 2]))
    assert float(loss) == pytest.approx(2 * 0.3132617 + 0.1269280, abs=1e-6)


def test_gradients_by_hand() -> None:
    """d/dr of -log σ(1) is ∓σ(-1) = ∓0.2689414; centering adds 2 · 0.01 · 2 to both."""
    rewards = torch.tensor([1.5, 0.5], requires_grad=True)
    bradley_terry(rewards, pairs([0], [1]), centering=0.01).backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == pytest.approx([-0.2689414 + 0.04, 0.2689414 + 0.04], abs=1e-6)


def test_rewards_of_two_dimensions_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"\[K\]"):
        bradley_terry(torch.zeros(2, 1), pairs([0], [1]))


@pytest.mark.parametrize("difference", [1e3, -1e3, 1e15, -1e15])
def test_large_margins_stay_finite(difference: float) -> None:
    rewards = torch.tensor([difference, 0.0], requires_grad=True)
    loss = bradley_terry(rewards, pairs([0], [1]), label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite()
    assert rewards.grad is not None and rewards.grad.isfinite().all()


def test_bf16_rewards_are_compared_in_fp32() -> None:
    rewards = torch.tensor([8.0, 8.0625], dtype=torch.bfloat16)
    loss = bradley_terry(rewards, pairs([1], [0]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(0.6623853, abs=1e-6)  # log(1 + e^-0.0625)


# Plackett-Luce.


# Rewards 2, 1, 0, -1. log(1 + e^-1) = 0.3132617, log(1 + e^-1 + e^-2) = 0.4076060,
# log(1 + e^-1 + e^-2 + e^-3) = 0.4401897, log(1 + e^-2 + e^-3) = 0.1698460.
@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([0], [1], 0.3132617),
        ([0, 0, 1], [1, 2, 2], 0.4076060 + 0.3132617),
        (*ranking([0, 1, 2, 3]), 0.4401897 + 0.4076060 + 0.3132617),
        (
            *ranking([2, 1, 0]),
            2.4076060 + 1.3132617,
        ),  # r_0 = 2 and r_1 = 1 behind 0, then 2 behind 1
        ([0, 0, 0], [1, 2, 3], 0.4401897),  # best of four: the others are in no order
        ([0, 0, 1, 1, 2], [2, 3, 2, 3, 3], 0.1698460 + 0.4076060 + 0.3132617),  # 0 and 1 tie
    ],
    ids=["a pair", "three", "four", "upside down", "best of four", "a tie"],
)
def test_golden_values_of_rankings(chosen: list[int], rejected: list[int], expected: float) -> None:
    loss = plackett_luce(torch.tensor([2.0, 1.0, 0.0, -1.0]), pairs(chosen, rejected))
    assert loss.ndim == 0
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_probabilities_of_all_rankings_add_up_to_one() -> None:
    rewards = torch.tensor([0.3, -1.2, 0.9, 2.0], dtype=torch.float64)
    orders = [plackett_luce(rewards, pairs(*ranking(o))) for o in permutations(range(4))]
    assert float(torch.stack(orders).neg().exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_ranking_of_two_is_a_pair() -> None:
    rewards = torch.randn(6, dtype=torch.float64, requires_grad=True)
    compared = pairs([0, 2, 5], [1, 3, 4], weight=[1.0, 0.5, 2.0])
    losses = plackett_luce(rewards, compared), bradley_terry(rewards, compared)
    grads = [torch.autograd.grad(loss, rewards)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


def test_gradients_of_a_ranking_by_hand() -> None:
    """Three equal rewards: each choice pulls its winner by 1 - 1/n and pushes the rest by 1/n."""
    rewards = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    plackett_luce(rewards, pairs(*ranking([0, 1, 2]))).backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == pytest.approx([-2 / 3, 1 / 3 - 1 / 2, 1 / 3 + 1 / 2])


def test_gradients_of_rankings_are_those_of_finite_differences() -> None:
    first, second = ranking([3, 0, 4]), ranking([1, 2])
    chosen, rejected = first[0] + second[0] + [0, 0], first[1] + second[1] + [1, 2]
    two = pairs(chosen, rejected, choice=[0, 0, 1, 2, 3, 3], weight=[0.5, 0.5, 0.5, 1.0, 2.0, 2.0])
    rewards = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: plackett_luce(r, two), (rewards,))


@pytest.mark.parametrize("difference", [1e3, -1e3, 1e15, -1e15])
def test_rankings_of_large_margins_stay_finite(difference: float) -> None:
    rewards = torch.tensor([difference, 0.0, 1.0], requires_grad=True)
    loss = plackett_luce(rewards, pairs(*ranking([0, 1, 2])))
    loss.backward()
    assert loss.isfinite()
    assert rewards.grad is not None and rewards.grad.isfinite().all()


def test_what_several_records_say_of_one_response_are_several_choices() -> None:
    """a before b and a before c by two judges is not a before both by one."""
    rewards = torch.tensor([2.0, 1.0, 0.0])
    apart = plackett_luce(rewards, pairs([0, 0], [1, 2], choice=[0, 1]))
    assert float(apart) == pytest.approx(0.3132617 + 0.1269280, abs=1e-6)
    assert float(plackett_luce(rewards, pairs([0, 0], [1, 2]))) == pytest.approx(0.4076060)


# Rao-Kupper.


# Rewards 1.5 and 0.5, θ = 2. log(1 + 2·e^-1) = 0.5514447, log(1 + 2·e^1) = 1.8619951.
@pytest.mark.parametrize(
    ("margin", "label", "tie", "expected"),
    [
        (0.0, 1.0, False, 0.5514447),
        (0.0, 0.0, False, 1.8619951),
        (0.0, 0.7, False, 0.9446098),  # 0.7 · 0.5514447 + 0.3 · 1.8619951
        (1.0, 1.0, False, 1.0986123),  # log 3: of equal rewards each outcome has a third
        (0.0, 0.5, True, 1.3148275),  # the two and - log 3
        (1.0, 0.5, True, 1.0986123),
    ],
)
def test_golden_values_with_ties(margin: float, label: float, tie: bool, expected: float) -> None:
    compared = pairs([0], [1], [margin], [label], tie=[tie])
    loss = rao_kupper(torch.tensor([1.5, 0.5]), compared, theta=2.0)
    assert loss.ndim == 0 and float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("theta", [1.001, 1.5, 4.0])
def test_winning_losing_and_a_tie_are_all_that_can_happen(theta: float) -> None:
    for difference in (-3.0, 0.0, 0.7, 20.0):
        rewards = torch.tensor([difference, 0.0], dtype=torch.float64)
        outcomes = [
            float(torch.exp(-rao_kupper(rewards, compared, theta)))
            for compared in (
                pairs([0], [1]),
                pairs([1], [0]),
                pairs([0], [1], label=[0.5], tie=[True]),
            )
        ]
        assert sum(outcomes) == pytest.approx(1.0, abs=1e-12)
        assert outcomes[2] == pytest.approx(
            (theta**2 - 1) / ((1 + theta * np.exp(-difference)) * (1 + theta * np.exp(difference)))
        )


def test_a_tie_pulls_rewards_together_and_a_pair_apart() -> None:
    for tie, sign in ((True, 1), (False, -1)):
        rewards = torch.tensor([1.0, 0.0], requires_grad=True)
        rao_kupper(rewards, pairs([0], [1], label=[0.5 if tie else 1.0], tie=[tie]), 2.0).backward()
        assert rewards.grad is not None
        assert rewards.grad[0] * sign > 0 and rewards.grad[1] == -rewards.grad[0]


def test_without_ties_and_at_theta_near_one_it_is_bradley_terry() -> None:
    rewards = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    compared = pairs([0, 0, 1], [1, 2, 2], [0.0, 0.5, 1.0], [1.0, 0.8, 0.3])
    near = rao_kupper(rewards, compared, 1 + 1e-12)
    assert float(near) == pytest.approx(float(bradley_terry(rewards, compared)), abs=1e-9)


def test_every_objective_has_its_loss() -> None:
    names = {"bradley_terry", "plackett_luce", "rao_kupper"}
    assert LOSSES.keys() == names
    for name in names:
        loss = TrainConfig(name="r", data={"train": "d"}, loss={"objective": name}).loss
        assert loss.objective == name


# Weights.


def test_weights_are_of_pairs_and_of_choices() -> None:
    """Rewards 2, 1, 0 of one prompt, whose three pairs or two choices are averaged, and a pair."""
    rewards = torch.tensor([2.0, 1.0, 0.0, 1.5, 0.5])
    chosen, rejected = [0, 0, 1, 3], [1, 2, 2, 4]
    by_prompt = pairs(chosen, rejected, weight=[1 / 3, 1 / 3, 1 / 3, 1.0])
    expected = (2 * 0.3132617 + 0.1269280) / 3 + 0.3132617
    assert float(bradley_terry(rewards, by_prompt)) == pytest.approx(expected, abs=1e-6)
    centered = bradley_terry(rewards, by_prompt, centering=0.01)
    expected += 0.01 * ((3**2 + 2**2 + 1**2) / 3 + 2**2)
    assert float(centered) == pytest.approx(expected, abs=1e-6)
    ranked = pairs(chosen, rejected, weight=[1 / 2, 1 / 2, 1 / 2, 1.0])
    expected = (0.4076060 + 0.3132617) / 2 + 0.3132617
    assert float(plackett_luce(rewards, ranked)) == pytest.approx(expected, abs=1e-6)


# One optimizer step of a model, cut in every way.


def random_pairs(groups: Sequence[TokenGroup]) -> list[tuple[int, int]]:
    """Neighbours of every group's responses, as indices into all rows."""
    starts = np.cumsum([0, *(len(group.suffixes) for group in groups)])
    return [
        (int(start) + i, int(start) + i + 1)
        for start, group in zip(starts[:-1], groups, strict=True)
        for i in range(len(group.suffixes) - 1)
    ]


def step(packs: list[list[TokenGroup]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the step's pairs, and its gradients, one backward per pack."""
    net = tiny_model("gpt2")
    count = sum(len(random_pairs(groups)) for groups in packs)
    total = 0.0
    for groups in packs:
        compared = random_pairs(groups)
        loss = bradley_terry(
            scored(net, [groups]),
            pairs([a for a, _ in compared], [b for _, b in compared]),
            centering=0.01,
        )
        (loss / count).backward()
        total += loss.item() / count
    return total, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def test_a_step_is_the_same_in_one_two_or_many_packs() -> None:
    groups = [g for seed in range(2) for g in random_groups(seed) if len(g.suffixes) > 1]
    loss, grads = step([groups])
    for packs in ([groups[:1], groups[1:]], [groups[3:], groups[:3]], [[g] for g in groups]):
        again, others = step(packs)
        assert again == pytest.approx(loss, abs=1e-12)
        assert furthest(grads, others) <= 1e-11


def test_a_step_is_the_same_from_groups_and_from_their_pairs() -> None:
    groups = [g for g in random_groups() if len(g.suffixes) > 1]
    apart = [
        TokenGroup.from_rows(group.rows[i : i + 2])
        for group in groups
        for i in range(len(group.suffixes) - 1)
    ]
    loss, grads = step([groups])
    again, others = step([apart])
    assert again == pytest.approx(loss, abs=1e-12)
    assert furthest(grads, others) <= 1e-11
