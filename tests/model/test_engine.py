"""Scoring in one process: bad rows fail alone, and no way of cutting changes a reward."""

from __future__ import annotations

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayrm.errors import (
    ConfigError,
    DataError,
    EmptyResponse,
    ExportError,
    InvalidRow,
    InvalidTokenIds,
    ModelError,
    NonFiniteReward,
    RayrmError,
    RowError,
    RowTooLong,
    ServiceError,
    TrainingError,
)
from rayrm.model.engine import RewardModel, plan_for_threads
from rayrm.packing import TokenGroup
from rayrm.rows import make_rows
from rayrm.text.fingerprints import fingerprint
from rayrm.text.template import Template, TemplateSpec, set_pad_token
from tests.makers import make_export, tiny_tokenizer
from tests.tiny import byte_tokenizer, random_groups, tiny_model

PROMPTS = ["What is the capital of France?", "Name three fruits.", "Hi"]
RESPONSES = ["Paris.", "It is Paris, the capital.", "apples", "red and blue", "x"]


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, device="cpu", dtype="float32")


def grid() -> tuple[list[str], list[str]]:
    """Every response to every prompt."""
    pairs = [(p, r) for p in PROMPTS for r in RESPONSES]
    return [p for p, _ in pairs], [r for _, r in pairs]


def close(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.abs(a - b).max() <= 1e-5 * max(1.0, float(b.std())))


# Equalities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_rewards_are_those_of_transformers_on_the_export(family: str, tmp_path: Path) -> None:
    export = make_export(tmp_path, family)
    prompts, responses = grid()
    rewards = RewardModel.load(export, device="cpu", dtype="float32").score(prompts, responses)
    assert rewards.errors == [None] * len(prompts)
    assert rewards.values.dtype == np.float32 and rewards.values.std() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(export)
    theirs = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32).eval()
    messages = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
        for p, r in zip(prompts, responses, strict=True)
    ]
    rendered = [str(tokenizer.apply_chat_template(m, tokenize=False)) for m in messages]
    texts = [text.removesuffix("\n") for text in rendered]
    with torch.inference_mode():
        alone = [theirs(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
        padded = theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    assert close(rewards.values, np.array(alone, dtype=np.float32))
    assert close(rewards.values, padded.numpy())


def test_scoring_together_or_alone_in_any_order_gives_the_same(model: RewardModel) -> None:
    prompts, responses = grid()
    rewards = model.score(prompts, responses).values
    alone = [model.score([p], [r]).values[0] for p, r in zip(prompts, responses, strict=True)]
    assert close(rewards, np.array(alone))
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = model.score([prompts[i] for i in order], [responses[i] for i in order]).values
    assert close(shuffled, rewards[order])


def test_a_group_larger_than_the_budget_is_split_and_scored_the_same(tiny_export: Path) -> None:
    prompts, responses = grid()
    whole = RewardModel.load(tiny_export, device="cpu", dtype="float32")
    expected = whole.score(prompts, responses)
    assert whole.forwards == 1
    counts = []
    for budget in (8, 40, 80):
        cut = RewardModel.load(tiny_export, device="cpu", dtype="float32", tokens_per_pack=budget)
        assert close(cut.score(prompts, responses).values, expected.values)
        counts.append(cut.forwards)
    assert counts[0] == len(prompts) > counts[1] > counts[2] > 1


def test_no_thread_waits_for_another_with_more_to_do() -> None:
    costs = [600] * 12
    torch.set_num_threads(3)
    try:
        packs = plan_for_threads(costs, 8192)
    finally:
        torch.set_num_threads(1)
    assert [len(pack) for pack in packs] == [2] * 6
    assert sorted(i for pack in packs for i in pack) == list(range(12))
    assert plan_for_threads([], 8192) == []


def test_packs_scored_at_once_get_the_rewards_of_packs_one_after_the_other(
    tiny_export: Path,
) -> None:
    model = RewardModel.load(tiny_export, device="cpu", dtype="float32", tokens_per_pack=24)
    groups = random_groups()
    one_by_one = model.score_groups(groups)
    torch.set_num_threads(3)
    try:
        at_once = model.score_groups(groups)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(1)
    for ours, expected in zip(at_once, one_by_one, strict=True):
        assert close(ours, expected)


def test_equal_prompts_are_computed_once(model: RewardModel) -> None:
    encoded = model.encode(rows_of(*grid()))
    assert [len(group.suffixes) for group in encoded.groups] == [len(RESPONSES)] * len(PROMPTS)
    prompt = len(model.encode(rows_of(["Hi"], ["x"])).groups[0].rows[0])
    assert len(encoded.groups[2].prefix) >= prompt - 3


def rows_of(prompts: Any, responses: Any) -> Any:
    return make_rows(prompts, responses)


def test_text_messages_and_ids_of_one_row_get_one_reward(model: RewardModel) -> None:
    (ids,) = model.encode(rows_of(["Hi"], ["Paris."])).groups[0].rows
    messages = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Paris."}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rewards = model.score(
            ["Hi", messages[0], ids[:-4].tolist(), ids[:3], "Hi"],
            ["Paris.", messages[1], ids[-4:].tolist(), ids[3:].astype(np.int64), messages[1]],
        )
    assert rewards.errors == [None] * 5
    assert close(rewards.values, np.repeat(rewards.values[:1], 5))


def test_bf16_gives_about_the_same_in_fp32(tiny_export: Path) -> None:
    exact = RewardModel.load(tiny_export, device="cpu", dtype="float32").score(*grid()).values
    rough = RewardModel.load(tiny_export, device="cpu", dtype="bfloat16").score(*grid()).values
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.15 * max(1.0, float(exact.std()))


def test_no_rows_give_no_rewards(model: RewardModel) -> None:
    rewards = model.score([], [])
    assert len(rewards) == 0 and rewards.errors == [] and rewards.versions == []


# Bad rows -----------------------------------------------------------------------------------------


def test_bad_rows_get_typed_errors_and_the_others_their_rewards(model: RewardModel) -> None:
    bad: list[tuple[Any, Any, type[RowError]]] = [
        ("Hi", "", EmptyResponse),
        ("Hi", [], EmptyResponse),
        ("Hi", "long " * 200, RowTooLong),
        ("long " * 300, "x", RowTooLong),
        ("Hi", None, InvalidRow),
        (3, "x", InvalidRow),
        ("Hi", [{"role": "assistant", "content": 5}], InvalidRow),
        ([{"role": "user", "content": "Hi", "at": object()}], "x", InvalidRow),
        ("Hi", [1, 2], InvalidRow),
        ([1], [2, 100_000], InvalidTokenIds),
    ]
    prompts, responses = grid()
    expected = model.score(prompts, responses).values
    mixed_prompts: list[Any] = list(prompts)
    mixed_responses: list[Any] = list(responses)
    places = [1 + i * 2 for i in range(len(bad))]
    for place, (prompt, response, _) in zip(places, bad, strict=True):
        mixed_prompts.insert(place, prompt)
        mixed_responses.insert(place, response)
    rewards = model.score(mixed_prompts, mixed_responses, tokenizer=tiny_tokenizer())
    for place, (_, _, error) in zip(places, bad, strict=True):
        assert type(rewards.errors[place]) is error and str(rewards.errors[place])
        assert np.isnan(rewards.values[place])
    good = np.array([i for i in range(len(mixed_prompts)) if i not in places])
    assert all(rewards.errors[i] is None for i in good)
    assert close(rewards.values[good], expected)


@pytest.fixture
def poisoned(tiny_export: Path) -> tuple[RewardModel, int]:
    """A model whose embedding of one token is NaN, and that token."""
    model = RewardModel.load(tiny_export, device="cpu", dtype="float32")
    poison = model.template.tokenizer.convert_tokens_to_ids("%")
    assert isinstance(poison, int)
    with torch.no_grad():
        model.net.model.base_model.get_parameter("embed_tokens.weight")[poison] = torch.nan
    return model, poison


def test_a_reward_that_is_not_finite_fails_its_row_alone(
    poisoned: tuple[RewardModel, int],
) -> None:
    model, _ = poisoned
    prompts, responses = grid()
    expected = model.score(prompts, responses).values
    assert np.isfinite(expected).all()
    rewards = model.score(
        [*prompts[:2], prompts[0], *prompts[2:], "50% of"],
        [*responses[:2], "a % b", *responses[2:], "x"],
    )
    assert [i for i, e in enumerate(rewards.errors) if e] == [2, len(prompts) + 1]
    for place in (2, len(prompts) + 1):
        assert isinstance(rewards.errors[place], NonFiniteReward)
        assert "nan" in str(rewards.errors[place]) and np.isnan(rewards.values[place])
    assert close(np.delete(rewards.values, [2, len(prompts) + 1]), expected)


def test_nan_in_a_shared_prompt_fails_its_group_alone(poisoned: tuple[RewardModel, int]) -> None:
    model, _ = poisoned
    rewards = model.score(["50%", "Hi", "50%", "Hi"], ["x", "x", "y", "y"])
    assert [type(e) for e in rewards.errors] == [
        NonFiniteReward,
        type(None),
        NonFiniteReward,
        type(None),
    ]


def test_an_infinite_reward_is_an_error(tiny_export: Path) -> None:
    model = RewardModel.load(tiny_export, device="cpu", dtype="float32")
    with torch.no_grad():
        model.net.model.get_parameter("score.weight").fill_(3e38)
    rewards = model.score(["Hi"], ["x"])
    assert isinstance(rewards.errors[0], NonFiniteReward) and np.isnan(rewards.values[0])


@pytest.mark.parametrize(
    "error",
    [
        ConfigError,
        DataError,
        ModelError,
        ExportError,
        TrainingError,
        ServiceError,
        EmptyResponse,
        RowTooLong,
        InvalidRow,
        InvalidTokenIds,
        NonFiniteReward,
    ],
)
def test_errors_cross_processes_whole(error: type[RayrmError]) -> None:
    again = pickle.loads(pickle.dumps(error("what, where, what would be right")))
    assert type(again) is error and str(again) == "what, where, what would be right"
    assert issubclass(error, RayrmError) and issubclass(error, ValueError | RuntimeError)


def test_results_cross_processes_whole(model: RewardModel) -> None:
    rewards = model.score(["Hi", "Hi"], ["x", ""])
    again = pickle.loads(pickle.dumps(rewards))
    assert np.array_equal(again.values, rewards.values, equal_nan=True)
    assert str(again.errors[1]) == str(rewards.errors[1])


@pytest.mark.parametrize(
    ("prompts", "responses", "finished"),
    [
        (["a"], ["b", "c"], None),
        (["a", "b"], ["c"], None),
        (["a"], ["b"], [True, False]),
        ("a", "b", None),
    ],
)
def test_lists_that_do_not_match_are_refused(
    model: RewardModel, prompts: Any, responses: Any, finished: Any
) -> None:
    with pytest.raises(ValueError, match="one"):
        model.score(prompts, responses, finished=finished)


# Flags --------------------------------------------------------------------------------------------


def test_truncated_and_unfinished_rows_say_so(tiny_export: Path) -> None:
    model = RewardModel.load(
        tiny_export, device="cpu", dtype="float32", max_length=32, overlong="truncate"
    )
    long = "word " * 40
    rewards = model.score(
        ["Hi", long, "Hi", long],
        ["x", "x", "y", long],
        finished=cast(Any, np.array([True, True, False, True])),
    )
    assert rewards.truncated.tolist() == [False, True, False, False]
    assert rewards.unfinished.tolist() == [False, False, True, False]
    assert [type(e) for e in rewards.errors[:3]] == [type(None)] * 3
    assert isinstance(rewards.errors[3], RowTooLong)
    assert set(rewards.versions) == {model.version} and model.version.startswith("tiny@")


def test_a_cut_prompt_is_scored_as_its_right_end(tiny_export: Path) -> None:
    model = RewardModel.load(
        tiny_export, device="cpu", dtype="float32", max_length=32, overlong="truncate"
    )
    row = rows_of(["word " * 40], ["Paris."])[0]
    (whole,) = model.template.encode([row])
    assert isinstance(whole, np.ndarray)
    cut = model.score([row.prompt], [row.response]).values
    kept, was_cut = model.template.fit(row, whole, "truncate")
    assert isinstance(kept, np.ndarray) and was_cut and len(kept) == 32
    ids = model.score([kept[:-5]], [kept[-5:]], tokenizer=model.template.spec.fingerprint).values
    assert close(cut, ids)


def test_an_unfinished_response_gets_another_reward(model: RewardModel) -> None:
    rewards = model.score(["Hi", "Hi"], ["Paris", "Paris"], finished=[True, False])
    assert abs(rewards.values[0] - rewards.values[1]) > 1e-4


# Token ids ----------------------------------------------------------------------------------------


def test_ids_of_another_tokenizer_are_errors(model: RewardModel) -> None:
    other = byte_tokenizer(["<x>"], eos_token="<x>")
    for named in (other, fingerprint(other)):
        rewards = model.score(["Hi", [1, 2]], ["x", [3]], tokenizer=named)
        assert rewards.errors[0] is None
        error = rewards.errors[1]
        assert isinstance(error, InvalidTokenIds) and fingerprint(other)[:12] in str(error)


def test_ids_of_the_models_own_tokenizer_are_scored_without_a_warning(
    model: RewardModel, tiny_export: Path
) -> None:
    own = tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for named in (own, fingerprint(own), AutoTokenizer.from_pretrained(tiny_export)):
            assert model.score([[1, 2]], [[3]], tokenizer=named).errors == [None]


def test_the_exports_tokenizer_is_the_models_own_even_with_a_pad_token_added() -> None:
    published = byte_tokenizer(["</s>"], eos_token="</s>")
    made_by = fingerprint(published)
    exported = byte_tokenizer(["</s>"], eos_token="</s>")
    assert set_pad_token(exported)
    spec = TemplateSpec("text", "\n", 100, made_by)
    model = RewardModel(tiny_model("llama", torch.float32), Template(exported, spec))
    rows = rows_of([[5, 6]], [[7]])
    for named in (published, made_by, exported, fingerprint(exported)):
        assert model.encode(rows, named).errors == [None]


def test_ids_without_their_tokenizer_warn_the_caller(model: RewardModel) -> None:
    with pytest.warns(UserWarning, match="tokenizer=") as caught:
        model.score([[1, 2]], [[3]])
    assert caught[0].filename == __file__


# Loading ------------------------------------------------------------------------------------------


def test_an_export_is_found_at_the_users_home(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_export.parent))
    found = RewardModel.load(f"~/{tiny_export.name}", "cpu", "float32")
    assert found.version.startswith("tiny@")


def test_wrong_ways_to_load_are_config_errors(tiny_export: Path) -> None:
    with pytest.raises(ConfigError, match=r"'float16'.*float32 or bfloat16"):
        RewardModel.load(tiny_export, dtype=cast(Any, "float16"))
    with pytest.raises(ConfigError, match=r"100000.*512"):
        RewardModel.load(tiny_export, max_length=100_000)


def test_the_dtype_is_what_is_asked_for_and_the_head_stays_fp32(tmp_path: Path) -> None:
    export = make_export(tmp_path, dtype="bfloat16")
    for dtype, expected in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        net = RewardModel.load(export, device="cpu", dtype=cast(Any, dtype)).net
        assert net.model.base_model.get_parameter("embed_tokens.weight").dtype == expected
        assert net.model.get_parameter("score.weight").dtype == torch.float32
        assert not net.training


def test_a_group_scored_by_hand_is_the_group_scored(model: RewardModel) -> None:
    encoded = model.encode(rows_of(*grid()))
    apart = [TokenGroup.from_rows([row]) for group in encoded.groups for row in group.rows]
    whole = np.concatenate(model.score_groups(encoded.groups))
    assert close(whole, np.concatenate(model.score_groups(apart)))


def test_a_pack_that_raises_leaves_later_threads_as_many_torch_threads(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.load(tiny_export, "cpu", "float32", tokens_per_pack=64)
    groups = [TokenGroup(np.zeros(0, np.int32), (np.zeros(40, np.int32),)) for _ in range(4)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(model, "_score_pack", fail)
        with pytest.raises(RuntimeError, match="this pack"):
            model.score_groups(groups)
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(threads)


def fail(_: object) -> None:
    raise RuntimeError("this pack")
