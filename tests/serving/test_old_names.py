"""What was begun under a version's old name goes on where the weights are the same, and says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.experimental.internal_kv import _internal_kv_put

from rayrm.errors import DataError, ExportError
from rayrm.model.engine import RewardModel
from rayrm.model.export import Export, read_export
from rayrm.serving.config import ServeConfig
from rayrm.serving.corpus import Corpus, Parts
from rayrm.serving.loaded_models import Models
from rayrm.serving.record import BEFORE, Record, Served, delete_record, read_record
from tests.tiny import write_lines


@pytest.fixture
def app(
    cluster: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setattr(Models, "_follow", lambda _: None)  # it would outlive the test
    yield request.node.name
    delete_record(request.node.name)


def models_of(app: str, export: Path) -> Models:
    def load(config: ServeConfig) -> RewardModel:
        return RewardModel.load(config.export, "cpu", "float32")

    return Models(app, ServeConfig(export=str(export)), load, lambda *_: None)


@pytest.fixture(params=["formats 1 and 2", "format 3"])
def old_name(request: pytest.FixtureRequest) -> Callable[[Export], str]:
    """The name of an export by an earlier format of rayrm.json."""

    def name(export: Export) -> str:
        of_format_3 = export.model_copy(update={"config_sha256": ""}).version
        (of_format_2,) = export.old_versions - {of_format_3}
        return of_format_3 if request.param == "format 3" else of_format_2

    return name


def write_old_record(app: str, export: Path, version: str) -> None:
    """As rayrm wrote it when a version named weights and format alone."""
    config = ServeConfig(export=str(export), app=app)
    served = Served(export=str(export), version=version)
    record = Record(config=config, started=str(export), current=served, previous=served)
    values = record.model_dump_json(exclude={"format"}).encode()
    _internal_kv_put(app.encode(), values, overwrite=True, namespace=BEFORE)


def test_a_record_goes_on_under_the_new_name(
    app: str,
    tiny_export: Path,
    old_name: Callable[[Export], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, export = read_export(tiny_export)
    write_old_record(app, tiny_export, old_name(export))
    with caplog.at_level(logging.WARNING, "ray.serve"):
        models = models_of(app, tiny_export)
    assert models.current == export.version and export.version in models.held
    record = read_record(app)
    assert record and record.current.version == export.version
    assert record.previous and record.previous.version == export.version
    assert f"{old_name(export)} is called {export.version} from now on" in caplog.text


def test_a_record_of_other_weights_does_not(
    app: str, tiny_export: Path, other_export: Path, old_name: Callable[[Export], str]
) -> None:
    write_old_record(app, tiny_export, old_name(read_export(other_export)[1]))
    with pytest.raises(ExportError, match="deploy it again"):
        models_of(app, tiny_export)


def test_a_corpus_that_was_begun_goes_on(
    tiny_export: Path, other_export: Path, old_name: Callable[[Export], str], tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", '{"prompt": "p", "response": "r"}')
    corpus = Corpus.survey([str(source)], "train", 3, to_parquet=False)
    parts = Parts(tmp_path / "out.jsonl", corpus)
    config = ServeConfig(export=str(tiny_export), dtype="float32")
    parts.claim(corpus.fingerprint, config)
    note = parts.directory / "run.json"
    begun = json.loads(note.read_text())
    _, export = read_export(tiny_export)
    note.write_text(json.dumps(begun | {"export": old_name(export)}))
    with pytest.warns(UserWarning, match=f"begun by {old_name(export)}"):
        parts.claim(corpus.fingerprint, config)
    note.write_text(json.dumps(begun | {"export": old_name(read_export(other_export)[1])}))
    with pytest.raises(DataError, match="holds another run"):
        parts.claim(corpus.fingerprint, config)
