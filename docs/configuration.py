"""configuration.md from the Pydantic models, so that it says what the code takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rayrm import ServeConfig, TrainConfig
from rayrm.config import sections

HEAD = """# Configuration

Every field of `TrainConfig` and `ServeConfig`, generated from the code. A YAML file has them
section by section; on a command line a field is `--section.field value`. A wrong key or value is
refused before any model loads, and the error names what is allowed.
"""

COLUMNS = "| field | type | default | |\n|---|---|---|---|"


def write_page(file: Path) -> None:
    """Write the page, if it changed."""
    parts = [HEAD]
    for title, config in (("TrainConfig", TrainConfig), ("ServeConfig", ServeConfig)):
        parts += [f"## {title}\n", table(config, ""), *section_tables(config)]
    page = "\n".join(parts)
    if not file.exists() or file.read_text() != page:
        file.write_text(page)


def section_tables(config: type[BaseModel]) -> Iterator[str]:
    for name, field in config.model_fields.items():
        kinds = sections(field.annotation)
        for kind in kinds:
            which = ""
            if len(kinds) > 1:
                (tag,) = get_args(kind.model_fields[str(field.discriminator)].annotation)
                which = f", `{field.discriminator}: {tag}`"
            intro = " ".join((kind.__doc__ or "").split())
            yield f"### `{name}:`{which}\n\n{intro}\n\n{table(kind, f'{name}.')}"


def table(section: type[BaseModel], prefix: str) -> str:
    cells = [
        (f"`{prefix}{name}`", kind_of(field.annotation), default_of(field), meaning(field))
        for name, field in section.model_fields.items()
        if not sections(field.annotation)
    ]
    return "\n".join([COLUMNS, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


def kind_of(kind: Any) -> str:
    """A type as a reader of YAML writes it."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is UnionType:
        return " or ".join(map(kind_of, get_args(kind)))
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    if kind is type(None):
        return "null"
    if kind in names:
        return names[kind]
    if get_origin(kind) in (list, tuple):
        return f"list of {kind_of(get_args(kind)[0])}s"
    if get_origin(kind) is dict:
        return "mapping"
    return getattr(kind, "__name__", str(kind))


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return f"`{'null' if default is None else default}`" if default != "" else '`""`'


def meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")
