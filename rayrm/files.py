"""Files that are there whole or not at all, and the user's cache of them.

Knows nothing of what they hold.
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

# Behind the name of a file that is being written.
PARTIAL = ".partial"


def cache_directory(*names: str) -> Path:
    """A directory in the user's cache, made if it is not there: $XDG_CACHE_HOME/rayrm/NAMES…"""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = root.joinpath("rayrm", *names)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is at its path once the block is left, or not at all; replaces what is there."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    with partial.open("wb") as file:
        yield file
    os.replace(partial, path)


def remove_partials(of: Path) -> None:
    """Remove what killed writers of that file have left; nobody may be writing it."""
    for file in of.parent.glob(f".*{PARTIAL}"):
        if is_partial(file, of):
            file.unlink()


def is_partial(file: Path, of: Path) -> bool:
    """Whether whole_file left or is writing that file on the way to another."""
    own = re.fullmatch(rf"\.{re.escape(of.name)}(\.[0-9a-f]{{32}})?{re.escape(PARTIAL)}", file.name)
    return own is not None and file.parent == of.parent


def move_directory(made: Path, target: Path) -> bool:
    """Move a finished directory to its place by one rename; False where another is there.

    Of several processes that make the same, the first wins, and nobody sees half of it. What was
    made stays where it is if it did not.
    """
    try:
        made.rename(target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True


def keep_first(made: Path, target: Path) -> Path:
    """move_directory, where whatever is there is as good: what was made is removed then."""
    if not move_directory(made, target):
        shutil.rmtree(made)
    return target
