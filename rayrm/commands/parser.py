"""One way to parse arguments and to end: --help with every override, an error in one line."""

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
    """A parser whose help ends in `more` and the config's fields, which are given as overrides."""
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
    """End the process with what went wrong, and no traceback, where a user can mend it."""
    try:
        yield
    except RayrmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
