"""Files and directories that several write at once are there whole, or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayrm.files import (
    cache_directory,
    is_partial,
    keep_first,
    move_directory,
    remove_partials,
    whole_file,
)


def test_threads_that_write_one_file_leave_one_of_them_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    contents = [bytes([65 + n]) * 100_000 for n in range(8)]

    def write(content: bytes) -> None:
        for _ in range(20):
            with whole_file(file) as partial:
                partial.write(content[:50_000])
                partial.write(content[50_000:])
            assert file.read_bytes() in contents

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_leaves_is_known_and_removed(tmp_path: Path) -> None:
    file, other = tmp_path / "out.jsonl", tmp_path / "out.jsonl.gz"
    for of in (file, other):
        with pytest.raises(KeyboardInterrupt), whole_file(of) as partial:
            partial.write(b"half")
            raise KeyboardInterrupt
    assert not file.exists() and not other.exists()
    for of in (file, other):
        assert sum(is_partial(path, of) for path in tmp_path.iterdir()) == 1
    remove_partials(other)
    assert [is_partial(path, file) for path in tmp_path.iterdir()] == [True]


def test_of_two_that_make_a_directory_the_first_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert move_directory(tmp_path / "first", target)
    assert not move_directory(tmp_path / "second", target)
    assert keep_first(tmp_path / "second", target) == target
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory("a", "b") == tmp_path / "rayrm" / "a" / "b"
    assert (tmp_path / "rayrm" / "a" / "b").is_dir()
