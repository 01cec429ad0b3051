"""Find what a chat template drops from a conversation: change it, render it again and compare.

A number is written into every text, thought, tool call and tool. A number that the rendering does
not show is written alone: if the rendering then stays the same, that place is dropped. A tag is
dropped if the rendering stays the same without it. Templates may trim, escape or move what they are
given. Does not know about tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from rayrm.data.records import Message
from rayrm.rows import Tools

Render = Callable[[list[Message], Tools | None], str]
Path = tuple[str | int, ...]

THOUGHT_KEYS = ("reasoning_content", "thinking")

# Tags around a thought: before and after it.
THOUGHT_TAGS = {"<think>": "</think>", "<thinking>": "</thinking>", "[THINK]": "[/THINK]"}

_OF_THOUGHTS = {*THOUGHT_TAGS, *THOUGHT_TAGS.values()}
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")

# What a model reads of a declared tool and of a call; other keys belong to the protocol.
_TOOL_KEYS = ("name", "description", "parameters")
_CALL_KEYS = ("name", "arguments")
_PROTOCOL = ("id", "type")

# Digits, which no filter for case or JSON changes. Six digits, the mark's index, follow.
_MARK = "7030201"
_NUMBER = re.compile(rf"{_MARK}(\d{{6}})")

# Maximum number of marks and of tags of one text: a text may have a tag at every third character.
_MARKS = 256


@dataclass(frozen=True)
class Mark:
    """A place of a conversation into which a number is written.

    path: keys and indices that lead from {"messages", "tools"} to a value. at: the character of a
    text before which the number is written, None if it replaces the value. message: index of the
    message, None for tools. what: the value's name in error messages. unit: marks of one unit are
    dropped only if all of them are. thought: whether the place is in an assistant's thought.
    """

    path: Path
    at: int | None
    message: int | None
    what: str
    unit: Path
    thought: bool = False

    def before(self, judged: int) -> bool:
        """Return whether the place is in the prompt or the tools."""
        return self.message is None or self.message < judged


def first_dropped(
    render: Render,
    messages: list[Message],
    tools: Tools | None,
    *,
    judged: int,
    asked: bool = False,
    thoughts: bool = True,
) -> str | None:
    """Name the first part of a conversation that does not change its rendering; None if all does.

    judged: index of the response's first message. No text of the response may be dropped, and no
    whole message of the prompt, except thoughts in the prompt: many templates leave out those of
    earlier turns (see dropped_thoughts). asked: check only the response. thoughts: whether thoughts
    of the response matter. Of a text with very many tags, a part is checked.
    """
    marks = [
        mark
        for mark in _marks(messages, tools, judged)
        if not (mark.thought and (mark.before(judged) or not thoughts))
        and not (mark.before(judged) and asked)
    ]
    unseen = _unseen(render, messages, tools, marks)
    tags = _tags(messages, judged)
    if not unseen and not tags:
        return None
    plain = render(messages, tools)
    units: dict[Path, list[Mark]] = {}
    for mark in marks:
        units.setdefault(mark.unit, []).append(mark)
    for of_unit in units.values():
        if all(m in unseen for m in of_unit) and all(
            _rendered(render, messages, tools, [m]) == plain for m in of_unit
        ):
            return _describe(of_unit[0], messages)
    for tag, count in tags.items():
        if plain.count(tag) < count and _without(render, messages, tools, judged, tag) == plain:
            return f"{tag!r} in the response"
    return None


def dropped_thoughts(
    render: Render, messages: list[Message], tools: Tools | None, *, judged: int
) -> int:
    """Count the messages of the prompt whose thoughts do not change the rendering."""
    marks = [m for m in _marks(messages, tools, judged) if m.thought and m.before(judged)]
    unseen = _unseen(render, messages, tools, marks)
    if not unseen:
        return 0
    plain = render(messages, tools)
    return len({m.message for m in unseen if _rendered(render, messages, tools, [m]) == plain})


def _unseen(
    render: Render, messages: list[Message], tools: Tools | None, marks: Sequence[Mark]
) -> set[Mark]:
    """Return the marks that are not rendered when all are written at once."""
    if not marks:
        return set()
    marked = _rendered(render, messages, tools, marks)
    seen = {int(found) for found in _NUMBER.findall(marked or "")}
    return {mark for i, mark in enumerate(marks) if i not in seen}


def _tags(messages: list[Message], judged: int) -> dict[str, int]:
    """Return the tags of the response, except those of thoughts, and their counts in all texts."""
    texts = [message.get("content") or "" for message in messages]
    found = Counter(tag for text in texts[judged:] for tag in _TAG.findall(text))
    tags = [tag for tag, _ in found.most_common(_MARKS) if tag not in _OF_THOUGHTS]
    return {tag: sum(text.count(tag) for text in texts) for tag in tags}


def _without(
    render: Render, messages: list[Message], tools: Tools | None, judged: int, tag: str
) -> str | None:
    """Render the conversation without a tag in its response; None if the template refuses that."""
    response = [
        {**m, "content": m["content"].replace(tag, "")} if m.get("content") else m
        for m in messages[judged:]
    ]
    try:
        return render([*messages[:judged], *response], tools)
    except (TemplateError, ValueError, TypeError):
        return None


def _describe(mark: Mark, messages: list[Message]) -> str:
    if mark.message is None:
        return mark.what
    role = messages[mark.message]["role"]
    what = "a thought" if mark.thought and mark.what == "content" else f"`{mark.what}`"
    return f"{what} of message {mark.message + 1} ({role!r})"


def _rendered(
    render: Render, messages: list[Message], tools: Tools | None, marks: Sequence[Mark]
) -> str | None:
    """Render the conversation with these marks; None if the template refuses it."""
    changed: dict[str, Any] = {"messages": deepcopy(messages), "tools": deepcopy(tools)}
    by_path: dict[Path, list[tuple[int, Mark]]] = {}
    for i, mark in enumerate(marks):
        by_path.setdefault(mark.path, []).append((i, mark))
    for (*inside, key), of_value in by_path.items():
        parent: Any = changed
        for step in inside:
            parent = parent[step]
        parent[key] = _marked(parent[key], of_value)
    try:
        return render(changed["messages"], changed["tools"])
    except (TemplateError, ValueError, TypeError):
        return None


def _marked(value: Any, marks: Sequence[tuple[int, Mark]]) -> Any:
    """Return a text with the numbers of its marks, or the number that replaces another value."""
    first, mark = marks[0]
    if mark.at is None:
        return int(_number(first))
    pieces, start = [], 0
    for i, mark in marks:  # in the order of their places
        assert mark.at is not None
        pieces += [value[start : mark.at], _number(i)]
        start = mark.at
    return "".join([*pieces, value[start:]])


def _number(i: int) -> str:
    return f"{_MARK}{i:06}"


def _marks(messages: list[Message], tools: Tools | None, judged: int) -> Iterator[Mark]:
    for i, message in enumerate(messages):
        answers = message["role"] == "assistant"
        for key, value in message.items():
            path: Path = ("messages", i, key)
            if key == "content":
                yield from _in_content(path, value or "", i, answers, whole=i < judged)
            elif key == "tool_calls":
                for n, call in enumerate(value):
                    yield from _in_call((*path, n), call, i, f"tool_calls[{n}]")
            elif key != "role":
                yield from _in_value(path, value, i, key, thought=answers and key in THOUGHT_KEYS)
    for n, tool in enumerate(tools or ()):
        yield from _in_tool(("tools", n), tool, f"tools[{n}]")


def _in_content(path: Path, text: str, message: int, answers: bool, whole: bool) -> Iterator[Mark]:
    """Mark every stretch of a text between tags, at most _MARKS places of the text.

    answers: the text is an assistant's. whole: its marks are one unit.
    """
    tags = list(_TAG.finditer(text))
    in_thoughts = [*_before_ends(tag[0] for tag in tags), False]
    places: list[tuple[int, bool]] = []
    start = 0
    for tag, in_thought in zip([*tags, None], in_thoughts, strict=True):
        end = tag.start() if tag else len(text)
        places += [(start + at, in_thought) for at in _places(text[start:end])]
        start = tag.end() if tag else end
    step = max(1, -(-len(places) // _MARKS))
    for at, in_thought in [*places[:-1:step], *places[-1:]]:
        unit = path if whole else (*path, at)
        yield Mark(path, at, message, "content", unit, answers and in_thought)


def _before_ends(tags: Iterable[str]) -> list[bool]:
    """Return for each tag whether the text before it is a thought: whether one ends next.

    The beginning of a thought may be missing, since a generation prompt may have written it.
    """
    found = []
    ends_next = False
    for tag in reversed(list(tags)):
        if tag in _OF_THOUGHTS:
            ends_next = tag in THOUGHT_TAGS.values()
        found.append(ends_next)
    return found[::-1]


def _in_call(path: Path, call: Any, message: int, what: str) -> Iterator[Mark]:
    path, call, what = _function(path, call, what)
    for key in _read(call, _CALL_KEYS):
        yield from _in_value((*path, key), call[key], message, f"{what}.{key}", empty=True)


def _in_tool(path: Path, tool: Any, what: str) -> Iterator[Mark]:
    """Mark a tool's values; some templates render only a part of its parameters."""
    path, tool, _ = _function(path, tool, what)
    for key in _read(tool, _TOOL_KEYS):
        named = what if key == "name" else f"{what}.{key}"
        place, value = (*path, key), tool[key]
        if key == "parameters" and isinstance(value, dict):  # {"type": "object"} says nothing
            place, value = (*place, "properties"), value.get("properties")
        for mark in _in_value(place, value, None, named):
            yield Mark(mark.path, mark.at, None, named, (*path, key))


def _function(path: Path, value: Any, what: str) -> tuple[Path, Any, str]:
    """Return the function that a tool or call wraps, or the tool or call without a wrapper."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        return (*path, "function"), value["function"], f"{what}.function"
    return path, value, what


def _read(value: Any, keys: Iterable[str]) -> list[str]:
    """Return those keys of an object, or if it has none of them, all but the protocol's."""
    if not isinstance(value, dict):
        return []
    return [key for key in keys if key in value] or [k for k in value if k not in _PROTOCOL]


def _in_value(
    path: Path,
    value: Any,
    message: int | None,
    what: str,
    thought: bool = False,
    empty: bool = False,
) -> Iterator[Mark]:
    """Mark every leaf of a value; empty: also blank texts and nulls."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _in_value((*path, key), inner, message, f"{what}.{key}", thought, empty)
    elif isinstance(value, str) and value.strip():
        for at in _places(value):
            yield Mark(path, at, message, what, (*path, at), thought)
    elif isinstance(value, bool | int | float) or empty:
        yield Mark(path, None, message, what, path, thought)


def _places(text: str) -> list[int]:
    """Return places near a text's start, in its middle and near its end; first characters stay."""
    core = text.strip()
    if not core:
        return []
    first = text.index(core)
    return sorted({first + max(at, 1) for at in (1, len(core) // 2, len(core) - 1)})
