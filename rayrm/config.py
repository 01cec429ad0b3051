"""What a run is configured by: Pydantic sections, two levels deep, from YAML and dotted overrides.

A wrong key or value is a ConfigError that names the key, the value and what is allowed, before any
model loads. Imports neither torch nor Ray, so that --help is instant.
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

# What the reward of a model or an application is called beside those of its adapters.
OWN = "default"


def at_home(path: str) -> str:
    """A path from ~, the home of whoever says it; URIs, hub names and other paths as they are."""
    return os.path.expanduser(path)


def local_path(path: str | Path) -> Path:
    """A path on this machine's disks, as a user gives it."""
    return Path(at_home(str(path)))


Names = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
Location = Annotated[str, AfterValidator(at_home)]
Locations = Annotated[Names, AfterValidator(lambda paths: [at_home(path) for path in paths])]
NamedLocations = Annotated[
    dict[str, str], AfterValidator(lambda paths: {k: at_home(path) for k, path in paths.items()})
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Config(Section):
    """A whole configuration: what is wrong with it is raised as ConfigError, key by key."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read YAML, then apply overrides ["--section.field", "value", …].

        A value is YAML; of a field that is text it is the text as it stands, unless YAML's quotes
        are around it.
        """
        return cls(**override(cls, read_yaml(path), overrides))


def describe(section: type[BaseModel], prefix: str = "--") -> str:
    """Every field as a command-line override: its flag, default and meaning, one a line."""
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
    """Fields of a section of several kinds, each once; the first kind is the default."""
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
    """The sections that a field of this type may hold: one, several kinds, or none."""
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    return [one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = local_path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no config file {path.resolve()}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    return values


def override(
    model: type[BaseModel], values: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
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
    """The type of the field below those keys, None where there is no such field."""
    for key in keys:
        if kinds := sections(model):
            fields = [kind.model_fields[key] for kind in kinds if key in kind.model_fields]
            model = fields[0].annotation if fields else None
        else:
            model = get_args(model)[1] if get_origin(model) is dict else None
    return model


def _parse(value: str, kind: Any) -> Any:
    """YAML, or the word as it stands: "*.jsonl" begins as an alias would, and is a glob.

    kind: the field's type. In YAML 2026, on, null and 2026-01-01 are no text, "a: b" is a mapping,
    and "# " a comment; of a field that is text, all of them are text.
    """
    texts = kind in (list[str], dict[str, str])
    try:
        # The base loader leaves every word in a list or mapping the text that it is.
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
                lines.append(f"{key} = {problem['input']!r}: only for {' or '.join(where)}")
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
    """Where a problem is, without the names of kinds: its keys, and the fields that are allowed.

    Then the kinds that a section may have besides: the key and name that choose each, its fields.
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
