"""Write files and directories atomically, and locate the user's cache.

Does not know about their contents.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

# Suffix of files that are being written.
PARTIAL = ".partial"


def cache_directory(*names: str) -> Path:
    """Return the directory $XDG_CACHE_HOME/rayrm/NAMES…, in ~/.cache by default; create it."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = root.joinpath("rayrm", *names)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once the block completes; until then `path` is unchanged."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    with partial.open("wb") as file:
        yield file
    os.replace(partial, path)


def remove_partials(of: Path) -> None:
    """Remove the partial files that killed writers of `of` left. Requires that none is writing."""
    for file in of.parent.glob(f".*{PARTIAL}"):
        if is_partial(file, of):
            file.unlink()


def is_partial(file: Path, of: Path) -> bool:
    """Return whether `file` is a partial file of `of`, as whole_file writes it."""
    name = rf"\.{re.escape(of.name)}(\.[0-9a-f]{{32}})?{re.escape(PARTIAL)}"
    return re.fullmatch(name, file.name) is not None and file.parent == of.parent


def move_directory(made: Path, target: Path) -> bool:
    """Move a finished directory to `target` by one rename; return False if `target` exists.

    Of several processes that make the same directory, the first wins, and none sees a partial one.
    If the result is False, `made` stays in its place.
    """
    try:
        made.rename(target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True


def keep_first(made: Path, target: Path) -> Path:
    """Move a finished directory to `target`, or delete it if `target` exists; return `target`."""
    if not move_directory(made, target):
        shutil.rmtree(made)
    return target
