"""What a config names is found as it was deployed, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rayrm.errors import ExportError, ServiceError
from rayrm.model.export import read_export
from rayrm.serving.config import ServeConfig
from rayrm.serving.corpus import Scorer
from rayrm.serving.locate import load_served_template
from rayrm.serving.record import Served


@pytest.fixture
def changed(tiny_export: Path, tmp_path: Path) -> Path:
    """The export with another chat template, and so another version."""
    directory = Path(shutil.copytree(tiny_export, tmp_path / "changed"))
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text().replace("m['content']", "m['content'] | upper"))
    return directory


def test_rows_are_built_by_the_template_of_the_version_that_was_deployed(
    tiny_export: Path, changed: Path
) -> None:
    _, export = read_export(tiny_export)
    for version in (export.version, *export.old_versions, ""):
        served = Served(export=str(tiny_export), version=version)
        assert load_served_template(served, 64).spec.max_length == 64
    with pytest.raises(ServiceError, match=f"not {export.version}, which was deployed"):
        load_served_template(Served(export=str(changed), version=export.version), None)


def test_a_corpus_is_scored_by_the_version_that_its_run_began_with(
    tiny_export: Path, changed: Path
) -> None:
    _, export = read_export(tiny_export)
    Scorer(ServeConfig(export=str(tiny_export), dtype="float32"), export.version)
    with pytest.raises(ExportError, match=f"not {export.version}, which this run began with"):
        Scorer(ServeConfig(export=str(changed), dtype="float32"), export.version)
