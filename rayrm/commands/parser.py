"""Parse the commands' arguments: --help lists every override; errors exit with one line.

Does not know about the commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel

from rayrm.config import describe
from rayrm.errors import RayrmError


def make_parser(
    prog: str | None, description: str, config: type[BaseModel] | None = None, more: str = ""
) -> argparse.ArgumentParser:
    """Return a parser whose help ends with `more` and the fields of `config`, as overrides."""
    fields = f"overrides (default)  meaning:\n{describe(config)}" if config else ""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="\n\n".join(part for part in (more, fields) if part),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Exit with a one-line message instead of a traceback on a RayrmError."""
    try:
        yield
    except RayrmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
