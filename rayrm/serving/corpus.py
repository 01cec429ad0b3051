"""Score a corpus of prompts and responses over the whole cluster: add rewards to every row.

IN is read twice, once to survey it and once to score the missing parts; both times the files listed
at first, without OUT and its parts. Each scored part is written atomically to OUT.parts, and when
all exist they are joined to OUT. So a killed run resumes, and ends in the same bytes. Memory holds
the parts in flight, and all of a file that is one JSON array. Does not know about Serve
applications or training.
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
from rayrm.errors import ConfigError, DataError, ExportError, ServiceError
from rayrm.files import is_partial, remove_partials, whole_file
from rayrm.model.foreign import open_model
from rayrm.model.hardware import fast_dtype
from rayrm.rows import Rewards, Row
from rayrm.serving.config import ServeConfig
from rayrm.serving.locate import locate_export
from rayrm.serving.replica import load_replica

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# Columns that rows get; each holds lists if the corpus has lists of responses.
ADDED = {
    "reward": pa.float32(),
    "reward_error": pa.string(),
    "version": pa.string(),
    "truncated": pa.bool_(),
    "unfinished": pa.bool_(),
}

# Parts in flight per replica: the next one is queued while one is scored.
PARTS_PER_REPLICA = 2

# How often a dead replica is restarted, and its part scored again.
RETRIES = 3

Records = Sequence[tuple[str, Any]]
"""(file and row, for messages; the record, or the DataError in its place)."""


@dataclass(frozen=True)
class ScoredCorpus:
    """The outcome of scoring a corpus.

    rows: all rows. resumed: rows that an earlier run had scored. failed, unrewarded: rows of this
    run with an error, and without any reward. seconds: duration of scoring, with the start of
    replicas. dtype: of the computation. ignored_files: files of a directory or glob that were not
    read. ignored_keys: keys of messages in this run's rows that never reach the chat template, as
    `message.KEY`.
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
    """Score `source` and write its rows with rewards to `target`.

    source: files, globs, directories or hub names, as for training. Each row has prompt and
    response, prompt and responses (a list), or messages, and optionally tools. It keeps its columns
    and gets reward, reward_error, version, truncated and unfinished; a row that cannot be scored
    gets an error and no reward. target: a .jsonl, .jsonl.gz or .parquet file; like source, on disks
    of this process. config: how and where replicas score; their number is what fits into the
    cluster unless `replicas` is set. Calls ray.init() if Ray is not initialized.

    After a kill, the same call resumes. Raises DataError if target exists, if the parts next to it
    belong to another source, export or config, if source cannot be read, or if its rows do not fit
    into one Parquet file; ExportError; ServiceError if a part kills replicas.
    """
    if config.adapters:
        raise ConfigError("adapters: remove them, a corpus is scored by `export`'s reward only")
    target = local_path(target)
    if not target.name.endswith(SUFFIXES):
        raise DataError(f"{target}: must end in {' or '.join(SUFFIXES)}.")
    if target.exists():
        raise DataError(f"{target.resolve()} exists: move it, or write to another file.")
    config, served = locate_export(config)
    files, ignored = list_files(source, split, target)
    to_parquet = target.suffix == ".parquet"
    corpus = Corpus.survey(files, split, part_rows, to_parquet=to_parquet)
    parts = Parts(target, corpus)
    config = parts.claim(corpus.fingerprint, config)
    missing = [p for p in range(corpus.parts) if not parts.file(p).exists()]
    resumed = corpus.rows - sum(corpus.rows_of(p) for p in missing)
    failed = unrewarded = 0
    ignored_keys: set[str] = set()
    started = time.monotonic()
    with (
        _bar(corpus.rows, resumed) as bar,
        _scorers(config, served.version, len(missing)) as scorers,
    ):
        for part, rewards in _score_parts(scorers, corpus.read(missing)):
            columns = part.columns(rewards, corpus.many)
            parts.write(part, columns)
            failed += sum(any(row) for row in _each(columns["reward_error"]))
            unrewarded += sum(all(v is None for v in row) for row in _each(columns["reward"]))
            ignored_keys |= part.ignored
            bar.update(len(part.records))
    seconds = time.monotonic() - started
    parts.join()
    return ScoredCorpus(
        rows=corpus.rows,
        resumed=resumed,
        failed=failed,
        seconds=seconds,
        dtype=config.dtype,
        ignored_files=ignored,
        unrewarded=unrewarded,
        ignored_keys=sorted(ignored_keys),
    )


def list_files(source: str, split: str, target: Path) -> tuple[list[str], list[str]]:
    """Return the files of `source`, to be opened one by one, and the files that are ignored.

    Neither includes the target, its parts, or partial files of it.
    """
    output = target.resolve()
    parts = output.with_name(_parts_name(output))

    def is_input(name: str) -> bool:
        path = Path(name).resolve()
        in_parts = path == parts or parts in path.parents
        return path != output and not in_parts and not is_partial(path, output)

    ignored: list[str] = []
    names = [name for name, _ in open_sources(source, split, ignored)]
    # A hub dataset is no file on disk: it is opened by the name that was given.
    files = [name if Path(name).exists() else source for name in names if is_input(name)]
    if not files:
        raise DataError(f"{source}: no files in it but those of {target}.")
    return files, [name for name in ignored if is_input(name)]


@dataclass(frozen=True)
class Corpus:
    """The input files, and what a first reading found in them.

    part_rows: rows per part. rows: all rows. digests: sha256 of each part's rows, to detect changes
    at the second reading. fingerprint: sha256 of all rows. many: some row has a list of responses.
    schema: Parquet schema of the rows, None for JSON output.
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
        """Read all rows once. Raises DataError for what would otherwise fail after scoring."""
        digest = hashlib.sha256()
        digests: list[bytes] = []
        rows = 0
        many = False
        is_parquet = all(Path(file).suffix == ".parquet" for file in files)
        schema = _joined(
            [pq.read_schema(file) for file in files] if is_parquet else [pa.schema([])]
        )
        for batch in _batches(_read(files, split), part_rows):
            digests.append(_digest(batch, digest))
            for where, record in batch:
                if not isinstance(record, dict):
                    continue
                taken = sorted(record.keys() & ADDED.keys())
                if taken:
                    raise DataError(f"{where}: has a column `{taken[0]}` already; rename it.")
                many |= record.get("responses") is not None
            if to_parquet and not is_parquet:
                arrays = _arrays([record for _, record in batch], None)
                schema = _joined([schema, pa.table(arrays).schema])
            rows += len(batch)
        if not rows:
            raise DataError(f"{', '.join(files)}: no rows in it.")
        return cls(
            files=files,
            split=split,
            part_rows=part_rows,
            rows=rows,
            digests=digests,
            fingerprint=digest.hexdigest(),
            many=many,
            schema=schema if to_parquet else None,
        )

    @property
    def parts(self) -> int:
        """Return the number of parts."""
        return len(self.digests)

    def rows_of(self, p: int) -> int:
        """Return the number of rows in part p."""
        return min(self.part_rows, self.rows - p * self.part_rows)

    def read(self, wanted: Iterable[int]) -> Iterator[Part]:
        """Read the wanted parts, in order. Raises DataError if they changed since the survey."""
        wanted = set(wanted)
        last = max(wanted, default=-1)
        batches = _batches(_read(self.files, self.split), self.part_rows)
        for p in range(last + 1):
            batch = next(batches, [])
            if p not in wanted:
                continue
            if _digest(batch) != self.digests[p]:
                raise DataError(
                    f"rows {p * self.part_rows + 1} to {p * self.part_rows + self.rows_of(p)} of "
                    f"{', '.join(self.files)} changed while they were scored: do not change the "
                    "files, and start again."
                )
            yield Part(p, batch)


class Part:
    """A part of the corpus: its records, and the rows that the model scores for them.

    index: number of the part. where: file and row of its first record. cells: for every record a
    list with one entry per response, its index in `rows` or the error in its place. ignored: keys
    of messages that never reach the chat template.
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
        """Return the columns of ADDED: per record one value, or with `many` one list of values."""
        columns: dict[str, list[Any]] = {name: [] for name in ADDED}
        for cells in self.cells:
            added = [_added(cell, rewards) for cell in cells]
            for name, column in columns.items():
                values = [response[name] for response in added]
                column.append(values if many else values[0])
        return columns


def _added(cell: int | DataError, rewards: Rewards) -> dict[str, Any]:
    """Return the ADDED values of one response."""
    added: dict[str, Any] = dict.fromkeys(ADDED)
    if isinstance(cell, DataError):
        added["reward_error"] = _named(cell)
        return added
    error = rewards.errors[cell]
    if error is None:
        added["reward"] = float(rewards.values[cell])
    else:
        added["reward_error"] = _named(error)
    added["version"] = rewards.versions[cell]
    added["truncated"] = bool(rewards.truncated[cell])
    added["unfinished"] = bool(rewards.unfinished[cell])
    return added


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Parts:
    """The scored parts, as files in a directory next to the target."""

    def __init__(self, target: Path, corpus: Corpus) -> None:
        self.target = target
        self.corpus = corpus
        self.directory = target.with_name(_parts_name(target))

    def file(self, p: int) -> Path:
        return self.directory / f"part-{p:08d}"

    def claim(self, fingerprint: str, config: ServeConfig) -> ServeConfig:
        """Create the directory for this run, or check that it belongs to this run.

        Returns the config with the dtype that the run's first start decided. Raises DataError if
        the directory belongs to another run.
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
        if before.get("dtype") == "auto":  # written by an older rayrm, which used the export's
            before["dtype"] = export.dtype
        if config.dtype == "auto":
            run["dtype"] = before.get("dtype")
        if before.get("export") in export.old_versions:
            warnings.warn(
                f"{self.directory} was begun by {before['export']}, the version by which an older "
                f"rayrm names the weights of {export.version}: the run continues, and rows scored "
                "from now on have the new version",
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
        """Write a scored part: its records with the added columns."""
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
        """Join all parts in order into the target, then remove them."""
        files = [self.file(p) for p in range(self.corpus.parts)]
        remove_partials(self.target)
        with whole_file(self.target) as target:
            if self.corpus.schema is not None:
                with pq.ParquetWriter(target, pq.read_schema(files[0])) as writer:
                    for file in files:
                        writer.write_table(pq.read_table(file))
            else:
                for file in files:  # gzip files can be concatenated
                    with file.open("rb") as part:
                        shutil.copyfileobj(part, target)
        shutil.rmtree(self.directory)


class Scorer:
    """A Ray actor that scores parts with its copy of the model."""

    def __init__(self, config: ServeConfig, version: str) -> None:
        self.model = load_replica(config)
        if self.model.version != version:
            raise ExportError(
                f"{config.export} now holds {self.model.version}, not {version}, which this run "
                "began with: restore it, or write to another file"
            )

    def score(self, rows: list[Row]) -> Rewards:
        """Return the rewards of the rows."""
        encoded = self.model.encode(rows)
        return self.model.collect(encoded, self.model.score_groups(encoded.groups))


def _score_parts(scorers: Sequence[Any], parts: Iterator[Part]) -> Iterator[tuple[Part, Rewards]]:
    """Yield every part with its rewards as it finishes, scored by replicas that have started."""
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
            # A dying replica loses all of its parts, and any of them may have killed it.
            suspects = [part, *(p for p, at in running.values() if at is scorer)]
            names = [f"part {p.index}, from {p.where} on" for p in suspects]
            yield part, _get(done, ", or ".join(names))


def _get(result: Any, what: str) -> Any:
    """Return the result; raise a ServiceError about `what` if Ray raises."""
    try:
        return ray.get(result)
    except RayError as error:
        raise ServiceError(f"{what}: {error}") from error


@contextmanager
def _scorers(config: ServeConfig, version: str, parts: int) -> Iterator[list[Any]]:
    """Start actors for that many parts, and kill them when the block is left."""
    if not parts:
        yield []
        return
    replicas_set = "replicas" in config.model_fields_set
    _start_ray()
    count = config.replicas if replicas_set else max(1, _room(config))
    actor = ray.remote(Scorer).options(
        **_needs(config), max_restarts=RETRIES, max_task_retries=RETRIES
    )
    scorers: list[Any] = [actor.remote(config, version) for _ in range(min(count, parts))]
    try:
        yield scorers
    finally:
        for scorer in scorers:
            ray.kill(scorer)


def _decide_dtype(config: ServeConfig) -> str:
    """Return the dtype of the computation: the configured one, or the fast one on a replica."""
    if config.dtype != "auto":
        return config.dtype
    _start_ray()
    task = ray.remote(fast_dtype).options(**_needs(config))
    dtype: str = ray.get(task.remote("cuda" if config.gpus_per_replica else "cpu"))
    return dtype


def _start_ray() -> None:
    if not ray.is_initialized():
        ray.init()


def _needs(config: ServeConfig) -> dict[str, Any]:
    """Return the resources that Ray reserves for a replica, and the labels of its node."""
    return {
        "num_cpus": config.cpus_per_replica,
        "num_gpus": config.gpus_per_replica,
        "label_selector": config.labels,
    }


def _room(config: ServeConfig) -> int:
    """Return how many replicas fit onto the nodes with the config's labels."""
    needs = {"CPU": config.cpus_per_replica, "GPU": config.gpus_per_replica}
    return sum(
        min(int(node["Resources"].get(name, 0) // need) for name, need in needs.items() if need)
        for node in ray.nodes()
        if node["Alive"] and config.labels.items() <= node["Labels"].items()
    )


def _read(files: Sequence[str], split: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of all files: file and row for messages, and the record."""
    for file in files:
        for name, rows in open_sources(file, split, []):
            for row, record in rows:
                yield f"{name}, row {row}", record


def _digest(batch: Records, whole: hashlib._Hash | None = None) -> bytes:
    """Return the sha256 of the rows, and update `whole` with them."""
    lines = b"".join(json.dumps(row, default=str).encode() + b"\n" for _, row in batch)
    if whole:
        whole.update(lines)
    return hashlib.sha256(lines).digest()


def _each(column: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield each row's values, one per response, as a list even for a single response."""
    for values in column:
        yield values if isinstance(values, list) else [values]


def _batches(rows: Iterator[tuple[str, Any]], size: int) -> Iterator[Records]:
    while batch := list(islice(rows, size)):
        yield batch


def _arrays(records: Sequence[Any], schema: pa.Schema | None) -> dict[str, pa.Array]:
    """Return the columns as Parquet arrays; without a schema pyarrow infers their types."""
    records = [record if isinstance(record, dict) else {} for record in records]
    types: dict[str, Any] = dict.fromkeys(key for record in records for key in record)
    if schema is not None:
        types = dict(zip(schema.names, schema.types, strict=True))
    arrays = {}
    for name, type_ in types.items():
        try:
            arrays[name] = pa.array([record.get(name) for record in records], type_)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise DataError(
                f"column `{name}` has no single type in Parquet ({error}): write to .jsonl instead."
            ) from None
    return arrays


def _joined(schemas: Sequence[pa.Schema]) -> pa.Schema:
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()
    except pa.ArrowException as error:
        raise DataError(
            f"the rows have no single schema in Parquet ({error}): write to .jsonl instead."
        ) from None


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, default=str)
    # A lone surrogate, which JSON can hold and UTF-8 cannot, is written as its JSON escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _parts_name(target: Path) -> str:
    return f"{target.name}{PARTS}"


def _bar(rows: int, done: int) -> tqdm[Any]:
    # In a log every update is a line, so update less often.
    seconds = 1 if sys.stderr.isatty() else 15
    return tqdm(desc="scoring", unit="row", total=rows, initial=done, mininterval=seconds)
