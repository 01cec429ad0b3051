"""Preferences as ids: what is cut, dropped and counted, and the order of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest

from rayrm.data.records import Group, Message, Preference, Text
from rayrm.errors import DataError, RowError
from rayrm.rows import Row
from rayrm.text.fingerprints import fingerprint
from rayrm.text.template import Template, TemplateSpec
from rayrm.training.dataset import (
    LISTED_BAD_RESPONSES,
    EncodeReport,
    PreferenceData,
    Schedule,
    encode_groups,
)
from tests.tiny import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rayrm" / "encoded"


def byte_template(max_length: int = 100, eos: str = "</s>") -> Template:
    """Prompt, newline, response, EOS; a token a byte."""
    tokenizer = byte_tokenizer(["<pad>", "</s>", "<end>"], eos_token=eos, pad_token="<pad>")
    return Template(tokenizer, TemplateSpec("text", "\n", max_length, fingerprint(tokenizer)))


def group(
    prompt: Text,
    responses: Sequence[Text],
    pairs: Sequence[Preference | tuple[int, int]] = ((0, 1),),
    finished: Sequence[bool] | None = None,
    subset: str = "",
) -> Group:
    preferences = [p if isinstance(p, Preference) else Preference(*p) for p in pairs]
    done = list(finished or [True] * len(responses))
    return Group(prompt, list(responses), preferences, done, subset, "file.jsonl:7")


def texts(data: PreferenceData, index: int, template: Template) -> list[str]:
    return [str(template.tokenizer.decode(row)) for row in data[index].tokens.rows]


def test_groups_read_back_as_they_were_encoded() -> None:
    template = byte_template()
    pairs = [Preference(2, 0, 0.5, 0.75, choice=3), Preference(2, 1, choice=7)]
    data = encode_groups(
        [
            group("", ["lone", "other"]),
            group("What?", ["one", "only", "two"], pairs, [True, False, True], "skill"),
        ],
        template,
        "truncate",
    )
    assert len(data) == 2
    assert texts(data, 0, template) == ["lone</s>", "other</s>"]
    assert texts(data, 1, template) == ["What?\none</s>", "What?\nonly", "What?\ntwo</s>"]
    ranked = data[1]
    assert template.tokenizer.decode(ranked.tokens.prefix) == "What?\n"
    assert ranked.chosen.tolist() == [2, 2] and ranked.rejected.tolist() == [0, 1]
    assert ranked.margin.tolist() == [0.5, 0.0] and ranked.label.tolist() == [0.75, 1.0]
    assert ranked.choice.tolist() == [0, 1] and ranked.choices == 2
    assert ranked.pairs == 2 and (ranked.subset, ranked.source) == ("skill", "file.jsonl:7")
    assert ranked.tokens.prefix.dtype == np.int32
    assert data.report == EncodeReport(groups=2, pairs=3)


def test_all_rows_of_an_overlong_group_are_cut_alike() -> None:
    template = byte_template(12)
    long = group("0123456789", ["a", "bcdef", "gh"], [(0, 1), (2, 1)])
    data = encode_groups([long, group("Hi", ["a", "b"])], template, "truncate")
    assert texts(data, 0, template) == ["56789\na</s>", "56789\nbcdef</s>", "56789\ngh</s>"]
    assert texts(data, 1, template) == ["Hi\na</s>", "Hi\nb</s>"]
    assert data.report == EncodeReport(groups=2, pairs=3, truncated_groups=1)


def test_a_response_too_long_by_itself_goes_and_the_rest_of_its_group_stays() -> None:
    template = byte_template(12)
    ranked = group("Hi", ["x" * 20, "a", "b"], [(0, 1), (1, 2)])
    data = encode_groups([ranked], template, "truncate")
    assert texts(data, 0, template) == ["Hi\na</s>", "Hi\nb</s>"]
    assert data[0].chosen.tolist() == [0] and data[0].rejected.tolist() == [1]
    assert data.report == EncodeReport(groups=1, pairs=1, overlong_responses=1, dropped_pairs=1)


def test_dropping_leaves_overlong_responses_out_and_counts_them() -> None:
    template = byte_template(12)
    ranked = group("0123456", ["a", "bcdefgh", "i"], [(0, 1), (2, 1), (0, 2)])
    lost = group("0123456789ab", ["a", "b"])
    untokenised = group("0" * 10_000, ["a", "b"])
    data = encode_groups([ranked, lost, untokenised], template, "error")
    assert texts(data, 0, template) == ["0123456\na</s>", "0123456\ni</s>"]
    assert data.report == EncodeReport(groups=1, pairs=1, overlong_responses=5, dropped_pairs=4)


def test_a_choice_goes_on_without_a_response_that_was_left_out() -> None:
    ranking = [(0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 2, 3), (1, 3, 3), (2, 3, 5)]
    pairs = [Preference(chosen, rejected, choice=c) for chosen, rejected, c in ranking]
    ranked = group("Hi", ["a", "x" * 20, "b", "c"], pairs)
    kept = encode_groups([ranked], byte_template(12), "truncate")[0]
    assert list(zip(kept.chosen, kept.rejected, kept.choice, strict=True)) == [
        (0, 1, 0),
        (0, 2, 0),
        (1, 2, 1),
    ]


def test_pairs_that_become_identical_are_dropped_and_counted() -> None:
    """One response as the sampler gave it, with its end, the other without."""
    same = group("Hi", ["yes", "yes</s>", "no"], [(0, 1), (0, 2)])
    data = encode_groups([same], byte_template(), "truncate")
    assert data.report == EncodeReport(groups=1, pairs=1, identical_pairs=1)
    assert len(data[0].tokens.suffixes) == 2


def test_a_prompt_of_many_pairs_is_split_into_parts_that_add_up_to_it() -> None:
    """A chain of five pairs is cut; two pairs that share a response, and a lone one, are not."""
    template = byte_template()
    chain = [Preference(i, i + 1, margin=i, choice=i) for i in range(5)]
    others = [Preference(6, 7, label=0.75, choice=5), Preference(6, 8, choice=5)]
    others.append(Preference(9, 10, choice=6))
    many = group("Hi", [chr(97 + i) for i in range(11)], [*chain, *others])
    few = group("Ho", ["x", "y", "z"], [(0, 1), (1, 2), (0, 2)])
    data = encode_groups([many, few], template, "truncate", pairs_per_group=3)
    split = [data[i] for i in range(len(data))]
    read = [
        [
            (part.tokens.rows[c][3:-1].tolist(), part.tokens.rows[r][3:-1].tolist(), m, p)
            for c, r, m, p in zip(part.chosen, part.rejected, part.margin, part.label, strict=True)
        ]
        for part in split
    ]
    letters = [[template.tokenizer.decode(c + r) for c, r, *_ in part] for part in read]
    assert letters == [["ab", "bc", "cd"], ["de", "ef", "jk"], ["gh", "gi"], ["xy", "yz", "xz"]]
    assert [[m for *_, m, _ in part] for part in read][:2] == [[0, 1, 2], [3, 4, 0]]
    assert [p for *_, p in read[2]] == [0.75, 1.0]
    assert [(part.prompt_pairs, part.prompt_choices) for part in split] == [(8, 7)] * 3 + [(3, 1)]
    assert [part.choices for part in split] == [3, 3, 1, 1]
    assert {part.source for part in split} == {"file.jsonl:7"}
    assert all(template.tokenizer.decode(part.tokens.prefix) == "Hi\n" for part in split[:3])
    assert data.report == EncodeReport(groups=2, pairs=11, split_groups=1)


def test_a_prompt_up_to_the_limit_is_encoded_as_without_one() -> None:
    groups = [group("Hi", ["a", "b", "c", "d"], [(2, 3), (0, 1)]), group("Ho", ["a", "b"])]
    whole, limited = (
        encode_groups(groups, byte_template(), "truncate", pairs_per_group=n) for n in (None, 2)
    )
    assert len(whole) == len(limited) == 2 and whole.report == limited.report
    for i in range(2):
        for one, other in zip(astuple(whole[i]), astuple(limited[i]), strict=True):
            np.testing.assert_equal(one, other)


def test_held_out_rows_are_each_cut_by_themselves_and_none_is_left_out() -> None:
    """As they are where they are served: b fits whole, and c does when its prompt is cut."""
    template = byte_template(12)
    long = group("012345", ["a", "bcdef", "cccccc", "a</s>"], [(0, 1), (2, 1), (0, 3)])
    data = encode_groups([long], template, "truncate", cut_alike=False)
    assert texts(data, 0, template) == [
        "012345\na</s>",
        "12345\nbcdef</s>",
        "2345\ncccccc</s>",
        "012345\na</s>",
    ]
    assert data.report == EncodeReport(groups=1, pairs=3, truncated_groups=1)
    rows = [Row("012345", response) for response in long.responses]
    for row, ids, found in zip(rows, template.encode(rows), data[0].tokens.rows, strict=True):
        assert not isinstance(ids, RowError)
        np.testing.assert_array_equal(found, template.fit(row, ids, "truncate")[0])


def test_the_data_knows_its_largest_id_and_whether_anything_is_preferred() -> None:
    template = byte_template()
    undecided = [Preference(0, 1, label=0.5)]
    data = encode_groups([group("\xff", ["a", "b"], undecided)], template, "truncate")
    assert data.largest_id == max(max(row) for row in data[0].tokens.rows)
    assert data.undecided
    decided = [group("Hi", ["a", "b"], undecided), group("Ho", ["a", "b"])]
    assert not encode_groups(decided, template, "truncate").undecided


def test_empty_responses_are_dropped_and_counted() -> None:
    empty = group("Hi", ["</s>", "a", "b"], [(1, 0), (1, 2)])
    data = encode_groups([empty], byte_template(), "truncate")
    assert data.report == EncodeReport(groups=1, pairs=1, empty_responses=1, dropped_pairs=1)


def test_nothing_left_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match=r"no pair is left.*1 identical"):
        encode_groups([group("Hi", ["a", "a</s>"])], byte_template(), "truncate")


def test_a_row_that_cannot_be_encoded_is_an_error_that_names_it() -> None:
    messages: list[Message] = [{"role": "assistant", "content": "a"}]
    other: list[Message] = [{"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"file\.jsonl:7: response 1: messages need a chat"):
        encode_groups([group([], [messages, other])], byte_template(), "truncate")


DROPS = """{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}\
{% endif %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}<end>{% endfor %}"""


def chat_template() -> Template:
    """Refuses tools and loses thoughts."""
    tokenizer = byte_tokenizer(
        ["<pad>", "</s>", "<end>"], eos_token="</s>", pad_token="<pad>", template=DROPS
    )
    return Template(tokenizer, TemplateSpec("chat", "\n", 200, fingerprint(tokenizer)))


def mixed() -> list[Group]:
    """Responses 2 and 4 of the first group are bad, and all of the second's."""
    refused: list[Message] = [
        {"role": "tool", "content": "18"},
        {"role": "assistant", "content": "It is 18."},
    ]
    texts: list[Text] = ["a", "<think>hm</think>b", "c", refused]
    messages: list[Text] = [
        [{"role": "assistant", "content": t}] if isinstance(t, str) else t for t in texts
    ]
    pairs = [(0, 1), (0, 2), (1, 2), (2, 3)]
    prompt: Text = [{"role": "user", "content": "Hi"}]
    return [group(prompt, messages, pairs), group(prompt, [messages[3], messages[1]])]


def test_a_response_that_the_template_refuses_is_skipped_as_a_bad_record_is() -> None:
    template = chat_template()
    data = encode_groups(mixed(), template, "truncate", on_bad_record="skip")
    assert len(data) == 1
    assert texts(data, 0, template) == [f"user: Hi<end>assistant: {r}<end>" for r in "ac"]
    assert data[0].chosen.tolist() == [0] and data[0].rejected.tolist() == [1]
    report = data.report
    assert (report.groups, report.pairs, report.dropped_pairs, report.bad_responses) == (1, 1, 4, 4)
    assert [message.partition(": ")[2][:10] for message in report.bad] == [
        f"response {i}" for i in (2, 4, 1, 2)
    ]
    assert "drops a thought" in report.bad[0] and "no tools" in report.bad[1]
    assert f"4 bad responses; the first bad response: {report.bad[0]}" in str(report)


def test_a_response_that_the_template_refuses_is_an_error_that_names_it() -> None:
    """Also where the same data was encoded without it before."""
    for _ in range(2):
        with pytest.raises(DataError, match=r"^file\.jsonl:7: response 2: .*drops a thought"):
            encode_groups(mixed(), chat_template(), "truncate")
        encode_groups(mixed(), chat_template(), "truncate", on_bad_record="skip")


def test_of_many_bad_responses_the_first_are_told_and_all_counted() -> None:
    many = [*mixed(), *mixed()[1:] * 30]
    report = encode_groups(many, chat_template(), "truncate", on_bad_record="skip").report
    assert report.bad_responses == 64 and len(report.bad) == LISTED_BAD_RESPONSES
    with pytest.raises(DataError, match=r"no pair is left .* 2 bad responses; .*response 1: "):
        encode_groups(mixed()[1:], chat_template(), "truncate", on_bad_record="skip")


def test_the_report_says_what_happened_and_nothing_else() -> None:
    report = EncodeReport(groups=3, pairs=5, identical_pairs=2)
    assert str(report) == "encoded 3 groups, 5 pairs, 2 identical pairs"


def test_the_same_data_is_encoded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group("Hi", ["a", "b"]), group("Ho", ["a", "a</s>", "b"], [(0, 1), (0, 2)])]
    first = encode_groups(groups, byte_template(), "truncate")
    monkeypatch.setattr(Template, "encode", lambda *_: pytest.fail("encoded again"))
    again = encode_groups(groups, byte_template(), "truncate")
    assert len(list(cache.iterdir())) == 1
    assert again.report == first.report and again.fingerprint == first.fingerprint
    for i in range(2):
        assert all(map(np.array_equal, first[i].tokens.rows, again[i].tokens.rows))


def test_whatever_changes_the_ids_is_encoded_anew(cache: Path) -> None:
    groups = [group("Hi", ["a", "b"])]
    template = byte_template()
    chat = byte_template()
    chat.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    encode_groups(groups, template, "truncate")
    encode_groups(groups, template, "error")
    encode_groups([group("Hi", ["b", "a"])], template, "truncate")
    encode_groups([group("Hi", ["a", "b"], finished=[True, False])], template, "truncate")
    encode_groups([group("Hi", ["a", "b"], [Preference(0, 1, choice=1)])], template, "truncate")
    encode_groups(groups, byte_template(50), "truncate")
    encode_groups(groups, replace(template, spec=replace(template.spec, separator=" ")), "truncate")
    encode_groups(groups, chat, "truncate")
    other_end = encode_groups(groups, byte_template(eos="<end>"), "truncate")
    assert texts(other_end, 0, template) == ["Hi\na<end>", "Hi\nb<end>"]
    encode_groups(groups, template, "truncate", cut_alike=False)
    encode_groups(groups, template, "truncate", pairs_per_group=1)
    encode_groups(groups, template, "truncate", pairs_per_group=1, whole_choices=True)
    assert len(list(cache.iterdir())) == 12


# The order of training ----------------------------------------------------------------------------


def schedule(groups: int = 10, per_step: int = 4, epochs: float = 1.0, seed: int = 0) -> Schedule:
    return Schedule(groups, per_step, epochs, seed, "ab" * 32)


@pytest.mark.parametrize(("groups", "per_step"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_every_epoch_covers_every_group_once(groups: int, per_step: int) -> None:
    plan = schedule(groups, per_step, epochs=3)
    assert plan.steps == 3 * plan.steps_per_epoch
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [i for step in steps for i in plan[step]]
        assert sorted(seen) == list(range(groups))
        assert all(1 <= len(plan[step]) <= per_step for step in steps)


def test_the_order_is_a_function_of_seed_epoch_and_data() -> None:
    def order(plan: Schedule, epoch: int = 0) -> list[list[int]]:
        n = plan.steps_per_epoch
        return [plan[step] for step in range(epoch * n, (epoch + 1) * n)]

    plan = schedule(100)
    assert order(schedule(100)) == order(plan)
    assert order(plan, 1) != order(plan)
    assert order(schedule(100, seed=1)) != order(plan)
    assert order(replace(plan, fingerprint="cd" * 32, _orders={})) != order(plan)
    # As after resuming: any step first.
    assert schedule(100)[37] == plan[37]


def test_the_order_is_pinned() -> None:
    """Another order would not resume the runs of an earlier version."""
    plan = schedule(5, 2)
    assert [plan[step] for step in range(3)] == [[4, 0], [1, 3], [2]]


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, 25), (0.5, 12), (2.2, 55), (0.001, 1), (1.02, 26)]
)
def test_a_fraction_of_an_epoch_stops_early(epochs: float, steps: int) -> None:
    assert schedule(100, 4, epochs).steps == steps
