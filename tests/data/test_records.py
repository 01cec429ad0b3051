"""Records in every format and from every source become the same groups, and bad ones say where."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrm.data.records import MESSAGE_KEYS, Group, Preference, data_fingerprint, read_groups
from rayrm.data.sources import absolute
from rayrm.errors import DataError

Record = dict[str, Any]


def user(content: str) -> Record:
    return {"role": "user", "content": content}


def assistant(content: str) -> Record:
    return {"role": "assistant", "content": content}


Q, GOOD, BAD, WORSE = (
    user("Capital of Peru?"),
    assistant("Lima"),
    assistant("Quito"),
    assistant("?"),
)
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR: Record = {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}
TEXT_PAIR: Record = {"prompt": "Capital of Peru?", "chosen": "Lima", "rejected": "Quito"}


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Groups and report of the given records, through a JSON Lines file."""

    def read(*records: Any, **options: Any) -> Any:
        return read_groups(write(tmp_path / "records.jsonl", list(records)), **options)

    return read


# Formats


@pytest.mark.parametrize(
    ("record", "prompt", "responses"),
    [
        pytest.param(PAIR, [Q], [[GOOD], [BAD]], id="explicit messages"),
        pytest.param(
            {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
            [Q],
            [[GOOD], [BAD]],
            id="implicit messages",
        ),
        pytest.param(
            {"chosen": [Q, GOOD, Q, BAD], "rejected": [Q, GOOD, user("Sure?"), BAD]},
            [Q, GOOD],
            [[Q, BAD], [user("Sure?"), BAD]],
            id="several messages in a response",
        ),
        pytest.param(
            {"chosen": [Q, GOOD], "rejected": [Q, GOOD, Q, BAD]},
            [Q],
            [[GOOD], [GOOD, Q, BAD]],
            id="one conversation begins the other",
        ),
        pytest.param(
            {"chosen": [Q, GOOD], "rejected": [user("Why?"), BAD]},
            [],
            [[Q, GOOD], [user("Why?"), BAD]],
            id="nothing shared",
        ),
        pytest.param(TEXT_PAIR, "Capital of Peru?", ["Lima", "Quito"], id="explicit text"),
        pytest.param(
            {"prompt": "Capital of Peru?", "chosen": [Q, GOOD], "rejected": [Q, BAD]},
            [Q],
            [[GOOD], [BAD]],
            id="text that messages repeat, as in ultrafeedback_binarized",
        ),
        pytest.param(
            {
                "prompt": "Capital of Peru? ",
                "chosen": [SYSTEM, Q, WORSE, user("Sure?"), GOOD],
                "rejected": [SYSTEM, Q, WORSE, user("Sure?"), BAD],
            },
            [SYSTEM, Q, WORSE, user("Sure?")],
            [[GOOD], [BAD]],
            id="text that is one of several turns, as in hh-rlhf-trl-style",
        ),
        pytest.param(
            {"prompt": "Capital of Peru?", "chosen": [GOOD], "rejected": BAD},
            [Q],
            [[GOOD], [BAD]],
            id="text, answered by messages",
        ),
        pytest.param(
            {"prompt": "", "chosen": [Q, GOOD], "rejected": [Q, BAD]},
            [Q],
            [[GOOD], [BAD]],
            id="empty text beside messages",
        ),
        pytest.param(
            {"prompt": [Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
            [Q],
            [[GOOD], [BAD]],
            id="messages that messages repeat",
        ),
        pytest.param(
            {"prompt": [Q], "chosen": [Q, GOOD], "rejected": [BAD]},
            [Q],
            [[GOOD], [BAD]],
            id="messages that one response repeats",
        ),
        pytest.param(
            {"prompt": Q, "chosen": GOOD, "rejected": BAD},
            [Q],
            [[GOOD], [BAD]],
            id="single messages",
        ),
        pytest.param(
            {"prompt": Q, "responses": [BAD, GOOD], "ranks": [2, 1]},
            [Q],
            [[BAD], [GOOD]],
            id="a ranking of single messages",
        ),
        pytest.param(
            {"chosen": "Q: Lima", "rejected": "Q: Quito"}, "", ["Q: Lima", "Q: Quito"], id="text"
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: Capital of Peru?\n\nAssistant: Lima",
                "rejected": "\n\nHuman: Capital of Peru?\n\nAssistant: Quito\n",
            },
            [Q],
            [[GOOD], [BAD]],
            id="hh-rlhf's flat text",
        ),
    ],
)
def test_a_pair_is_told_from_its_columns(
    read: Any, record: Record, prompt: Any, responses: list[Any]
) -> None:
    (group,), _ = read(record)
    assert (group.prompt, group.responses) == (prompt, responses)
    assert group.preferences == [Preference(1, 0) if "ranks" in record else Preference(0, 1)]
    assert group.finished == [True, True]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [Q], "chosen": [GOOD], "rejected": [[BAD], [WORSE]]},
        {"chosen": [Q, GOOD], "rejected": [[Q, BAD], [Q, WORSE]]},
        {
            "chosen": "\n\nHuman: Capital of Peru?\n\nAssistant: Lima",
            "rejected": [f"\n\nHuman: Capital of Peru?\n\nAssistant: {a}" for a in ("Quito", "?")],
        },
    ],
    ids=["explicit", "implicit", "flat"],
)
def test_best_of_n_prefers_chosen_to_each_rejected(read: Any, record: Record) -> None:
    (group,), _ = read(record)
    assert (group.prompt, group.responses) == ([Q], [[GOOD], [BAD], [WORSE]])
    assert group.preferences == [Preference(0, 1), Preference(0, 2)]


def test_best_of_n_in_text(read: Any) -> None:
    (group,), _ = read({"prompt": "1+1=", "chosen": "2", "rejected": ["3", "4"]})
    assert (group.prompt, group.responses) == ("1+1=", ["2", "3", "4"])
    assert group.preferences == [Preference(0, 1), Preference(0, 2)]


@pytest.mark.parametrize("ranking", [{"ranks": [2, 1, 3]}, {"scores": [0.5, 7, -1]}])
def test_rank_one_and_the_highest_score_are_best(read: Any, ranking: Record) -> None:
    (group,), _ = read({"prompt": "p", "responses": ["b", "a", "c"], **ranking})
    assert group.responses == ["b", "a", "c"]
    assert {(p.chosen, p.rejected) for p in group.preferences} == {(1, 0), (0, 2), (1, 2)}


def test_each_of_several_chosen_wins_against_each_rejected(read: Any) -> None:
    record = {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"], "domain": "chat"}
    (group,), report = read(record)
    assert group.responses == ["a", "b", "c", "d"]
    assert [(p.chosen, p.rejected) for p in group.preferences] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert {p.styles for p in group.preferences} == {None}
    assert group.subset == "chat" and report.ignored_columns == []
    (group,), _ = read(record | {"rejected": "c", "subset": "mine"})
    assert [(p.chosen, p.rejected) for p in group.preferences] == [(0, 2), (1, 2)]
    assert group.subset == "mine"
    (group,), report = read(record | {"chosen": "a", "chosen_finished": False})
    assert group.subset == "" and report.ignored_columns == ["domain"]
    assert group.finished == [False, True, True]
    (group,), _ = read(record | {"chosen_finished": [True, False]})
    assert group.finished == [True, False, True, True]


def test_three_chosen_and_three_rejected_have_rm_benchs_styles(read: Any) -> None:
    """Also where two styles have the same text, and where records share their prompt."""
    first = {
        "prompt": "p",
        "chosen": ["a", "a", "b"],
        "rejected": ["c", "d", "e"],
        "domain": "math",
    }
    second = first | {"chosen": ["f", "c", "g"]}
    (group,), report = read(first, second)
    assert report.merged == 1 and report.ties == 1  # "c" is chosen and rejected
    text = group.responses
    found = [(p.styles, text[p.chosen], text[p.rejected]) for p in group.preferences]
    expected = [
        ((c, r), record["chosen"][c], record["rejected"][r])
        for record in (first, second)
        for c in range(3)
        for r in range(3)
        if record["chosen"][c] != record["rejected"][r]
    ]
    assert found == expected and len(found) == 17


@given(scores=st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_every_strictly_ordered_pair_is_a_preference_and_every_tie_is_counted(
    scores: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = [str(i) for i in range(len(scores))]
    records = [
        {"prompt": "p", "responses": names, "scores": scores},
        {"prompt": "other", "chosen": "x", "rejected": "y"},
    ]
    groups, report = read_groups(write(tmp_path_factory.mktemp("k") / "k.jsonl", records))
    found = {
        (g.responses[p.chosen], g.responses[p.rejected]) for g in groups for p in g.preferences
    }
    pairs = list(combinations(range(len(scores)), 2))
    ordered = {
        (names[i], names[j]) if scores[i] > scores[j] else (names[j], names[i])
        for i, j in pairs
        if scores[i] != scores[j]
    }
    assert found == ordered | {("x", "y")}
    assert report.pairs == len(ordered) + 1
    assert report.ties == len(pairs) - len(ordered)


def test_margin_label_and_subset_are_read(read: Any) -> None:
    (group,), _ = read(TEXT_PAIR | {"margin": 2, "label": 0.75, "subset": "facts"})
    assert group.preferences == [Preference(0, 1, margin=2.0, label=0.75)]
    assert group.subset == "facts"


@pytest.mark.parametrize(
    ("record", "finished"),
    [
        (TEXT_PAIR | {"rejected_finished": False}, [True, False]),
        (TEXT_PAIR | {"chosen_finished": False}, [False, True]),
        (
            {"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}
            | {"rejected_finished": [True, False]},
            [True, True, False],
        ),
        (
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "finished": [False, True]},
            [False, True],
        ),
    ],
)
def test_finished_is_read_per_response(read: Any, record: Record, finished: list[bool]) -> None:
    (group,), _ = read(record)
    assert group.finished == finished


def test_none_means_absent(read: Any) -> None:
    message = {**GOOD, "tool_calls": None}
    record = {"chosen": [Q, message], "rejected": [Q, BAD], "prompt": None, "tools": None}
    (group,), report = read(record | {"margin": None, "responses": None, "extra": None})
    assert (group.prompt, group.responses) == ([Q], [[GOOD], [BAD]])
    assert report.ignored_columns == []


# Groups


def test_records_with_one_prompt_become_one_group_of_distinct_responses(read: Any) -> None:
    groups, report = read(
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "c", "margin": 1},
        {"prompt": "p", "responses": ["c", "d"], "ranks": [2, 1]},
    )
    assert [group.prompt for group in groups] == ["p", "q"]
    assert groups[0].responses == ["a", "b", "c", "d"]
    assert groups[0].preferences == [
        Preference(0, 1, choice=0),
        Preference(0, 2, 1.0, choice=1),
        Preference(3, 2, choice=2),
    ]
    assert groups[0].source.endswith("records.jsonl:1")
    assert groups[1].source.endswith("records.jsonl:2")
    assert (report.records, report.groups, report.pairs, report.merged) == (4, 2, 4, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "p", "subset": "s"}, {"prompt": "p", "subset": "t"}),
        ({}, {}),
        ({"prompt": ""}, {"prompt": ""}),
    ],
    ids=["another subset", "no prompt", "empty prompt"],
)
def test_records_of_other_subsets_or_without_a_prompt_stay_apart(
    read: Any, one: Record, other: Record
) -> None:
    groups, report = read(
        one | {"chosen": "a", "rejected": "b"}, other | {"chosen": "a", "rejected": "c"}
    )
    assert len(groups) == 2
    assert report.merged == 0


def test_a_cut_response_is_not_the_finished_one_of_the_same_text(read: Any) -> None:
    (group,), report = read(
        {"prompt": "p", "chosen": "a", "rejected": "a", "rejected_finished": False},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    )
    assert group.responses == ["a", "a", "b"]
    assert group.finished == [True, False, True]
    assert report.ties == 0


def test_disagreement_and_repetition_keep_every_preference(read: Any) -> None:
    (group,), _ = read(
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    )
    pairs = [(p.chosen, p.rejected) for p in group.preferences]
    assert pairs == [(0, 1), (1, 0), (0, 1)]


def test_a_choice_is_one_response_before_all_that_its_record_ranks_below_it(read: Any) -> None:
    """What each record says of a prompt stays apart from what the others say."""
    (group,), _ = read(
        {"prompt": "p", "responses": ["c", "a", "b"], "ranks": [3, 1, 2]},
        {"prompt": "p", "chosen": "a", "rejected": ["b", "c"]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [2, 2, 1, 0]},
    )
    choices: dict[int, tuple[str, str]] = {}
    for p in group.preferences:
        chosen, below = group.responses[p.chosen], choices.get(p.choice, ("", ""))[1]
        choices[p.choice] = (chosen, below + group.responses[p.rejected])
    told = [(chosen, "".join(sorted(below))) for chosen, below in choices.values()]
    assert told == [
        *(("a", "bc"), ("b", "c")),
        ("a", "bc"),
        ("a", "b"),
        *(("a", "cd"), ("b", "cd"), ("c", "d")),
    ]


def test_ties_make_no_pair_and_are_counted(read: Any) -> None:
    groups, report = read(
        PAIR,
        {"prompt": [Q], "chosen": [WORSE], "rejected": [WORSE]},
        {"chosen": [user("Hm?"), GOOD], "rejected": [user("Hm?"), GOOD]},
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 1, 1]},
    )
    (group,) = groups
    assert group.responses == [[GOOD], [BAD]]
    assert (report.pairs, report.ties, report.dropped) == (1, 5, 2)
    assert "5 ties" in str(report)


def test_ties_are_preferences_where_they_are_asked_for(read: Any) -> None:
    """And change nothing of the groups where they are not, not even their fingerprint."""
    ranked = {"prompt": "p", "responses": ["a", "b", "c", "b"], "ranks": [1, 2, 2, 2]}
    equal = {"prompt": "q", "responses": ["d", "e"], "scores": [0.5, 0.5]}
    same = {"prompt": "r", "responses": ["f", "f"], "scores": [1, 1]}
    (plain,), _ = read(ranked, equal, same)
    (first, second), report = read(ranked, equal, same, ties=True)
    ties = [p for p in first.preferences if p.tie]
    assert [(p.chosen, p.rejected, p.label) for p in ties] == [(1, 2, 0.5), (2, 1, 0.5)]
    assert len({p.choice for p in ties} | {p.choice for p in plain.preferences}) == 3
    assert [p for p in first.preferences if not p.tie] == plain.preferences
    assert first.responses == plain.responses == ["a", "b", "c"]
    assert second.responses == ["d", "e"] and [p.tie for p in second.preferences] == [True]
    assert (report.groups, report.pairs, report.ties, report.dropped) == (2, 6, 5, 1)
    assert data_fingerprint([first]) != data_fingerprint([plain])


def test_nothing_but_ties_is_an_error(read: Any) -> None:
    with pytest.raises(DataError, match=r"no preference to learn from .*1 ties"):
        read({"prompt": "p", "chosen": "a", "rejected": "a"})


# Sources


def _json_array(path: Path, records: list[Record]) -> Path:
    (path / "a.json").write_text("\n " + json.dumps(records, indent=2))
    return path / "a.json"


def _json_lines(name: str) -> Any:
    def make(path: Path, records: list[Record]) -> Path:
        write(path / name, records)
        return path / name

    return make


def _gzip(name: str) -> Any:
    def make(path: Path, records: list[Record]) -> Path:
        text = json.dumps(records) if name == "a.json.gz" else "\n".join(map(json.dumps, records))
        (path / name).write_bytes(gzip.compress(text.encode()))
        return path / name

    return make


def _parquet(path: Path, records: list[Record]) -> Path:
    datasets.Dataset.from_list(records).to_parquet(path / "a[1].parquet")
    return path / "a[1].parquet"


def _arrow_stream(path: Path, records: list[Record]) -> Path:
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(str(path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    return path / "a.arrow"


def _arrow_file(path: Path, records: list[Record]) -> Path:
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_file(str(path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    return path / "a.arrow"


def _saved(path: Path, records: list[Record]) -> Path:
    datasets.Dataset.from_list(records).save_to_disk(path / "saved")
    return path / "saved"


def _saved_splits(path: Path, records: list[Record]) -> Path:
    other = datasets.Dataset.from_list([TEXT_PAIR])
    splits = {"test": other, "train": datasets.Dataset.from_list(records)}
    datasets.DatasetDict(splits).save_to_disk(path / "saved")
    return path / "saved"


def _directory(path: Path, records: list[Record]) -> Path:
    (path / "d" / "b").mkdir(parents=True)
    write(path / "d" / "a.jsonl", records[:1])
    _saved(path / "d" / "b", records[1:2])
    write(path / "d" / "c.jsonl", records[2:])
    return path / "d"


RECORDS: list[Record] = [
    PAIR | {"subset": "s", "margin": None},
    PAIR | {"prompt": [user("Hm?")], "subset": None, "margin": None},
    PAIR | {"subset": None, "margin": 1.0},
]


@pytest.mark.parametrize(
    "make",
    [
        _json_array,
        _json_lines("a.json"),
        _json_lines("a.jsonl"),
        _gzip("a.json.gz"),
        _gzip("a.jsonl.gz"),
        _parquet,
        _arrow_stream,
        _arrow_file,
        _saved,
        _saved_splits,
        _directory,
    ],
)
def test_every_source_gives_the_same_groups(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Any
) -> None:
    path = make(tmp_path, RECORDS)
    expected, _ = read_groups(write(tmp_path / "expected.jsonl", RECORDS))
    capfd.readouterr()
    groups, report = read_groups(str(path))
    assert data_fingerprint(groups) == data_fingerprint(expected)
    assert report.records == 3
    assert groups[0].source.endswith(":1")
    assert capfd.readouterr() == ("", "")


def test_a_glob_reads_its_files_in_order_and_lists_what_it_passes_by(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", [{"prompt": "b", "chosen": "x", "rejected": "y"}])
    write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "y"}])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "sub").mkdir()
    groups, report = read_groups(str(tmp_path / "*"))
    assert [group.prompt for group in groups] == ["a", "b"]
    assert report.ignored_files == [str(tmp_path / "README.md"), str(tmp_path / "sub")]


def test_files_of_other_formats_are_read_together(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "pairs.jsonl", [PAIR]),
        write(
            tmp_path / "ranks.jsonl", [{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}]
        ),
        str(_parquet(tmp_path, [TEXT_PAIR])),
    ]
    groups, _ = read_groups(paths)
    assert [group.prompt for group in groups] == [[Q], "p", "Capital of Peru?"]


def test_records_of_other_formats_in_one_file_are_read_together(read: Any) -> None:
    groups, _ = read(PAIR, TEXT_PAIR, {"chosen": "a", "rejected": ["b", "c"]})
    assert [group.prompt for group in groups] == [[Q], "Capital of Peru?", ""]


def test_a_directory_of_several_splits_gives_the_one_asked_for(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}-00000.jsonl", [TEXT_PAIR | {"prompt": split}])
    groups, report = read_groups(str(tmp_path), split="test")
    assert [group.prompt for group in groups] == ["test"]
    assert report.ignored_files == [str(tmp_path / "train-00000.jsonl")]
    with pytest.raises(DataError, match=r"'validation'.* test, train"):
        read_groups(str(tmp_path), split="validation")


def test_a_missing_split_of_a_saved_dataset_lists_those_it_has(tmp_path: Path) -> None:
    path = _saved_splits(tmp_path, RECORDS)
    with pytest.raises(DataError, match=r"no split 'dev'; it has test, train"):
        read_groups(str(path), split="dev")


def test_a_name_that_is_no_path_is_read_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        found = f"{name} {configuration} {split}"
        return datasets.Dataset.from_list([TEXT_PAIR | {"prompt": found}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path, found in {
        "prefs": "prefs None test",
        "org/prefs": "org/prefs None test",
        "prefs@train": "prefs None train",
        "org/prefs@train_prefs": "org/prefs None train_prefs",
        "org/prefs/en.v1": "org/prefs en.v1 test",
        "org/prefs/en@train": "org/prefs en train",
        "hub:prefs": "prefs None test",
        "hub:org/prefs/en": "org/prefs en test",
        "hub:org/prefs@train[:10%]+dev": "org/prefs None train[:10%]+dev",
        "hub:org/prefs/en@train[5:]": "org/prefs en train[5:]",
    }.items():
        (group,), _ = read_groups(path, split="test")
        assert group.prompt == found
        assert group.source == f"{path}:1"
        assert absolute(path) == path


@pytest.mark.parametrize("path", ["hub:", "hub:a/b/c/d", "hub:org/prefs@", "hub:/x", "hub:*.jsonl"])
def test_a_name_that_no_hub_has_is_refused(path: str) -> None:
    with pytest.raises(DataError, match=r"must be hub:OWNER/NAME\[/CONFIGURATION\]\[@SPLIT\]"):
        read_groups(path)


def test_configurations_and_splits_are_those_that_datasets_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A dataset's repository on this disk: `datasets` opens it by the name that it has there."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "org" / "prefs"
    repository.mkdir(parents=True)
    card = ["---", "configs:"]
    for configuration in ("en", "de"):
        card += [f"- config_name: {configuration}", "  data_files:"]
        for split in ("train_prefs", "test_prefs"):
            name = f"{configuration}-{split}.jsonl"
            prompts = [{"prompt": f"{configuration} {split} {i}"} for i in range(3)]
            write(repository / name, [TEXT_PAIR | prompt for prompt in prompts])
            card += [f"  - split: {split}", f"    path: {name}"]
    (repository / "README.md").write_text("\n".join([*card, "---", ""]))

    def prompts_of(path: str, split: str = "train") -> list[Any]:
        return [group.prompt for group in read_groups(path, split=split)[0]]

    for prefix in ("", "hub:"):
        found = prompts_of(f"{prefix}org/prefs/de@test_prefs")
        assert found == [f"de test_prefs {i}" for i in range(3)]
        assert prompts_of(f"{prefix}org/prefs/en", "train_prefs")[0] == "en train_prefs 0"
    assert prompts_of("hub:org/prefs/en@test_prefs[1:2]") == ["en test_prefs 1"]
    with pytest.raises(DataError, match=r"'hub:org/prefs/fr': split 'train' .*fr"):
        prompts_of("hub:org/prefs/fr")
    assert len(prompts_of("org/prefs")) == 6  # a path goes first: the files of all configurations


def test_a_path_begins_at_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", [PAIR])
    for path in ("~/a.jsonl", "~/*.jsonl", "~"):
        groups, _ = read_groups(path)
        assert len(groups) == 1
        assert absolute(path) == path.replace("~", str(tmp_path))


def test_a_missing_hub_dataset_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for path, split in (("org/prefs", "train"), ("org/prefs/en@dev", "dev")):
        with pytest.raises(
            DataError, match=f"nothing at {tmp_path / path}, .*split '{split}'.*hub"
        ):
            read_groups(path)


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "a/b/c/d", "missing*.jsonl"])
def test_a_missing_file_is_named_by_its_absolute_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=str(tmp_path / path).replace("*", r"\*")):
        read_groups(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"chosen,rejected", "unknown file type; known: .json, .jsonl"),
        ("a.jsonl", b"", "no records"),
        ("a.json", b"[]", "no records"),
        ("a.json", b"[{]", "not valid JSON"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"chosen": 1}' * 99)[:-9], "cannot be read"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.arrow", b"not arrow", "cannot be read as arrow"),
    ],
)
def test_an_unreadable_file_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{tmp_path / name}: {message}"):
        read_groups(str(tmp_path / name), on_bad_record="skip")


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}: no file of type \.json"):
        read_groups(str(tmp_path))


def test_an_answer_that_looks_like_a_date_stays_text(read: Any) -> None:
    (group,), _ = read({"prompt": "When?", "chosen": "2024-01-01", "rejected": "2023-05-05"})
    assert group.responses == ["2024-01-01", "2023-05-05"]


def test_the_types_load_neither_datasets_nor_torch() -> None:
    code = (
        "import rayrm.data, sys; sys.exit(bool({'datasets', 'torch', 'pandas'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Bad records

RANKED = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "completion": "a"}, r"found: prompt, completion\); a record has chosen"),
        ({"chosen": "a"}, "found: chosen"),
        ({}, "found: none"),
        (TEXT_PAIR | {"responses": ["a", "b"]}, "the columns match no format"),
        (RANKED | {"scores": [1, 2]}, "the columns match no format"),
        ([PAIR], "the record is a list, not an object"),
        (TEXT_PAIR | {"chosen": 3}, "`chosen` is a number; must be text or a list of messages"),
        (TEXT_PAIR | {"rejected": ["a", None]}, r"`rejected\[1\]` is missing"),
        (TEXT_PAIR | {"rejected": []}, "`rejected` is empty"),
        (TEXT_PAIR | {"prompt": 3}, "`prompt` is a number"),
        (TEXT_PAIR | {"chosen": ""}, "`chosen` is empty"),
        (TEXT_PAIR | {"chosen": " \n"}, "`chosen` is empty"),
        (TEXT_PAIR | {"chosen": "\ud83d"}, "`chosen` has a lone surrogate at character 0"),
        (PAIR | {"chosen": []}, "`chosen` is empty"),
        (PAIR | {"chosen": [assistant("")]}, "`chosen` is empty"),
        (PAIR | {"chosen": "Lima"}, "`prompt` is a list but `chosen` is text"),
        (TEXT_PAIR | {"rejected": [BAD]}, "`prompt` is text but `rejected` is a list"),
        (PAIR | {"chosen": [GOOD, Q]}, "`chosen` ends in a 'user' message"),
        (PAIR | {"prompt": [Q, GOOD], "chosen": [Q, GOOD]}, "`chosen` is the prompt alone"),
        (
            TEXT_PAIR | {"chosen": [Q, GOOD], "rejected": [user("?"), BAD]},
            "give the prompt as mess",
        ),
        (PAIR | {"prompt": "?", "chosen": [Q, GOOD]}, "of `chosen` neither repeat it"),
        (PAIR | {"chosen": ["Lima"]}, r"`prompt` is a list but `chosen\[0\]` is text"),
        (PAIR | {"chosen": [{"content": "Lima"}]}, r"`chosen\[0\].role` is missing"),
        (PAIR | {"chosen": [{"role": "assistant"}]}, r"`chosen\[0\].content` is missing"),
        (
            PAIR | {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
            r"`prompt\[0\].content` is a list; must be text",
        ),
        (
            PAIR | {"chosen": [GOOD | {"tool_calls": [1]}]},
            r"`chosen\[0\].tool_calls` is a list; mu",
        ),
        (
            PAIR | {"chosen": [GOOD | {"tool_calls": "f"}]},
            r"`chosen\[0\].tool_calls` is text; must",
        ),
        (PAIR | {"prompt": [Q | {"name": 3}]}, r"`prompt\[0\].name` is a number; must be text"),
        (
            PAIR | {"prompt": [Q | {"thinking": "\ud83d"}]},
            r"`prompt\[0\].thinking` has a lone surro",
        ),
        (
            PAIR | {"chosen": [GOOD | {"tool_calls": [{"name": "\ud83d"}]}]},
            r"`chosen\[0\].tool_calls` has a lone surrogate",
        ),
        (
            PAIR | {"chosen": [GOOD | {"function_call": {"name": "f"}}]},
            r"`chosen\[0\].function_call` would be lost; a template reads `tool_calls`",
        ),
        (PAIR | {"chosen": [GOOD | {"reasoning": "hm"}]}, "reads `reasoning_content`"),
        (PAIR | {"chosen": [{"role": "assistant", "name": "x"}]}, r"`chosen\[0\].content` is miss"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"},
            "`rejected` must begin with .*Human:",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": [Q, BAD]},
            "`rejected` must begin with .*Human:",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"},
            "`rejected` must .* end in an .*Assistant:",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            "`chosen` is empty",
        ),
        (RANKED | {"responses": ["a"]}, "`responses` must be a list of at least two"),
        (RANKED | {"responses": "ab"}, "`responses` must be a list"),
        (RANKED | {"ranks": [1]}, "`ranks` must be a list of 2 numbers"),
        (RANKED | {"ranks": [1, "2"]}, r"`ranks\[1\]` is '2'; must be a finite number"),
        (RANKED | {"ranks": [1, float("nan")]}, r"`ranks\[1\]` is nan"),
        (TEXT_PAIR | {"margin": float("inf")}, "`margin` is inf; must be a finite number"),
        (TEXT_PAIR | {"margin": True}, "`margin` is True"),
        (TEXT_PAIR | {"label": 1.5}, "`label` is 1.5; must be a number from 0 to 1"),
        (TEXT_PAIR | {"subset": 3}, "`subset` is a number; must be text"),
        (TEXT_PAIR | {"chosen_finished": "yes"}, "`chosen_finished` must be true or false"),
        (TEXT_PAIR | {"finished": [True, True]}, "use chosen_finished, rejected_finished"),
        (RANKED | {"finished": [True]}, "`finished` must be true or false for each of the 2"),
        (RANKED | {"chosen_finished": True}, "use finished"),
        (TEXT_PAIR | {"tools": {"name": "f"}}, "`tools` is an object; must be a list of objects"),
        (TEXT_PAIR | {"tools": ["f"]}, "`tools` is a list; must be a list of objects"),
        (TEXT_PAIR | {"tools": "get_weather"}, "`tools` is text, but not JSON"),
        (TEXT_PAIR | {"functions": [{"name": "f"}]}, "`functions` would be lost"),
        (TEXT_PAIR | {"chat_template_kwargs": {"a": 1}}, "`chat_template_kwargs` would be lost"),
        (TEXT_PAIR | {"images": ["a.png"]}, "`images` would be lost"),
        ({"question": "Q?", "chosen": "a", "rejected": "b"}, "`question` .* rename .* to prompt"),
    ],
)
def test_a_bad_record_says_file_row_field_and_what_is_right(
    read: Any, tmp_path: Path, record: Any, message: str
) -> None:
    where = rf"{tmp_path / 'records.jsonl'}, row 2: "
    with pytest.raises(DataError, match=where + ".*" + message):
        read(TEXT_PAIR, record)
    groups, report = read(TEXT_PAIR, record, PAIR, on_bad_record="skip")
    assert len(groups) == 2
    assert len(report.bad) == 1
    assert report.records == 3


def test_a_line_that_is_not_json_is_a_bad_record_with_its_line_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n{broken\n\xff\n")
    with pytest.raises(DataError, match=r"a\.jsonl, row 3: not valid JSON .*one object per line"):
        read_groups(str(path))
    _, report = read_groups(str(path), on_bad_record="skip")
    assert ["row 3" in report.bad[0], "row 4" in report.bad[1]] == [True, True]
    assert "2 bad" in str(report)


def test_only_bad_records_is_an_error_that_shows_the_first(read: Any) -> None:
    with pytest.raises(DataError, match=r"2 bad.*First bad record: .*row 1: .*`chosen` is empty"):
        read(TEXT_PAIR | {"chosen": ""}, {}, on_bad_record="skip")


def test_columns_without_a_meaning_are_reported(read: Any) -> None:
    record = PAIR | {"chosen": [GOOD | {"weight": 1}], "source": "s", "question": "q", "tools": []}
    _, report = read(record, PAIR | {"model": "m"})
    assert report.ignored_columns == ["message.weight", "model", "question", "source"]
    assert "ignored columns: message.weight model question source" in str(report)


# Keys of messages, and tools

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
KEYS: Record = {
    "tool_calls": [CALL],
    "tool_call_id": "call_1",
    "name": "ann",
    "reasoning_content": "Hm.",
    "thinking": "Well.",
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"a": {}, "b": []}}}]


@pytest.mark.parametrize("key", MESSAGE_KEYS)
def test_a_key_of_a_message_is_kept_and_an_empty_one_is_absent(read: Any, key: str) -> None:
    said = {key: KEYS[key]}
    (group,), report = read(PAIR | {"prompt": [Q | said], "chosen": [GOOD | said]})
    assert (group.prompt, group.responses) == ([Q | said], [[GOOD | said], [BAD]])
    assert report.ignored_columns == []
    nothing: list[Any] = [None, "", [], {}]
    for empty in nothing:
        (group,), report = read(PAIR | {"prompt": [Q | {key: empty}]})
        assert group.prompt == [Q] and report.ignored_columns == []


def test_a_response_may_be_a_call_alone(read: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    (group,), _ = read(PAIR | {"chosen": [call]}, PAIR | {"chosen": {**call}, "prompt": Q})
    assert group.responses == [[call], [BAD]]
    without = {key: value for key, value in call.items() if key != "content"}
    (group,), _ = read(PAIR | {"chosen": without})
    assert group.responses[0] == [call]


def test_tools_are_read_as_a_list_or_as_its_json(read: Any) -> None:
    (group,), report = read(PAIR | {"tools": TOOLS}, PAIR | {"tools": json.dumps(TOOLS)})
    assert group.tools == TOOLS and report.merged == 1
    nothing: list[Any] = [None, [], "", "[]", {}]
    for empty in nothing:
        (group,), report = read(PAIR | {"tools": empty})
        assert group.tools is None and report.ignored_columns == []


def test_prompts_that_differ_in_a_key_or_in_tools_are_groups_of_their_own(read: Any) -> None:
    """And data of their own, also where arguments differ in their order alone."""
    arguments = [{"a": 1, "b": 2}, {"b": 2, "a": 1}]
    calls = [Q | {"tool_calls": [{"name": "f", "arguments": given}]} for given in arguments]
    prompts = [[Q], *([Q | {key: value}] for key, value in KEYS.items()), *([c] for c in calls)]
    other = [
        {"type": "function", "function": {"name": "weather", "parameters": {"b": [], "a": {}}}}
    ]
    records = [PAIR | {"prompt": prompt} for prompt in prompts]
    records += [PAIR | {"tools": tools} for tools in (TOOLS, other)]
    groups, report = read(*records)
    assert len(groups) == len(records) and report.merged == 0
    assert len({data_fingerprint([group]) for group in groups}) == len(groups)


def test_responses_that_differ_in_a_key_alone_are_two(read: Any) -> None:
    for key, value in KEYS.items():
        (group,), report = read(PAIR | {"rejected": [GOOD | {key: value}]})
        assert len(group.responses) == 2 and report.ties == 0


def test_parquet_gives_the_keys_that_the_json_has(tmp_path: Path) -> None:
    """There every message has all keys, and every object of a column those of all the others."""
    weather: Record = {"name": "weather", "arguments": {"city": "Lima"}}
    time: Record = {"name": "time", "arguments": {"zone": "UTC", "at": [{"h": 1}, {"m": 2}]}}
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [call]} for call in (weather, time)
    ]
    tools = [
        {"name": "weather", "in": {"city": {"x": 2}}},
        {"name": "time", "in": {"zone": {"x": 1}}},
    ]
    records = [
        PAIR | {"prompt": [Q, call, {"role": "tool", "content": "18", "tool_call_id": "1"}]} | more
        for call in calls
        for more in ({"tools": None}, {"tools": tools})
    ]
    expected, _ = read_groups(write(tmp_path / "a.jsonl", records))
    assert expected[-1].prompt[1] == calls[1] and expected[-1].tools == tools
    for make in (_parquet, _saved, _arrow_file):
        groups, report = read_groups(str(make(tmp_path, records)))
        assert [(g.prompt, g.tools) for g in groups] == [(g.prompt, g.tools) for g in expected]
        assert data_fingerprint(groups) == data_fingerprint(expected)
        assert report.ignored_columns == []


# Fingerprint


def test_the_fingerprint_does_not_depend_on_file_names_or_on_how_files_are_cut(
    tmp_path: Path,
) -> None:
    whole, _ = read_groups(write(tmp_path / "whole.jsonl", RECORDS))
    parts, _ = read_groups(
        [write(tmp_path / "x.jsonl", RECORDS[:1]), write(tmp_path / "y.jsonl", RECORDS[1:])]
    )
    assert data_fingerprint(whole) == data_fingerprint(parts)
    assert len(data_fingerprint(whole)) == 64


def test_the_fingerprint_of_data_without_keys_and_tools_is_pinned(read: Any) -> None:
    """A run resumes by it: another one would not resume the runs of an earlier version."""
    named = {"margin": 0.5, "label": 0.9, "subset": "s"}
    text = {"prompt": "Ünï?", "chosen": "a", "rejected": ["b", "c"]}
    groups, _ = read(PAIR | named, text | {"rejected_finished": [True, False]})
    assert data_fingerprint(groups) == (
        "4d87f54785283f0b397027d81882990e260c50b32dec2dde91e9291b9e84f2e9"
    )


def test_the_fingerprint_changes_with_any_content() -> None:
    def fingerprint(**changes: Any) -> str:
        content: Record = {
            "prompt": "p",
            "responses": ["a", "b"],
            "preferences": [Preference(0, 1)],
            "finished": [True, True],
            "subset": "",
            "source": "file:1",
        }
        return data_fingerprint([Group(**(content | changes))])

    changes: list[Record] = [
        {"prompt": "q"},
        {"prompt": [user("p")]},
        {"responses": ["b", "a"]},
        {"preferences": [Preference(1, 0)]},
        {"preferences": [Preference(0, 1, margin=1.0)]},
        {"preferences": [Preference(0, 1, label=0.5)]},
        {"finished": [True, False]},
        {"subset": "s"},
        {"tools": TOOLS},
        *({"prompt": [user("p") | {key: value}]} for key, value in KEYS.items()),
    ]
    assert len({fingerprint(), *(fingerprint(**change) for change in changes)}) == 1 + len(changes)
    assert fingerprint(source="other:9") == fingerprint()
