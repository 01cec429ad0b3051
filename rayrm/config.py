"""Read configurations, Pydantic sections two levels deep, from YAML and dotted overrides.

A wrong key or value raises a ConfigError that names the key, the value and what is allowed, before
any model loads. Imports neither torch nor Ray, so that --help is fast. Does not know which sections
training and serving have.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
)
from pydantic.fields import FieldInfo

from rayrm.errors import ConfigError

# Name of the own reward of a model or application, as opposed to the rewards of its adapters.
OWN = "default"


def at_home(path: str) -> str:
    """Expand a leading ~ to this user's home; return other paths, URIs and hub names unchanged."""
    return os.path.expanduser(path)


def local_path(path: str | Path) -> Path:
    """Return the local path that a user gave, with a leading ~ expanded."""
    return Path(at_home(str(path)))


Names = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
Location = Annotated[str, AfterValidator(at_home)]
Locations = Annotated[Names, AfterValidator(lambda paths: [at_home(path) for path in paths])]
NamedLocations = Annotated[
    dict[str, str], AfterValidator(lambda paths: {k: at_home(path) for k, path in paths.items()})
]


class Section(BaseModel):
    """A group of fields; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Config(Section):
    """A whole configuration. Raises a ConfigError that lists all wrong keys and values."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, then apply overrides ["--section.field", "value", …].

        A value is parsed as YAML, except that a text field takes an unquoted value literally.
        Raises ConfigError if the file is missing or any key or value is wrong.
        """
        return cls(**override(cls, read_yaml(path), overrides))


def describe(section: type[BaseModel], prefix: str = "--") -> str:
    """Return the help text: flag, default and meaning of each field, one per line."""
    lines = []
    for name, field in section.model_fields.items():
        kinds = sections(field.annotation)
        if len(kinds) > 1:
            lines += _describe_kinds(kinds, str(field.discriminator), f"{prefix}{name}.")
        elif kinds:
            lines.append(describe(kinds[0], f"{prefix}{name}."))
        else:
            lines.append(_describe_field(f"{prefix}{name}", field))
    return "\n".join(lines)


def _describe_kinds(kinds: Sequence[type[BaseModel]], tag: str, prefix: str) -> list[str]:
    """Describe each field of a section of several kinds once; the first kind is the default."""
    names = [get_args(kind.model_fields[tag].annotation)[0] for kind in kinds]
    docs = [" ".join((kind.__doc__ or "").split()).rstrip(".") for kind in kinds]
    meanings = "; ".join(f"{name}: {doc}" for name, doc in zip(names, docs, strict=True))
    lines = {tag: f"  {prefix}{tag} ({names[0]!r})  {meanings}."}
    for kind, name in zip(kinds, names, strict=True):
        for key, field in kind.model_fields.items():
            shared = all(key in other.model_fields for other in kinds)
            only = "" if shared else f" Only for {name}."
            lines.setdefault(key, _describe_field(f"{prefix}{key}", field) + only)
    return list(lines.values())


def _describe_field(flag: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else repr(field.get_default())
    meaning = " ".join((field.description or "").split())
    return f"  {flag} ({default})  {meaning}".rstrip()


def sections(kind: Any) -> list[type[BaseModel]]:
    """Return the section types that a field's type allows: none, one, or several (a union)."""
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    return [one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises ConfigError if there is none."""
    path = local_path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"config file not found: {path.resolve()}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(values).__name__}")
    return values


def override(
    model: type[BaseModel], values: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Apply overrides to `values` in place, parsed by the model's field types; return `values`.

    Raises ConfigError if they are not pairs of --section.field and value.
    """
    pairs = [p for word in overrides for p in (word.split("=", 1) if word[:2] == "--" else [word])]
    if len(pairs) % 2:
        raise ConfigError(f"override {pairs[-1]!r} has no value: write --section.field value")
    for flag, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not flag.startswith("--"):
            raise ConfigError(f"override {flag!r} must be --section.field, followed by its value")
        *sections, field = flag.removeprefix("--").split(".")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{flag}: {section!r} is a value, not a section")
        at[field] = _parse(value, _type_at(model, [*sections, field]))
    return values


def _type_at(model: Any, keys: Sequence[str]) -> Any:
    """Return the type of the field at the path `keys`, None if there is no such field."""
    for key in keys:
        if kinds := sections(model):
            fields = [kind.model_fields[key] for kind in kinds if key in kind.model_fields]
            model = fields[0].annotation if fields else None
        else:
            model = get_args(model)[1] if get_origin(model) is dict else None
    return model


def _parse(value: str, kind: Any) -> Any:
    """Parse a value as YAML; return it literally if it is not YAML, such as the glob "*.jsonl".

    kind: the field's type. YAML does not read 2026, on, null and 2026-01-01 as text, reads "a: b"
    as a mapping and "# " as a comment. For a field of type text, all of these stay text.
    """
    texts = kind in (list[str], dict[str, str])
    try:
        # The base loader keeps every scalar in a list or mapping as text.
        parsed = yaml.load(value, yaml.BaseLoader if texts else yaml.SafeLoader)
    except yaml.YAMLError:
        return value
    if texts:
        return parsed if isinstance(parsed, get_origin(kind)) else _text(value)
    if kind is str:
        return _text(value)
    if kind == str | None:
        return None if value == "null" else _text(value)
    return parsed


def _text(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    try:
        parsed = yaml.safe_load(value) if quoted else value
    except yaml.YAMLError:
        return value
    return parsed if isinstance(parsed, str) else value


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        loc, allowed, others = _place(model, problem["loc"])
        key = ".".join(loc)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(loc[-1], allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            if where := [f"{tag} = {name!r}" for tag, name, has in others if loc[-1] in has]:
                lines.append(f"{key} = {problem['input']!r}: allowed only for {' or '.join(where)}")
            else:
                lines.append(f"unknown key {key!r}{hint} (allowed: {', '.join(allowed)})")
        elif problem["type"] == "missing":
            lines.append(f"{key} is required")
        elif problem["type"] == "union_tag_invalid":
            tag, found = problem["ctx"]["discriminator"].strip("'"), problem["ctx"]["tag"]
            named = problem["ctx"]["expected_tags"].split(", ")
            names = f"{', '.join(named[:-1])} or {named[-1]}"
            lines.append(f"{key}.{tag} = {found!r}: Input should be {names}")
        elif key:
            lines.append(f"{key} = {problem['input']!r}: {problem['msg']}")
        else:
            lines.append(problem["msg"].removeprefix("Value error, "))
    return "; ".join(lines)


def _place(
    model: type[BaseModel], loc: Sequence[int | str]
) -> tuple[list[str], list[str], list[tuple[str, str, list[str]]]]:
    """Locate a problem: return its keys, without names of kinds, and the fields allowed there.

    Third, for a section of several kinds, the other kinds: the key and the name that select each,
    and its fields.
    """
    keys: list[str] = []
    others: list[tuple[str, str, list[str]]] = []
    parts = list(map(str, loc))
    while parts:
        key = parts.pop(0)
        keys.append(key)
        field = model.model_fields.get(key)
        kinds = sections(field.annotation) if field and parts else []
        if not kinds:
            return [*keys, *parts], list(model.model_fields), others
        model = kinds[0]
        if len(kinds) > 1:
            assert field
            tag = str(field.discriminator)
            named = {get_args(kind.model_fields[tag].annotation)[0]: kind for kind in kinds}
            model = named[parts.pop(0)]
            path = ".".join([*keys, tag])
            others = [
                (path, name, list(kind.model_fields))
                for name, kind in named.items()
                if kind is not model
            ]
    return keys, list(model.model_fields), others
