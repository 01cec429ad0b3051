from __future__ import annotations

import json
import re
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from statistics import correlation, mean

import pytest

from rayrm.data.records import read_groups
from rayrm.data.sample import (
    BANKS,
    FORMATS,
    FRAMES,
    LIST_FRAMES,
    PHRASINGS,
    SENTENCES,
    Question,
    Record,
    baseline_accuracy,
    generate,
    preference,
    questions,
    split_facts,
    write_sample,
)
from rayrm.errors import ConfigError

TRAIN_GROUPS, TEST_GROUPS = 1280, 240


@pytest.fixture(scope="module")
def sample() -> tuple[list[Record], list[Record]]:
    return generate(0, TRAIN_GROUPS, TEST_GROUPS)


@pytest.fixture(scope="module")
def asked() -> tuple[list[Question], list[Question]]:
    return questions(0, "train", TRAIN_GROUPS), questions(0, "test", TEST_GROUPS)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_same_seed_same_files_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        [path.read_bytes() for path in write_sample(tmp_path / name, seed=seed, train_groups=40)]
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    assert first == again
    assert first[0] != other[0] and first[1] != other[1]


def test_half_of_the_held_out_groups_has_every_subset(tmp_path: Path) -> None:
    """Of which the quickstart evaluates the base model on a CPU without bf16."""
    _, file = write_sample(tmp_path)
    groups, _ = read_groups(str(file))
    half = groups[: len(groups) // 2]
    assert {group.subset for group in half} == {group.subset for group in groups}


def test_more_groups_only_add_records(sample: tuple[list[Record], list[Record]]) -> None:
    train, test = generate(0, 80, 40)
    assert train == sample[0][: len(train)] and test == sample[1][: len(test)]


def test_records_are_conversational_preferences(sample: tuple[list[Record], list[Record]]) -> None:
    for record in [*sample[0], *sample[1]]:
        assert set(record) == {"prompt", "chosen", "rejected", "subset"}
        (prompt,), (chosen,), (rejected,) = record["prompt"], record["chosen"], record["rejected"]
        assert prompt["role"] == "user" and chosen["role"] == rejected["role"] == "assistant"
        assert all(message["content"].strip() for message in (prompt, chosen, rejected))
        assert "{" not in prompt["content"] + chosen["content"] + rejected["content"]
        assert chosen != rejected
    assert json.loads(json.dumps(sample[0])) == sample[0]


def test_files_hold_the_records(tmp_path: Path) -> None:
    paths = write_sample(tmp_path, seed=3, train_groups=24, test_groups=16)
    assert [path.name for path in paths] == ["train.jsonl", "test.jsonl"]
    read = tuple([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    assert read == generate(3, 24, 16)


def test_responses_meet_two_one_one_and_no_demands() -> None:
    for seed in range(5):
        for question in questions(seed, "train", 800) + questions(seed, "test", 160):
            assert [question.quality(text) for text in question.responses] == [2, 1, 1, 0], question


def test_quality_judges_any_text() -> None:
    capital = questions(0, "test", 1)[0]
    assert capital.skill == "capital"
    assert capital.quality("I do not know.") == 0
    assert capital.quality("Well, " + capital.responses[0].upper()) == 2


def test_every_skill_has_as_many_groups_and_five_pairs_each(
    sample: tuple[list[Record], list[Record]],
) -> None:
    pairs: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for record in sample[1]:
        pairs[record["subset"]][record["prompt"][0]["content"]] += 1
    assert set(pairs) == set(
        ["capital", "opposite", "definition", "choice", "list", "form", "sentence", "format"]
    )
    assert all(len(groups) == TEST_GROUPS // len(pairs) for groups in pairs.values())
    assert all(count == 5 for groups in pairs.values() for count in groups.values())
    assert len(sample[1]) >= 500


def test_held_out_facts_are_never_in_training() -> None:
    for seed in range(5):
        train, test = split_facts(seed)["train"], split_facts(seed)["test"]
        for skill, pairs in test.pairs.items():
            for side in zip(*pairs, strict=True):
                assert not set(side) & {text for pair in train.pairs[skill] for text in pair}
        names = {name for one, many, members in train.categories for name in (one, many, *members)}
        assert not names & {
            n for one, many, members in test.categories for n in (one, many, *members)
        }
        assert not set(sum(train.verbs, ())) & set(sum(test.verbs, ()))
        assert not set(train.objects) & set(test.objects)


def test_held_out_answers_are_never_in_training_text() -> None:
    wrapping = " ".join(
        [*FRAMES["test"], *LIST_FRAMES["test"]]
        + [response for _, _, responses in SENTENCES.values() for response in responses["test"]]
    )
    for seed in range(8):
        seen = set[str]().union(
            *(words(" ".join([q.prompt, *q.responses])) for q in questions(seed, "train", 2000))
        )
        held_out = set[str]().union(
            *(words(" ".join(q.responses)) for q in questions(seed, "test", 300))
        )
        assert len(held_out) > 200
        assert not (held_out - words(wrapping)) & seen


def test_held_out_phrasings_are_never_in_training(
    asked: tuple[list[Question], list[Question]],
) -> None:
    for _, _, phrasings in FORMATS.values():
        assert not set(phrasings["train"]) & set(phrasings["test"])
    for phrasings in [*PHRASINGS.values(), *(p for _, p, _ in SENTENCES.values())]:
        assert not set(phrasings["train"]) & set(phrasings["test"])
    for frames in [FRAMES, LIST_FRAMES, *(responses for _, _, responses in SENTENCES.values())]:
        assert not set(frames["train"]) & set(frames["test"])
    # What is left of a prompt without its entities is its phrasing, as a whole.
    entities = {word for bank in BANKS.values() for word in words(bank)}
    outlines = [
        {
            " ".join(w for w in re.findall(r"[\w']+", q.prompt) if w.lower() not in entities)
            for q in part
        }
        for part in asked
    ]
    assert not outlines[0] & outlines[1]


def test_bayes_accuracy_of_held_out_pairs(
    sample: tuple[list[Record], list[Record]], asked: tuple[list[Question], list[Question]]
) -> None:
    chances = []
    for question in asked[1]:
        for one, other in combinations(map(question.quality, question.responses), 2):
            if one != other:
                chances.append(max(preference(one, other), preference(other, one)))
    assert 0.95 <= mean(chances) <= 0.97
    by_prompt = {question.prompt: question for part in asked for question in part}
    records = [*sample[0], *sample[1]]
    truthful = 0
    for record in records:
        quality = by_prompt[record["prompt"][0]["content"]].quality
        truthful += quality(record["chosen"][0]["content"]) > quality(
            record["rejected"][0]["content"]
        )
    assert truthful / len(records) == pytest.approx(mean(chances), abs=0.01)


def test_words_and_length_of_a_response_do_not_tell_its_quality() -> None:
    many = questions(0, "train", 2400)
    qualities: dict[str, list[int]] = defaultdict(list)
    for question in many:
        for response, quality in zip(question.responses, (2, 1, 1, 0), strict=True):
            for word in words(response):
                qualities[word].append(quality)
    assert len(qualities) > 500
    for word, found in qualities.items():
        # Qualities 2, 1, 1, 0 have mean 1 and variance 1/2; five standard errors are allowed.
        assert abs(mean(found) - 1) < 5 * (0.5 / len(found)) ** 0.5, (word, mean(found), len(found))
    for length in (len, lambda response: len(response.split())):
        lengths = [length(response) for question in many for response in question.responses]
        assert abs(correlation(lengths, [2, 1, 1, 0] * len(many))) < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_counting_words_fails(seed: int) -> None:
    train, test = generate(seed, TRAIN_GROUPS, TEST_GROUPS)
    assert baseline_accuracy(train, test) <= 0.6
    # Nor does it help to have seen the entities and the phrasings.
    known = generate(seed, TRAIN_GROUPS + 400, 8)[0][len(train) :]
    assert baseline_accuracy(train, known) <= 0.6


def test_the_baseline_finds_what_words_do_tell() -> None:
    def record(chosen: str, rejected: str) -> Record:
        return {
            "prompt": [{"role": "user", "content": "Hello."}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }

    polite = [record(f"please {word}", f"never {word}") for word in "abcdefgh"]
    assert baseline_accuracy(polite, [record("please x", "never x")]) == 1
    assert baseline_accuracy(polite, [record("never x", "please x")]) == 0
    assert baseline_accuracy(polite, [record("y", "x")]) == 0.5


def test_order_of_responses_does_not_tell_their_quality(
    sample: tuple[list[Record], list[Record]], asked: tuple[list[Question], list[Question]]
) -> None:
    qualities = {q.prompt: q.quality for q in asked[0]}
    first = []
    for record in sample[0][::5]:
        sides = [record[side][0]["content"] for side in ("chosen", "rejected")]
        first.append(mean(map(qualities[record["prompt"][0]["content"]], sides)))
    assert abs(mean(first) - 1) < 0.05


def test_more_groups_than_prompts_is_an_error() -> None:
    with pytest.raises(ConfigError, match="9999 test groups"):
        questions(0, "test", 9999)
