"""A step on its way over a transport that does what it is told: what is sent again, and when."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayrm import RewardClient, RewardModel
from rayrm.config import OWN
from rayrm.errors import (
    ConfigError,
    Overloaded,
    ServiceError,
    StepTimeout,
    UnknownReward,
    VersionGone,
)
from rayrm.rows import Rewards, Row, make_rows
from rayrm.serving import sending
from rayrm.serving.chunk import CHUNKS_PER_REPLICA, Chunk, Step
from rayrm.serving.sending import RETRIES, Sending
from rayrm.serving.ticket import Caller, Ticket
from rayrm.serving.transports import Answer, Away, Lost, NoRoom, Target, Transport
from tests.service import assert_same, texts

ME = Caller("me", "job", "")


class Scripted(Transport):
    """Raises what it is told to, one by one; then a row's reward is the bytes of its response."""

    name = "the script"

    def __init__(
        self, *script: Exception | None, served: Sequence[str] = ("v@1",), pack: int = 0
    ) -> None:
        self.script = list(script)
        self.pack = pack
        self.served = list(served)
        self.tickets: list[Ticket] = []
        self.in_flight = self.most_in_flight = 0

    def caller(self, name: str | None) -> Caller:
        return ME

    async def find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        return Target(4, self.pack, version, rewards)

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        self.tickets.append(ticket)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0)
        self.in_flight -= 1
        if (error := self.script.pop(0) if self.script else None) is not None:
            raise error
        version = target.version or self.served[0]
        rewards = {name: scored(chunk.rows(), version) for name in target.rewards}
        return Answer(rewards, version)


def scored(rows: Sequence[Row], version: str) -> Rewards:
    none = np.zeros(len(rows), dtype=bool)
    values = np.array([len(str(row.response)) for row in rows], dtype=np.float32)
    return Rewards(values, [None] * len(rows), none, none, [version] * len(rows))


def client(transport: Transport) -> RewardClient:
    made = RewardClient("scripted")
    made.transport = transport
    return made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attempts follow each other soon."""
    monkeypatch.setattr(sending, "BACKOFF", (0.001, 0.001))
    yield


STEP = texts(100, 4)
EXPECTED = [len(response) for response in STEP[1]]


def test_the_first_answer_says_which_version_scores_the_rest_of_the_step() -> None:
    transport = Scripted(served=["v@1"])
    rewards = client(transport).score(*STEP)
    assert rewards.values.tolist() == EXPECTED
    assert set(rewards.versions) == {"v@1"}
    first, *others = transport.tickets
    assert first.version == "" and {ticket.version for ticket in others} == {"v@1"}
    assert len(others) > 3 and transport.most_in_flight > 1


def test_a_step_of_a_known_version_waits_for_no_first_answer() -> None:
    transport = Scripted()
    client(transport).score(*STEP, version="v@1")
    assert transport.most_in_flight == len(transport.tickets) > 3


@pytest.mark.parametrize(
    "error", [Lost("died"), Away("refused"), NoRoom("full"), Overloaded("busy", 0.001)]
)
def test_what_did_not_get_an_answer_is_sent_again(error: Exception) -> None:
    transport = Scripted(error, None, error)
    rewards = client(transport).score(*STEP)
    assert rewards.values.tolist() == EXPECTED
    parts = [ticket.part for ticket in transport.tickets]
    assert len(parts) - len(set(parts)) == 2


def test_rows_that_kill_every_replica_do_not_go_round_for_ever() -> None:
    transport = Scripted(*[Lost("died")] * 100)
    with pytest.raises(ServiceError, match=f"{RETRIES + 1} replicas of the script died .* 2 rows"):
        client(transport).score(["a", "a"], ["b", "c"])
    assert len(transport.tickets) == RETRIES + 1


def test_a_service_that_is_away_is_waited_for_until_the_step_is_over() -> None:
    transport = Scripted(*[Away("refused")] * 100_000)
    with pytest.raises(StepTimeout, match=r"the script did not score step .* timeout_s = 0\.5"):
        client(transport).score(["a"], ["b"], timeout_s=0.5)
    assert len(transport.tickets) > RETRIES + 1


def test_a_step_whose_version_goes_begins_again_and_is_told_again() -> None:
    transport = Scripted(None, None, VersionGone("v@1 is not served (any more)"))
    transport.served = ["v@1"]
    told: list[str] = []

    def on_arrival(places: object, rewards: Rewards) -> None:
        told.extend(rewards.versions)
        transport.served = ["v@2"]

    rewards = client(transport).score(*STEP, on_arrival=on_arrival)
    assert set(rewards.versions) == {"v@2"}
    assert "v@1" in told and told.count("v@2") == len(rewards)


def test_a_version_that_was_asked_for_is_not_replaced() -> None:
    with pytest.raises(VersionGone):
        client(Scripted(VersionGone("gone"))).score(*STEP, version="v@1")


def test_a_step_that_fails_sends_nothing_more() -> None:
    transport = Scripted(*[VersionGone("gone")] * 1000, pack=512)
    step, in_flight = texts(4000, 4), 4 * CHUNKS_PER_REPLICA
    assert len(Step(make_rows(*step)).cut(4, 512)) > 4 * in_flight
    with pytest.raises(VersionGone):
        client(transport).score(*step, version="gone@1")
    time.sleep(0.2)  # the client's loop goes on by itself
    # Each that fails may have let one more go before the step heard of it.
    assert len(transport.tickets) <= 2 * in_flight


def test_whoever_has_no_patience_hears_when_to_come_back() -> None:
    transport = Scripted(*[Overloaded("busy", 0.01)] * 10_000)
    with pytest.raises(Overloaded) as full:
        asyncio.run(client(transport).score_rows(make_rows(["a"], ["b"]), None, patience_s=0.05))
    assert pickle.loads(pickle.dumps(full.value)).retry_after_s == 0.01


def test_a_part_of_a_step_tells_of_the_tokens_of_the_other_parts() -> None:
    transport, rows = Scripted(), make_rows(*STEP)
    alone = Sending(transport, Target(4, version="v@1"), "step", ME)
    asyncio.run(alone.send(Step(rows), None, None))
    own = max(ticket.outstanding for ticket in transport.tickets)
    transport.tickets.clear()
    part = Sending(
        transport, Target(4, version="v@1"), "step", ME, part="2.", outstanding=own + 5000
    )
    asyncio.run(part.send(Step(rows[:8]), None, None))
    (ticket,) = transport.tickets
    assert (ticket.step, ticket.part, ticket.outstanding) == ("step", "2.0", own + 5000)
    assert ticket.spread


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, "cpu", "float32")


def test_a_model_of_this_process_scores_as_it_does_by_itself(model: RewardModel) -> None:
    here = RewardClient(model=model)
    rows: tuple[list[Any], list[Any]] = [*STEP[0], "a", 3], [*STEP[1], "", "b"]
    arrived: list[tuple[NDArray[Any], Rewards]] = []
    rewards = here.score(*rows, on_arrival=lambda *some: arrived.append(some))
    assert_same(rewards, model.score(*rows))
    places = np.concatenate([places for places, _ in arrived])
    assert sorted(places) == list(range(401))  # the last was never sent
    for places, part in arrived:
        np.testing.assert_array_equal(part.values, rewards.values[places])
        assert part.versions == [model.version] * len(places)
    assert len(arrived) > 1 and rewards.versions[:-1] == [model.version] * 401


def test_an_event_loop_awaits_and_is_told_so(model: RewardModel) -> None:
    here = RewardClient(model=model)

    async def run() -> list[Rewards]:
        with pytest.raises(ServiceError, match="score_async"):
            here.score(["a"], ["b"])
        return list(await asyncio.gather(*(here.score_async(*texts(2, r)) for r in (1, 2))))

    for r, rewards in zip((1, 2), asyncio.run(run()), strict=True):
        assert_same(rewards, model.score(*texts(2, r)))


def test_groups_are_a_prompt_and_its_responses(model: RewardModel) -> None:
    here = RewardClient(model=model)
    prompts, groups = ["Name a fruit.", "Name a colour."], [["Plum.", "Pear.", "Fig."], ["Red."]]
    rows = [p for p, group in zip(prompts, groups, strict=True) for _ in group]
    expected = model.score(rows, [response for group in groups for response in group])
    assert_same(here.score(prompts, groups=groups), expected)
    assert_same(model.score(prompts, groups=groups), expected)
    for wrong in ({"groups": groups[:1]}, {"groups": ["Plum.", "Red."]}, {}):
        with pytest.raises(ValueError, match="groups"):
            here.score(prompts, **wrong)
    with pytest.raises(ValueError, match="groups"):
        here.score(prompts, ["a", "b"], groups=groups)


def test_a_model_of_this_process_refuses_as_a_service_does(model: RewardModel) -> None:
    here = RewardClient(model=model)
    assert here.score(["a"], ["b"], rewards=[OWN]).keys() == {OWN}
    with pytest.raises(UnknownReward, match="no reward 'safety'; there are 'default'"):
        here.score(["a"], ["b"], rewards=["safety"])
    with pytest.raises(VersionGone, match=f"elsewhere@1 is not served; {model.version} is"):
        here.score(["a"], ["b"], version="elsewhere@1")


def test_a_client_has_one_way_to_score(model: RewardModel) -> None:
    with pytest.raises(ConfigError, match="url and model"):
        RewardClient(url="http://localhost:8000", model=model)
    with pytest.raises(ConfigError, match="token is set without url"):
        RewardClient(token="secret")
