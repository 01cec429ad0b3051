"""An optimizer step of a rank in fp64, cut in every way: DeepSpeed's part is torch's own here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rayrm.errors import TrainingError
from rayrm.evaluation.evaluate import summarize
from rayrm.model.net import RewardNet
from rayrm.packing import TokenGroup
from rayrm.training.config import TrainConfig
from rayrm.training.dataset import PreferenceGroup, Schedule
from rayrm.training.loop import Rank, scored_group
from rayrm.training.rank_shares import Shares
from tests.tiny import furthest, random_ids, tiny_model

WHOLE = 100_000


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """What a rank asks of DeepSpeed's engine; notes forwards and keeps the gradients of steps."""

    def __init__(self, net: RewardNet) -> None:
        self.module, self.device = net, torch.device("cpu")
        self.optimizer = torch.optim.SGD(net.parameters())
        self.forwards: list[tuple[tuple[int, ...], Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def __call__(self, ids: Tensor, *rest: Any) -> Tensor:
        rewards: Tensor = self.module(ids, *rest)
        self.forwards.append((tuple(ids.tolist()), rewards.detach()))
        return rewards

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        named = self.module.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        self.module.zero_grad()

    def get_global_grad_norm(self) -> None:
        return None

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def make_rank(
    data: Sequence[PreferenceGroup], budget: int, net: RewardNet | None = None, **loss: Any
) -> Rank:
    """A rank whose every step is all of the data."""
    rank = object.__new__(Rank)
    rank.config = TrainConfig(
        name="run",
        data={"train": "none"},
        loss=loss,
        train={"tokens_per_micro_batch": budget},
    )
    rank.rank, rank.world_size, rank.step, rank.history, rank.metrics = 0, 1, 0, [], None
    rank.shares = Shares(0, 1, budget)
    rank.device = torch.device("cpu")
    rank.engine = Engine(net or tiny_model("gpt2"))
    rank.train = rank.held_out = data  # type: ignore[assignment]
    rank.schedule = Schedule(len(data), len(data), 1.0, 0, "ab" * 32)
    return rank


def preferred(
    seed: int,
    pairs: Sequence[tuple[int, int]],
    labels: Sequence[float] | None = None,
    ties: Sequence[bool] | None = None,
) -> PreferenceGroup:
    """Responses of 1 to 9 tokens to a prompt of 12, with pairs whose choices are by chosen."""
    rng = np.random.default_rng(seed)
    prompt = random_ids(rng, 12)
    count = max(max(pair) for pair in pairs) + 1
    rows = [
        np.concatenate([prompt, random_ids(rng, int(rng.integers(1, 10)))]) for _ in range(count)
    ]
    chosen, rejected = np.array(pairs).T
    choice = np.unique(chosen, return_inverse=True)[1]
    return PreferenceGroup(
        TokenGroup.from_rows(rows),
        chosen,
        rejected,
        rng.choice([0, 0.5], len(pairs)).astype(np.float32),
        np.array(labels or [1.0] * len(pairs), dtype=np.float32),
        choice,
        np.array(ties or [False] * len(pairs)),
        len(pairs),
        int(choice.max()) + 1,
        "",
        f"f:{seed}",
    )


def crowd() -> list[PreferenceGroup]:
    """A ranking of five with a chain beside it, a star, and a pair."""
    ranked = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    chain = [(5, 6), (6, 7), (8, 7), (9, 10)]
    star = [(0, i) for i in range(1, 8)]
    return [preferred(0, [*ranked, *chain]), preferred(1, star), preferred(2, [(0, 1)])]


def with_ties() -> list[PreferenceGroup]:
    """The crowd, and two responses of the star that were judged equal."""
    first, _, last = crowd()
    star = [*((0, i) for i in range(1, 8)), (1, 2)]
    return [first, preferred(1, star, [1.0] * 7 + [0.5], [False] * 7 + [True]), last]


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"weighting": "prompt"},
        {"centering": 0.1, "label_smoothing": 0.1},
        {"objective": "plackett_luce"},
        {"objective": "plackett_luce", "weighting": "prompt"},
        {"objective": "rao_kupper", "theta": 3.0},
    ],
    ids=str,
)
def test_loss_and_gradients_do_not_depend_on_the_pieces_of_a_step(loss: dict[str, Any]) -> None:
    data = with_ties() if loss.get("objective") == "rao_kupper" else crowd()
    longest = max(len(row) for group in data for row in group.tokens.rows)
    found = {}
    for budget in (8, 30, 45, 70, 120, WHOLE):
        rank = make_rank(data, budget, **loss)
        rank.train_step()
        found[budget] = rank
        assert max(len(ids) for ids, _ in rank.engine.forwards) <= max(budget, longest)
    whole = found[WHOLE]
    assert len(whole.engine.forwards) == 1
    for rank in found.values():
        for key in ("loss", "accuracy", "margin"):
            assert rank.history[0][key] == pytest.approx(whole.history[0][key], abs=1e-11)
        assert furthest(rank.engine.gradients[0], whole.engine.gradients[0]) <= 1e-11


def test_what_no_pair_connects_is_computed_once_however_it_is_cut() -> None:
    """Only pieces of what is connected need their rewards before their gradients."""
    lone = preferred(0, [(i, i + 1) for i in range(0, 20, 2)])
    rank = make_rank([lone], 40)
    rank.train_step()
    seen = [ids for ids, _ in rank.engine.forwards]
    assert len(seen) > 3 and len({*seen}) == len(seen)
    assert sum(map(len, seen)) == lone.tokens.tokens + 12 * (len(seen) - 1)


def test_a_piece_gives_the_same_rewards_under_dropout_when_it_is_computed_again() -> None:
    net = tiny_model("gpt2")
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.endswith("attn_dropout"):
            module.p = 0.2
    rank = make_rank([preferred(0, [(0, i) for i in range(1, 8)])], 30, net)
    for _ in range(2):
        rank.train_step()
        first, again = np.split(np.arange(len(rank.engine.forwards)), 2)
        assert len(first) > 2
        for a, b in zip(first, again, strict=True):
            (ids, rewards), (same_ids, same) = (rank.engine.forwards[i] for i in (a, b))
            assert ids == same_ids and torch.equal(rewards, same)
        rank.engine.forwards.clear()
    losses = [step["loss"] for step in rank.history]
    assert losses[0] != losses[1], "another step drops others"


def test_the_parts_of_a_prompt_weigh_what_the_prompt_would() -> None:
    """As a whole 1, as one beside it; in two parts of a step, the same."""
    data = crowd()
    losses: list[dict[str, Any]] = [{"weighting": "prompt"}, {}]
    for loss in losses:
        whole = make_rank(data, WHOLE, **loss)
        parts = [data[0].part(np.array(pairs)) for pairs in (range(10), range(10, 13), [13])]
        split = make_rank([*parts, *data[1:]], WHOLE, **loss)
        whole.train_step()
        split.train_step()
        assert split.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], abs=1e-11)
        assert furthest(split.engine.gradients[0], whole.engine.gradients[0]) <= 1e-11


def test_accuracy_and_margin_of_a_step_are_those_that_an_evaluation_gives() -> None:
    """A pair whose label is a half has no winner, and one below it the other."""
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (1, 3)]
    group = preferred(0, pairs, [1.0, 0.5, 0.2, 1.0, 0.5, 0.8])
    rank = make_rank([group], WHOLE)
    rank.train_step()
    figures = summarize([scored_group(group, rank.engine.forwards[0][1].numpy())])
    assert figures["pairs"] == 4 and 0 < figures["accuracy"] < 1
    assert rank.history[0]["accuracy"] == figures["accuracy"]
    assert rank.history[0]["margin"] == pytest.approx(figures["margin"], abs=1e-11)


def test_a_tie_is_half_right_in_a_step_as_in_an_evaluation() -> None:
    net = tiny_model("gpt2")
    net.model.get_parameter("score.weight").data.zero_()
    rank = make_rank(crowd(), WHOLE, net)
    rank.train_step()
    assert rank.history[0]["accuracy"] == 0.5 and rank.history[0]["margin"] == 0
    rank.evaluate()
    assert rank.history[0]["eval_accuracy"] == 0.5


def test_a_step_without_a_winner_has_a_loss_and_no_accuracy() -> None:
    rank = make_rank([preferred(0, [(0, 1), (1, 2)], [0.5, 0.5])], WHOLE)
    rank.train_step()
    step = rank.history[0]
    assert step["loss"] > 0 and step["accuracy"] is None and step["margin"] is None


def test_an_evaluation_keeps_the_budget_and_gives_the_same_however_it_is_cut() -> None:
    data = crowd()
    longest = max(len(row) for group in data for row in group.tokens.rows)
    found = []
    for budget in (8, 45, WHOLE):
        rank = make_rank(data, budget)
        rank.history.append({})
        rank.evaluate()
        found.append(rank.history[0])
        assert max(len(ids) for ids, _ in rank.engine.forwards) <= max(budget, longest)
    for figures in found:
        assert figures == pytest.approx(found[-1], abs=1e-11)


@pytest.mark.parametrize("budget", [8, WHOLE])
def test_rows_without_a_finite_reward_stop_the_step_and_are_named(budget: int) -> None:
    data = crowd()
    ids = [*data[1].tokens.suffixes]
    ids[3] = np.append(ids[3], np.int32(2)).astype(np.int32)  # an id of no other row
    data[1] = replace(data[1], tokens=TokenGroup(data[1].tokens.prefix, tuple(ids)))
    net = tiny_model("gpt2")
    net.model.get_input_embeddings().get_parameter("weight").data[2] = torch.nan
    with pytest.raises(TrainingError, match=r"step 1: .*: rank 0: f:1$"):
        make_rank(data, budget, net).train_step()


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"centering": 0.1, "label_smoothing": 0.1, "weighting": "prompt"},
        {"objective": "plackett_luce"},
        {"objective": "rao_kupper"},
    ],
    ids=str,
)
def test_the_held_out_loss_is_that_of_the_objective_that_is_trained(loss: dict[str, Any]) -> None:
    """On the groups of a step, before its update: the step's own loss."""
    data = with_ties() if loss.get("objective") == "rao_kupper" else crowd()
    rank = make_rank(data, WHOLE, **loss)
    with torch.no_grad():
        rewards = rank.forward([group.tokens for group in data]).numpy()
    ends = np.cumsum([len(group.tokens.suffixes) for group in data])[:-1]
    scored = [*map(scored_group, data, np.split(rewards, ends))]
    held_out = rank.held_out_loss(data, scored)
    rank.train_step()
    assert held_out == pytest.approx(rank.history[0]["loss"], abs=1e-9)
    scored[0] = replace(scored[0], rewards=np.full_like(scored[0].rewards, np.nan))
    assert rank.held_out_loss(data, scored) not in (None, held_out)


def test_the_held_out_loss_leaves_out_pairs_without_a_winner() -> None:
    """As the accuracy and the margin beside it do."""
    half = preferred(3, [(0, 1), (0, 2)], [0.5, 1.0])
    rank = make_rank([half], WHOLE)
    rewards = np.array([1.0, 5.0, 0.0])
    scored = [scored_group(half, rewards)]
    margin = float(half.margin[1])
    assert rank.held_out_loss([half], scored) == pytest.approx(np.log1p(np.exp(margin - 1.0)))
    undecided = preferred(3, [(0, 1)], [0.5])
    assert rank.held_out_loss([undecided], [scored_group(undecided, rewards[:2])]) is None


def test_a_gradient_that_is_not_finite_stops_the_run_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = make_rank(crowd(), WHOLE)
    monkeypatch.setattr(rank.engine, "get_global_grad_norm", lambda: float("inf"))
    with pytest.raises(TrainingError, match="step 1: the gradient's norm is inf"):
        rank.train_step()
