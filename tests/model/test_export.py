"""What is exported is what is read, and anything else is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrm.errors import ExportError
from rayrm.model import export as exports
from rayrm.model.engine import RewardModel
from rayrm.model.export import (
    FORMAT_VERSION,
    RECORD,
    Export,
    hash_weights,
    publish,
    read_export,
    write_model_card,
)
from rayrm.model.foreign import open_template
from rayrm.rows import Row
from rayrm.text.template import TemplateSpec
from tests.makers import make_export


@pytest.fixture
def export(tiny_export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_export, tmp_path / "export"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def amend(export: Path, **values: Any) -> None:
    record = json.loads((export / RECORD).read_text())
    (export / RECORD).write_text(json.dumps(record | values))


def retrain(export: Path) -> None:
    """Other weights under an honest record."""
    weights = load_file(export / "model.safetensors")
    weights["score.weight"] += 1
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})
    amend(export, weights_sha256=hash_weights(export))


def test_a_record_reads_back_as_it_was_written(export: Path) -> None:
    directory, record = read_export(export)
    assert directory == export
    assert record.template.fingerprint and record.dtype == "float32"
    record.evaluation = {"accuracy": 0.9}
    record.reward_mean = 0.25
    record.write(export)
    assert read_export(str(export))[1] == record
    assert [p.name for p in export.glob(".*")] == []


def test_a_missing_export_is_named_with_what_was_looked_for(export: Path) -> None:
    with pytest.raises(ExportError, match=rf"{export / 'no'}.*{RECORD}"):
        read_export(export / "no")
    (export / RECORD).unlink()
    with pytest.raises(ExportError, match=rf"{export}.*{RECORD}"):
        read_export(export)
    with pytest.raises(ExportError, match=RECORD):
        read_export(f"file://{export}")


def test_a_newer_format_is_refused_whatever_else_it_holds(export: Path) -> None:
    amend(export, format_version=FORMAT_VERSION + 1, something_new=3)
    with pytest.raises(ExportError, match=f"version {FORMAT_VERSION + 1}.*newer rayrm"):
        read_export(export)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"format_version": "new"}',
        b'{"format_version": 1, "name": "x"}',
        b"\xff\xfe\x00 not text",
    ],
)
def test_a_damaged_record_is_refused(export: Path, content: bytes) -> None:
    (export / RECORD).write_bytes(content)
    with pytest.raises(ExportError, match="is damaged"):
        read_export(export)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_and_named(export: Path, name: str) -> None:
    torch.save({}, export / name)
    with pytest.raises(ExportError, match=f"pickled weights .{name}.*safetensors"):
        read_export(export)


def test_changed_weights_are_refused(export: Path) -> None:
    weights = export / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ExportError, match="not the ones"):
        RewardModel.load(export)
    weights.unlink()
    with pytest.raises(ExportError, match="not the ones"):
        read_export(export)


def test_a_shard_added_or_swapped_is_a_changed_weight(export: Path) -> None:
    before = hash_weights(export)
    shutil.copy(export / "model.safetensors", export / "model-2.safetensors")
    assert hash_weights(export) != before


def test_the_version_tells_weights_dtypes_and_templates_apart(export: Path) -> None:
    version = read_export(export)[1].version
    name, content = version.split("@")
    assert name == "tiny" and len(content) == 12
    record = json.loads((export / RECORD).read_text())
    changes: list[dict[str, Any]] = [
        {"weights_sha256": "0" * 64},
        {"dtype": "bfloat16"},
        *({"template": record["template"] | {k: v}} for k, v in (
            ("format", "text"), ("separator", " "), ("max_length", 77), ("fingerprint", "0" * 64)
        )),
    ]  # fmt: skip
    versions = {Export(**(record | change)).version for change in changes}
    assert len(versions) == len(changes) and version not in versions
    same: dict[str, Any] = {"reward_mean": 1.0, "evaluation": {"a": 1}, "history": [{"step": 1}]}
    assert Export(**(record | same)).version == version
    assert Export(**(record | {"name": "other"})).version == f"other@{content}"


# Publishing ---------------------------------------------------------------------------------------


def test_publishing_moves_the_whole_export(export: Path, tmp_path: Path) -> None:
    names = sorted(p.name for p in export.iterdir())
    (tmp_path / "runs").mkdir()
    publish(export, str(tmp_path / "runs" / "out"))
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["out"]
    assert sorted(p.name for p in (tmp_path / "runs" / "out").iterdir()) == names
    assert not export.exists()
    read_export(tmp_path / "runs" / "out")


def test_an_export_appears_under_its_name_only_when_whole(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "move", disk_full)
    with pytest.raises(OSError, match="disk full"):
        publish(export, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    read_export(export)


def test_publishing_the_same_export_twice_is_harmless(export: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(export, tmp_path / "other"))
    amend(other, provenance={"created": "later"})
    publish(export, str(tmp_path / "runs"))
    publish(other, str(tmp_path / "runs"))
    assert read_export(tmp_path / "runs")[1].provenance == {}
    assert not list(tmp_path.glob(".runs*"))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_publishing_over_another_export_is_refused_and_loses_neither(
    export: Path, tmp_path: Path, scheme: str
) -> None:
    target = tmp_path / "runs"
    publish(Path(shutil.copytree(export, tmp_path / "first")), str(target))
    theirs = read_export(target)[1].version
    retrain(export)
    ours = read_export(export)[1].version
    with pytest.raises(ExportError, match=str(target)) as caught:
        publish(export, f"{scheme}{target}")
    assert read_export(target)[1].version == theirs
    kept = [p.parent for p in tmp_path.rglob(RECORD) if str(p.parent) in str(caught.value)]
    assert ours in {read_export(p)[1].version for p in kept}, "the message says where it is"


def test_publishing_over_something_else_is_refused_and_loses_neither(
    export: Path, tmp_path: Path
) -> None:
    target = tmp_path / "runs"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=str(target)):
        publish(export, str(target))
    assert (target / "thesis.tex").read_text() == "years of work"
    assert len(list(tmp_path.rglob(RECORD))) == 1


def test_a_remote_export_is_published_fetched_and_scored(
    export: Path, tmp_path: Path, cache: Path
) -> None:
    expected = RewardModel.load(export, device="cpu", dtype="float32").score(["Hi"], ["x"]).values
    uri = f"file://{tmp_path}/bucket/runs/export"
    publish(export, uri)
    directory, record = read_export(uri)
    assert directory.is_relative_to(cache) and record.name == "tiny"
    model = RewardModel.load(uri, device="cpu", dtype="float32")
    assert model.version == record.version
    assert model.score(["Hi"], ["x"]).values == expected
    assert len(list((cache / "rayrm" / "exports").iterdir())) == 1, "fetched once"


def test_a_remote_export_that_changes_is_fetched_again(export: Path) -> None:
    first = read_export(f"file://{export}")[1].version
    retrain(export)
    second = read_export(f"file://{export}")[1].version
    assert first != second


def test_a_remote_export_whose_weights_are_not_recorded_is_refused(export: Path) -> None:
    amend(export, weights_sha256="0" * 64)
    with pytest.raises(ExportError, match="not the ones"):
        read_export(f"file://{export}")


def test_a_storage_nobody_knows_is_an_export_error() -> None:
    with pytest.raises(ExportError, match="nowhere://x/y"):
        read_export("nowhere://x/y")


# Model card ---------------------------------------------------------------------------------------


def test_the_model_card_says_what_was_measured(tmp_path: Path) -> None:
    record = Export(
        name="mine",
        dtype="bfloat16",
        template=TemplateSpec("chat", "\n", 512, "f" * 64),
        weights_sha256="0" * 64,
        reward_mean=0.5,
        reward_std=1.25,
        evaluation={"accuracy": 0.9126, "pairs": 500},
        rounding={"rows": 256, "mean_abs": 0.0123, "max_abs": 0.0567},
        provenance={"base_model": "b/c", "data": "9 pairs", "data_fingerprint": "d" * 64},
    )
    write_model_card(tmp_path, record)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model: b/c" in card
    for said in (record.version, "0.913 on 500 pairs", "mean 0.500, std 1.250", "9 pairs"):
        assert said in card
    assert "rounding to bfloat16 | 0.012 on average, 0.057 at most, on 256 held-out rows" in card
    record.evaluation = record.rounding = {}
    write_model_card(tmp_path, record)
    assert "held-out" not in (tmp_path / "README.md").read_text()


def test_a_bf16_export_is_about_half_the_size(tmp_path: Path) -> None:
    sizes = [
        (make_export(tmp_path / dtype, dtype=dtype) / "model.safetensors").stat().st_size
        for dtype in ("bfloat16", "float32")
    ]
    assert 0.45 < sizes[0] / sizes[1] < 0.6


def test_weights_are_hashed_once_while_they_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "SETTLED_S", -1.0)
    weights, hashed = tmp_path / "model.safetensors", list[str]()
    digest = hashlib.file_digest

    def counted(file: Any, kind: Any) -> Any:
        hashed.append(file.name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    weights.write_bytes(b"first")
    first = hash_weights(tmp_path)
    assert hash_weights(tmp_path) == first and len(hashed) == 1
    weights.write_bytes(b"other")
    assert hash_weights(tmp_path) != first and len(hashed) == 2
    weights.write_bytes(b"first")
    assert hash_weights(tmp_path) == first and len(hashed) == 3


def test_weights_that_were_just_written_are_not_remembered(tmp_path: Path, cache: Path) -> None:
    """Within a clock's tick another write leaves the times of a file as they are."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    hash_weights(tmp_path)
    assert not any((cache / "rayrm/hashes").iterdir())


def test_how_rows_are_built_is_read_without_the_weights(tiny_export: Path, tmp_path: Path) -> None:
    (whole, _), bare = open_template(tiny_export), shutil.copytree(tiny_export, tmp_path / "bare")
    for file in bare.glob("*.safetensors"):
        file.unlink()
    rows = [Row("Name a fruit.", "Plum.")]
    without, export = open_template(bare)
    assert export == read_export(tiny_export)[1]
    for of, found in zip(whole.encode(rows), without.encode(rows), strict=True):
        assert isinstance(of, np.ndarray) and isinstance(found, np.ndarray)
        assert np.array_equal(of, found)
    assert open_template(bare, 16)[0].spec.max_length == 16
