"""A corpus scored over the session's cluster, by the call and by the job."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rayrm.data.records import read_sampled
from rayrm.data.sources import open_sources
from rayrm.errors import DataError, ServiceError
from rayrm.files import whole_file
from rayrm.model.engine import RewardModel
from rayrm.model.export import read_export
from rayrm.serving import corpus
from rayrm.serving.config import ServeConfig
from rayrm.serving.corpus import (
    Corpus,
    Part,
    Parts,
    ScoredCorpus,
    _digest,
    _room,
    _score_parts,
    _scorers,
    score_corpus,
)
from tests.makers import make_export

ROOT = Path(__file__).parent.parent.parent
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def replicas(cluster: None, tiny_export: Path) -> Iterator[list[Any]]:
    config = ServeConfig(export=str(tiny_export), dtype="float32", replicas=2)
    with _scorers(config, read_export(tiny_export)[1].version, 2) as actors:
        yield actors


@pytest.fixture
def score(
    replicas: list[Any], tiny_export: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ScoredCorpus]:
    """score_corpus with the tiny export, by replicas that the tests share."""
    monkeypatch.setattr("rayrm.serving.corpus._scorers", lambda *_: nullcontext(replicas))

    def call(source: Path, target: Path, part_rows: int = 7, **config: Any) -> ScoredCorpus:
        settings = ServeConfig(**{"export": str(tiny_export), "dtype": "float32", **config})
        return score_corpus(settings, str(source), target, part_rows=part_rows)

    return call


@pytest.fixture(scope="module")
def local(tiny_export: Path) -> RewardModel:
    return RewardModel.load(tiny_export, "cpu", "float32")


def write(path: Path, records: Records) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path) -> Records:
    if path.suffix == ".parquet":
        records: Records = pq.read_table(path).to_pylist()
        return records
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def rows(n: int) -> Records:
    return [
        {"id": i, "prompt": f"Question {i // 3}?", "response": "because " * (i % 5) + "so."}
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "suffixes", [("jsonl", "jsonl"), ("jsonl.gz", "parquet"), ("parquet", "jsonl.gz")]
)
def test_every_row_keeps_its_place_and_columns_and_gets_its_reward(
    score: Callable[..., ScoredCorpus],
    local: RewardModel,
    tmp_path: Path,
    suffixes: tuple[str, str],
) -> None:
    records = rows(40)
    source = write(tmp_path / f"in.{suffixes[0]}", records)
    target = tmp_path / f"out.{suffixes[1]}"
    scored = score(source, target)
    assert (scored.rows, scored.resumed, scored.failed) == (40, 0, 0)
    expected = local.score([r["prompt"] for r in records], [r["response"] for r in records])
    found = read(target)
    assert [{k: r[k] for k in records[0]} for r in found] == records
    np.testing.assert_allclose([r["reward"] for r in found], expected.values, atol=1e-5)
    assert all(r["version"] == local.version and r["reward_error"] is None for r in found)
    assert not (tmp_path / f"out.{suffixes[1]}.parts").exists()


def test_bad_rows_are_carried_through_with_their_errors(
    score: Callable[..., ScoredCorpus], local: RewardModel, tmp_path: Path
) -> None:
    lines: list[tuple[str, str | None]] = [
        ('{"prompt": "Name a fruit.", "response": "Plum."}', None),
        ('{"prompt": "Name a fruit.", "response": ""}', "EmptyResponse: "),
        ('{"prompt": "Name a fruit.", "response": "' + "plum " * 300 + '"}', "RowTooLong: "),
        ('{"prompt": "Name a fruit.", "response": 3}', "row 4: `response` is a number"),
        (
            '{"prompt": "Name a fruit.", "response": "Plum.", "tools": [1]}',
            "`tools` is a list; must",
        ),
        ('{"prompt": "Name a fruit."}', "must have exactly one of: prompt and response"),
        ('{"question": "Name a fruit.", "response": "Plum."}', "`question` would be lost"),
        ('{"prompt": "half \\ud83d", "response": "Plum."}', "lone surrogate"),
        ('{"prompt": "Name', "row 9: not valid JSON"),
        ("[1]", "row 10: the record is a list"),
        ('{"prompt": "Name a fruit.", "response": "Pear.", "finished": false}', None),
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(line for line, _ in lines) + "\n")
    target = tmp_path / "out.jsonl"
    assert score(source, target).failed == 9
    found = read(target)
    for (line, error), record in zip(lines, found, strict=True):
        if line.endswith("}"):
            assert json.loads(line).items() <= record.items()
        assert error is None or error in record["reward_error"]
        assert (record["reward"] is None) == (record["reward_error"] is not None) == bool(error)
    expected = local.score(["Name a fruit."] * 2, ["Plum.", "Pear."], finished=[True, False])
    np.testing.assert_allclose(
        [found[0]["reward"], found[-1]["reward"]], expected.values, atol=1e-5
    )
    assert [r["unfinished"] for r in (found[0], found[-1])] == [False, True]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_of_responses_get_lists_of_rewards(
    score: Callable[..., ScoredCorpus], local: RewardModel, tmp_path: Path, suffix: str
) -> None:
    records: Records = [
        {
            "prompt": "Name a fruit.",
            "responses": ["Plum.", "", "Pear."],
            "finished": [True, True, False],
        },
        {"prompt": "Name a colour.", "responses": ["Red."], "finished": None},
        {"prompt": "Name a colour.", "responses": ["Red.", "Blue."], "finished": [True]},
        {"prompt": "Name a colour.", "responses": [], "finished": None},
    ]
    target = tmp_path / f"out.{suffix}"
    scored = score(write(tmp_path / f"in.{suffix}", records), target, part_rows=3)
    assert scored.failed == 3
    found = read(target)
    expected = local.score(
        ["Name a fruit."] * 2 + ["Name a colour."],
        ["Plum.", "Pear.", "Red."],
        finished=[True, False, True],
    )
    rewards = [found[0]["reward"][0], found[0]["reward"][2], found[1]["reward"][0]]
    np.testing.assert_allclose(rewards, expected.values, atol=1e-5)
    assert found[0]["unfinished"] == [False, False, True]
    assert found[0]["reward"][1] is None and "EmptyResponse" in found[0]["reward_error"][1]
    assert found[2]["reward"] == [None, None] and "`finished`" in found[2]["reward_error"][1]
    assert found[3]["reward"] == [None] and "at least one" in found[3]["reward_error"][0]
    assert [{k: r[k] for k in records[0]} for r in found] == records


def test_conversations_are_scored_by_their_last_message(
    score: Callable[..., ScoredCorpus], local: RewardModel, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "Plum."},
        {"role": "user", "content": "Another."},
        {"role": "assistant", "content": "Pear."},
    ]
    source = write(tmp_path / "in.jsonl", [{"messages": messages}, {"messages": messages[:3]}])
    score(source, tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    expected = local.score([messages[:3]], [messages[3:]])
    np.testing.assert_allclose([found[0]["reward"]], expected.values, atol=1e-5)
    assert found[1]["reward_error"].startswith("InvalidRow: a response ends with an assistant")


def test_parquet_keeps_the_types_of_its_columns(
    score: Callable[..., ScoredCorpus], tmp_path: Path
) -> None:
    table = pa.table(
        {
            "id": pa.array(range(20), pa.int16()),
            "prompt": pa.array(["Name a fruit."] * 20, pa.large_string()),
            "response": [f"Plum {i}." for i in range(20)],
            "tag": pa.array([None] * 19 + ["x"], pa.dictionary(pa.int8(), pa.string())),
            "day": pa.array(range(20), pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.remove_metadata().types[:5] == table.schema.types
    assert found.select(table.column_names).to_pylist() == table.to_pylist()
    assert found.schema.field("reward").type == pa.float32()
    score(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert [r["day"] for r in read(tmp_path / "out.jsonl")][:2] == ["1970-01-01", "1970-01-02"]


def job(source: Path, target: Path, export: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/score.py", *map(str, (export, source, target)), *more]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_without_replicas_as_many_run_as_the_labelled_nodes_hold(cluster: None) -> None:
    def count(**config: Any) -> int:
        return _room(ServeConfig(export="e", **config))

    assert count() == 8
    assert count(cpus_per_replica=3) == 2
    assert count(gpus_per_replica=1) == 0
    assert count(labels={"rayrm/group": "serve"}) == 0


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was_and_ends_in_the_same_bytes(
    score: Callable[..., ScoredCorpus], tiny_export: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", rows(4000))
    uninterrupted, target = tmp_path / "once.jsonl", tmp_path / "out.jsonl"
    score(source, uninterrupted, part_rows=8)

    parts = tmp_path / "out.jsonl.parts"
    options = ("--part-rows", "8", "--replicas", "1", "--dtype", "float32")
    killed = job(source, target, tiny_export, *options)
    deadline = time.monotonic() + 600
    while len(list(parts.glob("part-*"))) < 5:
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = len(list(parts.glob("part-*")))
    assert 5 <= done < 500 and not target.exists()

    resumed = job(source, target, tiny_export, *options)
    text, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, text
    assert f"{4000 - 8 * done} rows scored in" in text and "rows/s" in text
    assert f"{8 * done} scored by an earlier run" in text
    assert target.read_bytes() == uninterrupted.read_bytes()
    assert not parts.exists()


class Stopped(Exception):
    pass


def stop_after(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends when that many parts are written."""
    whole, left = Parts.write, [parts]

    def write(self: Parts, *args: Any) -> None:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        whole(self, *args)

    monkeypatch.setattr(Parts, "write", write)


def test_parts_that_are_done_are_not_scored_again(
    score: Callable[..., ScoredCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "in.jsonl", rows(40))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(2, patch)
        score(source, tmp_path / "out.jsonl")
    done = sorted((tmp_path / "out.jsonl.parts").glob("part-*"))
    assert len(done) == 2
    done[1].write_bytes(b'{"as": "it was"}\n')
    (done[0].parent / ".part-00000003.partial").write_bytes(b"half a pa")
    assert score(source, tmp_path / "out.jsonl").resumed == 14
    assert "40/40" in capsys.readouterr().err, "the bar counts both runs' rows"
    found = read(tmp_path / "out.jsonl")
    assert found.count({"as": "it was"}) == 1
    first = 7 * int(done[1].name.removeprefix("part-"))
    assert [r["id"] for r in found if "id" in r] == [
        i for i in range(40) if not first <= i < first + 7
    ]


@pytest.mark.parametrize(("where", "calls"), [("_line", 10), ("shutil.copyfileobj", 2)])
def test_what_a_killed_run_had_half_written_is_written_anew(
    score: Callable[..., ScoredCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    calls: int,
) -> None:
    """A part whose rows are being written, and OUT while the parts are joined."""
    source, target = write(tmp_path / "in.jsonl", rows(40)), tmp_path / "out.jsonl"
    whole, left = attrgetter(where)(corpus), [calls]

    def killed(*args: Any) -> Any:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        return whole(*args)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(f"rayrm.serving.corpus.{where}", killed)
        score(source, target)
    score(source, target)
    assert [r["id"] for r in read(target)] == [*range(40)]


def test_a_run_killed_while_it_is_noted_can_be_started_again(
    tiny_export: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", rows(4))
    parts = Parts(
        tmp_path / "out.jsonl", Corpus.survey([str(source)], "train", 2, to_parquet=False)
    )
    config = ServeConfig(export=str(tiny_export), dtype="float32")
    with pytest.raises(TypeError):
        parts.claim(object(), config)  # type: ignore[arg-type]
    parts.claim(parts.corpus.fingerprint, config)


def test_the_speed_is_that_of_the_rows_that_this_run_scored() -> None:
    assert str(ScoredCorpus(40, 14, 1, 2.0, "float32", ["notes.txt"])) == (
        "26 rows scored in float32 in 2.0 s (13.0 rows/s), 14 scored by an earlier run, 1 with "
        "errors, 1 files ignored"
    )


def test_parts_of_another_run_are_refused(
    score: Callable[..., ScoredCorpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "in.jsonl", rows(40)), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(2, patch)
        score(source, target)
    other = make_export(tmp_path, "qwen2")
    monkeypatch.setattr("rayrm.serving.corpus._scorers", pytest.fail)  # before any model loads
    with pytest.raises(DataError, match=r"holds another run \(rows in a part 7, now 8\)"):
        score(source, target, part_rows=8)
    with pytest.raises(DataError, match=r"another run \(export tiny@\w+, now tiny@\w+\)"):
        score(source, target, export=str(other))
    with pytest.raises(DataError, match="overlong error, now truncate"):
        score(source, target, overlong="truncate")
    with pytest.raises(DataError, match="max_length None, now 64"):
        score(source, target, max_length=64)
    with pytest.raises(DataError, match="dtype float32, now bfloat16"):
        score(source, target, dtype="bfloat16")
    with pytest.raises(DataError, match="deterministic False, now True"):
        score(source, target, deterministic=True)
    write(source, [*rows(39), {"id": 39, "prompt": "Another?", "response": "so."}])
    with pytest.raises(DataError, match=r"another run \(rows of IN "):
        score(source, target)


def rewarded(target: Path) -> list[int]:
    """Ids of the rows, all of which have a reward."""
    found = read(target)
    assert all(r["reward"] is not None for r in found)
    return [r["id"] for r in found]


@pytest.mark.parametrize("pattern", ["", "*", "**/*.json*"], ids=["directory", "glob", "deep"])
def test_what_is_written_into_in_is_no_part_of_it(
    score: Callable[..., ScoredCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
) -> None:
    """Also what an earlier run of it has left there, and one of another OUT."""
    write(tmp_path / "rows.jsonl", rows(5))
    for name, parts in (("a.jsonl", 0), ("other.jsonl", 1), ("a.jsonl", 1)):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(parts, patch)
            score(tmp_path / pattern, tmp_path / name, part_rows=1)
    (tmp_path / ".a.jsonl.partial").write_bytes(b"half an OU")
    scored = score(tmp_path / pattern, tmp_path / "a.jsonl", part_rows=1)
    assert rewarded(tmp_path / "a.jsonl") == [*range(5)]
    assert not (tmp_path / ".a.jsonl.partial").exists()
    assert (scored.rows, scored.resumed, scored.unrewarded) == (5, 1, 0)
    left = {str(p) for p in (tmp_path / "other.jsonl.parts").iterdir()} if not pattern else set()
    assert left <= set(scored.ignored_files), "of another run: passed by, and counted"
    assert not any("a.jsonl" in name for name in scored.ignored_files)


def test_files_that_come_while_others_are_scored_are_not_read(
    score: Callable[..., ScoredCorpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "b.jsonl", rows(5))
    survey = Corpus.survey

    def late(*args: Any, **more: Any) -> Corpus:
        found = survey(*args, **more)
        write(tmp_path / "a.jsonl", [{"x": 1}] * 5)
        return found

    monkeypatch.setattr(Corpus, "survey", late)
    score(tmp_path, tmp_path / "out.jsonl")
    assert rewarded(tmp_path / "out.jsonl") == [*range(5)]


@pytest.mark.parametrize("now", [rows(8)[:6], rows(9), rows(8)[::-1], rows(4)])
def test_rows_that_change_while_they_are_scored_are_refused(
    score: Callable[..., ScoredCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    now: Records,
) -> None:
    source = write(tmp_path / "in.jsonl", rows(8))
    survey = Corpus.survey

    def late(*args: Any, **more: Any) -> Corpus:
        found = survey(*args, **more)
        write(source, now)
        return found

    monkeypatch.setattr(Corpus, "survey", late)
    with pytest.raises(DataError, match=r"rows \d to \d of .*in.jsonl changed while"):
        score(source, tmp_path / "out.jsonl", part_rows=5)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_source_that_holds_only_what_is_written_is_refused(
    score: Callable[..., ScoredCorpus], tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts/rows.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no files in it but those of .*out\.jsonl"):
        score(tmp_path, tmp_path / "out.jsonl")


@pytest.mark.parametrize(("column", "status"), [("answer", 1), ("response", 0)])
def test_a_job_that_rewards_no_row_fails(
    score: Callable[..., ScoredCorpus],
    tiny_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    column: str,
    status: int,
) -> None:
    records = [{"prompt": "Name a fruit.", "answer": "Plum."}, {"prompt": "Name", column: "Pear."}]
    source, target = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    monkeypatch.setattr("sys.argv", ["score.py", *map(str, (tiny_export, source, target))])
    with pytest.raises(SystemExit, match="no row has a reward") if status else nullcontext():
        runpy.run_path("jobs/score.py", run_name="__main__")
    assert len(read(target)) == 2


@pytest.mark.parametrize(
    ("records", "target", "message"),
    [
        (rows(2), "out.csv", r"must end in \.jsonl or"),
        (rows(2), "there.jsonl", "exists"),
        ([], "out.jsonl", "no rows"),
        ([{**rows(1)[0], "reward": 1}], "out.jsonl", "row 1: has a column `reward` already"),
        (
            [{**rows(1)[0], "x": x} for x in (1, "a")],
            "out.parquet",
            "column `x` has no single type",
        ),
        (
            [{**r, "x": x} for r, x in zip(rows(9), [1] * 8 + ["a"], strict=True)],
            "out.parquet",
            "`?x",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_model_loads(
    score: Callable[..., ScoredCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: Records,
    target: str,
    message: str,
) -> None:
    monkeypatch.setattr("rayrm.serving.corpus._scorers", pytest.fail)
    (tmp_path / "there.jsonl").touch()
    source = write(tmp_path / "in.jsonl", records)
    with pytest.raises(DataError, match=message):
        score(source, tmp_path / target)
    assert not list(tmp_path.glob("*.parts"))


def test_rows_are_read_as_they_come_and_not_all_at_once(tmp_path: Path) -> None:
    data = b"".join(b'{"reward": %d}\n' % i for i in range(100_000))
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(data)[:-20])  # its end is missing
    source = str(tmp_path / "in.jsonl.gz")
    ((_, records),) = open_sources(source, "train", [])
    lines = iter(records)
    assert [next(lines), next(lines)] == [(1, {"reward": 0}), (2, {"reward": 1})]
    with pytest.raises(DataError, match="cannot be read"):
        list(lines)
    with pytest.raises(DataError, match="row 1: has a column `reward` already"):
        Corpus.survey([source], "train", 2, to_parquet=False)
    digests = [_digest([("", {"reward": i}), ("", {"reward": i + 1})]) for i in (0, 2)]
    digests += [b""] * 49_998
    found = Corpus([source], "train", 2, 100_000, digests, "", False, None).read([1, 49_999])
    assert next(found).records == [{"reward": 2}, {"reward": 3}]
    with pytest.raises(DataError, match="cannot be read"):
        next(found)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(Stopped), whole_file(tmp_path / "part") as file:
        file.write(b"half a pa")
        file.flush()
        assert not (tmp_path / "part").exists()
        raise Stopped
    assert not (tmp_path / "part").exists()


class Dying:
    """A replica that scores a row by its response's length, and dies of one."""

    def score(self, rows: list[Any]) -> list[int]:
        if any(row.response == "fatal" for row in rows):
            os._exit(1)
        return [len(row.response) for row in rows]


def dying(n: int) -> list[Any]:
    return [ray.remote(Dying).options(num_cpus=0).remote() for _ in range(n)]


def test_no_more_parts_are_read_than_replicas_hold(cluster: None) -> None:
    taken = 0

    def parts() -> Iterator[Part]:
        nonlocal taken
        for p, record in enumerate(rows(50)):
            taken += 1
            yield Part(p, [("", record)])

    done = 0
    for part, lengths in _score_parts(dying(2), parts()):
        done += 1
        assert lengths == [len(part.rows[0].response)]  # type: ignore[comparison-overlap]
        assert taken - done <= 2 * 2 + 1
    assert done == 50


def test_a_part_that_kills_its_replica_is_named(cluster: None) -> None:
    records = [{"prompt": "a", "response": r} for r in ("b", "fatal")]
    parts = (Part(p, [(f"in.jsonl, row {p + 1}", r)]) for p, r in enumerate(records))
    with pytest.raises(ServiceError, match=r"part 1, from in\.jsonl, row 2 on"):
        list(_score_parts(dying(1), parts))


def test_a_record_tells_its_prompt_and_responses() -> None:
    assert read_sampled({"response": "b", "finished": False}).finished == [False]
    sampled = read_sampled({"prompt": "a", "responses": ["b", 3], "messages": None})
    assert sampled.responses[0] == "b" and isinstance(sampled.responses[1], DataError)
    turn = {"role": "assistant", "content": "b"}
    for record, message in (
        ({"prompt": "a", "messages": [turn]}, "exactly one of"),
        ({"prompt": "a", "response": "b", "responses": ["b"]}, "exactly one of"),
        ({"messages": "b"}, "`messages` is text"),
        ({"messages": [{"role": "user"}]}, r"`messages\[0\].content` is missing"),
        ({"prompt": 3, "response": "b"}, "`prompt` is a number"),
        ({"prompt": "a", "response": "b", "finished": "no"}, "`finished` must be"),
        ({"prompt": "a", "responses": {"b": 1}}, "`responses` is an object"),
    ):
        with pytest.raises(DataError, match=message):
            read_sampled(record)
    prompt = [{"role": "user", "content": "a"}]
    for asked in (prompt, prompt[0], "a"):  # a response that repeats its prompt, which stands once
        sampled = read_sampled({"prompt": asked, "response": [*prompt, turn]})
        assert (sampled.prompt, sampled.responses) == (prompt, [[turn]])
        sampled = read_sampled({"prompt": asked, "responses": [turn, [turn], "b", 3]})
        assert sampled.responses[:3] == [[turn], [turn], "b"] and sampled.prompt == prompt
        assert isinstance(sampled.responses[3], DataError)
    with pytest.raises(DataError, match="`prompt` is text, but the messages of `response`"):
        read_sampled({"prompt": "b", "response": [*prompt, turn]})


def test_a_record_tells_its_tools_and_the_keys_that_mean_nothing() -> None:
    """What means nothing is counted; whatever scores the rows is given the rest."""
    tools = [{"name": "weather"}]
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]}
    question = {"role": "user", "content": "a", "id": 7, "name": ""}
    records = [
        ("row 1", {"messages": [question, turn], "tools": tools}),
        ("row 2", {"prompt": [question], "response": [turn], "tools": json.dumps(tools)}),
        ("row 3", {"prompt": "a", "response": "b", "tools": []}),
    ]
    part = Part(0, records)
    asked = [{"role": "user", "content": "a"}]
    assert part.rows == [(asked, [turn], True, tools)] * 2 + [("a", "b", True, None)]
    assert part.ignored == {"message.id"}
    scored = ScoredCorpus(3, 0, 0, 1.0, "float32", [], ignored_keys=sorted(part.ignored))
    assert str(scored) == (
        "3 rows scored in float32 in 1.0 s (3.0 rows/s), ignored keys: message.id"
    )
