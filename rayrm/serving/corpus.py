"""A corpus of prompts and responses → the same corpus with rewards, over the whole cluster.

IN is read twice: once for what is in it, once to score the parts that are missing; both times the
files that were there at first, without OUT and its parts. A part that is scored lies whole in
OUT.parts, and when all are there they are joined to OUT. So a run that was killed goes on where it
was, and ends in the same bytes. Memory holds the parts in flight, and all of a file that is one
JSON array. Knows nothing of Serve's applications, nor of training.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayError
from tqdm.auto import tqdm

from rayrm.config import local_path
from rayrm.data.records import read_sampled
from rayrm.data.sources import PARTS, RUN, open_sources
from rayrm.errors import ConfigError, DataError, ServiceError
from rayrm.files import is_partial, remove_partials, whole_file
from rayrm.model.foreign import open_model
from rayrm.model.hardware import fast_dtype
from rayrm.rows import Rewards, Row
from rayrm.serving.config import ServeConfig
from rayrm.serving.locate import locate_export
from rayrm.serving.replica import load_replica

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# What a row gets; where the corpus has lists of responses, lists of it.
ADDED = {
    "reward": pa.float32(),
    "reward_error": pa.string(),
    "version": pa.string(),
    "truncated": pa.bool_(),
    "unfinished": pa.bool_(),
}

# A replica has a part to go on with when it has finished one.
PARTS_PER_REPLICA = 2

# How often a replica is started again, and its part scored again, after it died.
RETRIES = 3

Records = Sequence[tuple[str, Any]]
"""(file and row, for messages to people; the record, or the DataError that stands in its place)."""


@dataclass(frozen=True)
class ScoredCorpus:
    """What became of a corpus.

    resumed: rows that an earlier run had scored. failed: rows with an error, unrewarded: without
    any reward, among those that this run scored in `seconds`, the start of its replicas included.
    dtype: what rewards were computed in. ignored_files: found in a directory or by a glob, but not
    read. ignored_keys: of messages in what this run scored, as `message.KEY`; they never reach the
    chat template.
    """

    rows: int
    resumed: int
    failed: int
    seconds: float
    dtype: str
    ignored_files: list[str]
    unrewarded: int = 0
    ignored_keys: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        scored = self.rows - self.resumed
        speed = f" in {self.seconds:.1f} s ({scored / self.seconds:.1f} rows/s)" if scored else ""
        counts = {
            "scored by an earlier run": self.resumed,
            "with errors": self.failed,
            "files ignored": len(self.ignored_files),
        }
        named = [f"{count} {name}" for name, count in counts.items() if count]
        if self.ignored_keys:
            named.append(f"ignored keys: {' '.join(self.ignored_keys)}")
        return ", ".join([f"{scored} rows scored in {self.dtype}{speed}", *named])


def score_corpus(
    config: ServeConfig,
    source: str,
    target: str | Path,
    *,
    split: str = "train",
    part_rows: int = 1024,
) -> ScoredCorpus:
    """Score source (files, globs, directories, hub names, as training takes them) into target.

    A row has prompt and response, prompt and responses (a list), or messages, and perhaps tools. It
    keeps its columns and gets reward, reward_error, version, truncated and unfinished; one that
    cannot be scored has no reward but its error. target ends in .jsonl, .jsonl.gz or .parquet and
    lies, like source, on this process's disks. config says how replicas score and where they run:
    as many as the cluster has room for unless it names `replicas`. Connects as ray.init() does if
    nobody has.

    The same call again goes on after a kill. Raises DataError where target exists, where the parts
    beside it are of another source, export or config, where source cannot be read, and where its
    rows do not fit into one Parquet file; ExportError; ServiceError where a part kills replicas.
    """
    if config.adapters:
        raise ConfigError("adapters: a corpus is scored by one reward, that of `export`")
    target = local_path(target)
    if not target.name.endswith(SUFFIXES):
        raise DataError(f"{target}: must end in {' or '.join(SUFFIXES)}.")
    if target.exists():
        raise DataError(f"{target.resolve()} exists: move it away, or write to another file.")
    config, _ = locate_export(config)
    files, ignored = list_files(source, split, target)
    to_parquet = target.suffix == ".parquet"
    corpus = Corpus.survey(files, split, part_rows, to_parquet=to_parquet)
    parts = Parts(target, corpus)
    config = parts.claim(corpus.fingerprint, config)
    missing = [p for p in range(corpus.parts) if not parts.file(p).exists()]
    resumed = corpus.rows - sum(corpus.rows_of(p) for p in missing)
    failed, unrewarded, keys, began = 0, 0, set[str](), time.monotonic()
    with _bar(corpus.rows, resumed) as bar, _scorers(config, len(missing)) as scorers:
        for part, rewards in _score_parts(scorers, corpus.read(missing)):
            columns = part.columns(rewards, corpus.many)
            parts.write(part, columns)
            failed += sum(map(any, _each(columns["reward_error"])))
            unrewarded += sum(all(v is None for v in row) for row in _each(columns["reward"]))
            keys |= part.ignored
            bar.update(len(part.records))
    seconds = time.monotonic() - began
    parts.join()
    return ScoredCorpus(
        corpus.rows,
        resumed,
        failed,
        seconds,
        config.dtype,
        ignored,
        unrewarded,
        sorted(keys),
    )


def list_files(source: str, split: str, target: Path) -> tuple[list[str], list[str]]:
    """What source names, to be opened one by one, and the files that are passed by.

    The target, and what lies beside it on the way there, are no part of either.
    """
    own = target.resolve()
    beside = own.with_name(_parts_name(own))

    def foreign(name: str) -> bool:
        path = Path(name).resolve()
        return path != own and beside not in (path, *path.parents) and not is_partial(path, own)

    ignored = list[str]()
    names = [name for name, _ in open_sources(source, split, ignored)]
    # A hub dataset is opened by what was given for it.
    files = [name if Path(name).exists() else source for name in names if foreign(name)]
    if not files:
        raise DataError(f"{source}: no files in it but those of {target}.")
    return files, [name for name in ignored if foreign(name)]


@dataclass(frozen=True)
class Corpus:
    """Where the rows are, and what a first reading found in them.

    digests: of the rows of each part, to know them by when they are read again. many: some row has
    a list of responses. fingerprint: sha256 of the rows. schema: of the rows in Parquet, None where
    they are to be JSON.
    """

    files: list[str]
    split: str
    part_rows: int
    rows: int
    digests: list[bytes]
    fingerprint: str
    many: bool
    schema: pa.Schema | None

    @classmethod
    def survey(cls, files: list[str], split: str, part_rows: int, *, to_parquet: bool) -> Corpus:
        """Read all rows once; DataError for what would be found out too late."""
        digest, digests, rows, many = hashlib.sha256(), list[bytes](), 0, False
        is_parquet = all(Path(file).suffix == ".parquet" for file in files)
        schema = _joined(
            [pq.read_schema(file) for file in files] if is_parquet else [pa.schema([])]
        )
        for batch in _batches(_read(files, split), part_rows):
            digests.append(_digest(batch, digest))
            for where, record in batch:
                if not isinstance(record, dict):
                    continue
                if taken := sorted(record.keys() & ADDED.keys()):
                    raise DataError(f"{where}: has a column `{taken[0]}` already; rename it.")
                many |= record.get("responses") is not None
            if to_parquet and not is_parquet:
                arrays = _arrays([record for _, record in batch], None)
                schema = _joined([schema, pa.table(arrays).schema])
            rows += len(batch)
        if not rows:
            raise DataError(f"{', '.join(files)}: no rows in it.")
        found = digest.hexdigest()
        return cls(
            files, split, part_rows, rows, digests, found, many, schema if to_parquet else None
        )

    @property
    def parts(self) -> int:
        return len(self.digests)

    def rows_of(self, p: int) -> int:
        return min(self.part_rows, self.rows - p * self.part_rows)

    def read(self, wanted: Iterable[int]) -> Iterator[Part]:
        """The wanted parts, in order. DataError where they are not what the first reading found."""
        last = max(wanted := set(wanted), default=-1)
        batches = _batches(_read(self.files, self.split), self.part_rows)
        for p in range(last + 1):
            batch = next(batches, [])
            if p not in wanted:
                continue
            if _digest(batch) != self.digests[p]:
                raise DataError(
                    f"rows {p * self.part_rows + 1} to {p * self.part_rows + self.rows_of(p)} of "
                    f"{', '.join(self.files)} changed while they were scored: leave the files "
                    "alone, and start again."
                )
            yield Part(p, batch)


class Part:
    """Some rows of the corpus, and the rows of the model that they are.

    cells: for every record its responses, each a place in rows, or the error in its stead. ignored:
    keys of messages that mean nothing here.
    """

    def __init__(self, index: int, records: Records) -> None:
        self.index = index
        self.where, _ = records[0]
        self.records = [record if isinstance(record, dict) else {} for _, record in records]
        self.rows: list[Row] = []
        self.ignored: set[str] = set()
        self.cells = [list(self._cells(where, record)) for where, record in records]

    def _cells(self, where: str, record: Any) -> Iterator[int | DataError]:
        try:
            sampled = read_sampled(record)
        except DataError as error:
            responses = record.get("responses") if isinstance(record, dict) else None
            count = len(responses) if isinstance(responses, list) else 1
            yield from [DataError(f"{where}: {error}")] * max(1, count)
            return
        self.ignored |= sampled.ignored
        for response, finished in zip(sampled.responses, sampled.finished, strict=True):
            if isinstance(response, DataError):
                yield DataError(f"{where}: {response}")
            else:
                self.rows.append(Row(sampled.prompt, response, finished, sampled.tools))
                yield len(self.rows) - 1

    def columns(self, rewards: Rewards, many: bool) -> dict[str, list[Any]]:
        """The columns of ADDED, for every record."""
        columns: dict[str, list[Any]] = {name: [] for name in ADDED}
        for cells in self.cells:
            values = [_added(cell, rewards) for cell in cells]
            for i, name in enumerate(ADDED):
                column = [value[i] for value in values]
                columns[name].append(column if many else column[0])
        return columns


def _added(cell: int | DataError, rewards: Rewards) -> tuple[Any, ...]:
    """reward, reward_error, version, truncated, unfinished of one response."""
    if isinstance(cell, DataError):
        return None, _told(cell), None, None, None
    error = rewards.errors[cell]
    return (
        float(rewards.values[cell]) if error is None else None,
        None if error is None else _told(error),
        rewards.versions[cell],
        bool(rewards.truncated[cell]),
        bool(rewards.unfinished[cell]),
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Parts:
    """The parts that are scored, as files in a directory beside the target."""

    def __init__(self, target: Path, corpus: Corpus) -> None:
        self.target = target
        self.corpus = corpus
        self.directory = target.with_name(_parts_name(target))

    def file(self, p: int) -> Path:
        return self.directory / f"part-{p:08d}"

    def claim(self, fingerprint: str, config: ServeConfig) -> ServeConfig:
        """Make the directory this run's, or DataError where it is another's.

        Returns the config with what the run computes in, which its first start has decided.
        """
        _, export = open_model(config.export)
        run = {
            "rows of IN": fingerprint,
            "rows in a part": self.corpus.part_rows,
            "export": export.version,
            "dtype": config.dtype,
            "max_length": config.max_length,
            "overlong": config.overlong,
            "deterministic": config.deterministic,
        }
        record = self.directory / RUN
        if not record.exists():
            run["dtype"] = _decide_dtype(config)
            self.directory.mkdir(parents=True, exist_ok=True)
            with whole_file(record) as file:
                file.write(json.dumps(run, indent=2).encode())
            return config.model_copy(update={"dtype": run["dtype"]})
        before = json.loads(record.read_bytes())
        if before.get("dtype") == "auto":  # an older version's, which computed as exported
            before["dtype"] = export.dtype
        if config.dtype == "auto":
            run["dtype"] = before.get("dtype")
        if before.get("export") in export.old_versions:
            warnings.warn(
                f"{self.directory} was begun by {before['export']}, which is the version that "
                f"earlier rayrms gave the weights of {export.version}: it goes on, and rows that "
                "are scored from now on have the new name",
                stacklevel=3,
            )
            before["export"] = export.version
        differences = [
            f"{k} {before.get(k)}, now {v}" for k, v in run.items() if before.get(k) != v
        ]
        if differences:
            raise DataError(
                f"{self.directory.resolve()} holds another run ({'; '.join(differences)}): finish "
                "that one, remove the directory to start over, or write to another file."
            )
        return config.model_copy(update={"dtype": run["dtype"]})

    def write(self, part: Part, columns: dict[str, list[Any]]) -> None:
        """Write a part that is scored, with the columns that its rows got."""
        with whole_file(self.file(part.index)) as file:
            if self.corpus.schema is not None:
                arrays = _arrays(part.records, self.corpus.schema)
                for name, kind in ADDED.items():
                    kind = pa.list_(kind) if self.corpus.many else kind
                    arrays[name] = pa.array(columns[name], kind)
                pq.write_table(pa.table(arrays), file)
            else:
                data = b"".join(
                    _line(record | {name: column[i] for name, column in columns.items()})
                    for i, record in enumerate(part.records)
                )
                file.write(gzip.compress(data, mtime=0) if self.target.suffix == ".gz" else data)

    def join(self) -> None:
        """All parts, in order, as the target; then they are removed."""
        files = [self.file(p) for p in range(self.corpus.parts)]
        remove_partials(self.target)
        with whole_file(self.target) as target:
            if self.corpus.schema is not None:
                with pq.ParquetWriter(target, pq.read_schema(files[0])) as writer:
                    for file in files:
                        writer.write_table(pq.read_table(file))
            else:
                for file in files:  # gzip's members may stand one after the other
                    with file.open("rb") as part:
                        shutil.copyfileobj(part, target)
        shutil.rmtree(self.directory)


class Scorer:
    """A copy of the model, which scores part after part. A Ray actor."""

    def __init__(self, config: ServeConfig) -> None:
        self.model = load_replica(config)

    def score(self, rows: list[Row]) -> Rewards:
        encoded = self.model.encode(rows)
        return self.model.collect(encoded, self.model.score_groups(encoded.groups))


def _score_parts(scorers: Sequence[Any], parts: Iterator[Part]) -> Iterator[tuple[Part, Rewards]]:
    """Every part with its rewards, as they come, by the replicas that have started."""
    starting = {scorer.__ray_ready__.remote(): scorer for scorer in scorers}
    free = deque[Any]()
    running: dict[Any, tuple[Part, Any]] = {}
    waiting = next(parts, None)
    while waiting is not None or running:
        if waiting is not None and free:
            scorer = free.popleft()
            running[scorer.score.remote(waiting.rows)] = waiting, scorer
            waiting = next(parts, None)
            continue
        (done,), _ = ray.wait([*running, *starting], num_returns=1)
        if done in starting:
            free.extend([starting.pop(done)] * PARTS_PER_REPLICA)
            _get(done, "a replica did not start")
        else:
            part, scorer = running.pop(done)
            free.append(scorer)
            # A replica that dies takes all of its parts with it, whichever of them killed it.
            suspects = [part, *(p for p, at in running.values() if at is scorer)]
            names = [f"part {p.index}, from {p.where} on" for p in suspects]
            yield part, _get(done, ", or ".join(names))


def _get(result: Any, what: str) -> Any:
    try:
        return ray.get(result)
    except RayError as error:
        raise ServiceError(f"{what}: {error}") from error


@contextmanager
def _scorers(config: ServeConfig, parts: int) -> Iterator[list[Any]]:
    """Actors for that many parts, until the block is left."""
    if not parts:
        yield []
        return
    named = "replicas" in config.model_fields_set
    _start_ray()
    count = config.replicas if named else max(1, _room(config))
    actor = ray.remote(Scorer).options(
        **_needs(config), max_restarts=RETRIES, max_task_retries=RETRIES
    )
    scorers: list[Any] = [actor.remote(config) for _ in range(min(count, parts))]
    try:
        yield scorers
    finally:
        for scorer in scorers:
            ray.kill(scorer)


def _decide_dtype(config: ServeConfig) -> str:
    """What the corpus is scored in: by name, or what the replicas' machines are fast in."""
    if config.dtype != "auto":
        return config.dtype
    _start_ray()
    asked = ray.remote(fast_dtype).options(**_needs(config))
    decided: str = ray.get(asked.remote("cuda" if config.gpus_per_replica else "cpu"))
    return decided


def _start_ray() -> None:
    if not ray.is_initialized():
        ray.init()


def _needs(config: ServeConfig) -> dict[str, Any]:
    """What Ray reserves for a replica, and where."""
    return {
        "num_cpus": config.cpus_per_replica,
        "num_gpus": config.gpus_per_replica,
        "label_selector": config.labels,
    }


def _room(config: ServeConfig) -> int:
    """How many replicas the nodes with the config's labels hold."""
    needs = {"CPU": config.cpus_per_replica, "GPU": config.gpus_per_replica}
    return sum(
        min(int(node["Resources"].get(name, 0) // need) for name, need in needs.items() if need)
        for node in ray.nodes()
        if node["Alive"] and config.labels.items() <= node["Labels"].items()
    )


def _read(files: Sequence[str], split: str) -> Iterator[tuple[str, Any]]:
    for file in files:
        for name, rows in open_sources(file, split, []):
            for row, record in rows:
                yield f"{name}, row {row}", record


def _digest(batch: Records, whole: hashlib._Hash | None = None) -> bytes:
    """Of the rows; whole goes on with them."""
    lines = b"".join(json.dumps(row, default=str).encode() + b"\n" for _, row in batch)
    if whole:
        whole.update(lines)
    return hashlib.sha256(lines).digest()


def _each(column: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The responses' values of each row, also where it has but one."""
    for values in column:
        yield values if isinstance(values, list) else [values]


def _batches(rows: Iterator[tuple[str, Any]], size: int) -> Iterator[Records]:
    while batch := list(islice(rows, size)):
        yield batch


def _arrays(records: Sequence[Any], schema: pa.Schema | None) -> dict[str, pa.Array]:
    """Columns as Parquet has them, of the types that fit where no schema tells them."""
    records = [record if isinstance(record, dict) else {} for record in records]
    names = dict.fromkeys(key for record in records for key in record)
    kinds = dict(zip(schema.names, schema.types, strict=True)) if schema is not None else names
    arrays = {}
    for name, kind in kinds.items():
        try:
            arrays[name] = pa.array([record.get(name) for record in records], kind)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise DataError(
                f"column `{name}` has no one type in Parquet ({error}): write to .jsonl instead."
            ) from None
    return arrays


def _joined(schemas: Sequence[pa.Schema]) -> pa.Schema:
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()
    except pa.ArrowException as error:
        raise DataError(
            f"the rows have no one schema in Parquet ({error}): write to .jsonl instead."
        ) from None


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, default=str)
    # Half an emoji, which JSON can hold and utf-8 cannot, gets its JSON escape back.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _parts_name(target: Path) -> str:
    return f"{target.name}{PARTS}"


def _bar(rows: int, done: int) -> tqdm[Any]:
    # In a log a bar is a line each time, so it moves less often there.
    seconds = 1 if sys.stderr.isatty() else 15
    return tqdm(desc="scoring", unit="row", total=rows, initial=done, mininterval=seconds)
