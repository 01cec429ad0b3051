"""Find what a chat template drops of a conversation: change it, render it again, compare.

Every text, thought, tool call and tool gets a number written into it, its ends kept. What of them
the rendering does not show is changed by itself: if the rendering stays the same, it is dropped.
A template may trim, escape or move what it is given; that is no loss. Knows nothing of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from rayrm.data.records import Message
from rayrm.rows import Tools

Render = Callable[[list[Message], Tools | None], str]
Path = tuple[str | int, ...]

THOUGHT_KEYS = ("reasoning_content", "thinking")

_THOUGHT_TAG = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
_THOUGHT_ENDS = ("</think>", "</thinking>", "[/THINK]")
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")

# Digits, which no filter for case or JSON changes. The number of the mark follows.
_MARK = "7030201"


@dataclass(frozen=True)
class Mark:
    """Where a number is written: a leaf of the conversation, and for a text at which character.

    message is the index of a message, None for tools; what names the leaf to people; thought: it
    stands before the end of a thought.
    """

    path: Path
    at: int | None
    message: int | None
    what: str
    thought: bool = False


def first_dropped(
    render: Render,
    messages: list[Message],
    tools: Tools | None,
    *,
    judged: int,
    final: int,
    asked: bool = False,
) -> str | None:
    """What of the conversation changes nothing in its rendering, in words; None if all does.

    messages from judged on are the response: no text of theirs may go. Of the others none may go as
    a whole. Thoughts before message final go by design where a template lets go of earlier turns'
    thoughts. asked: only the response is asked about.
    """
    marks = [
        mark
        for mark in _marks(messages, tools)
        if not (mark.thought and mark.message != final)
        and not (asked and (mark.message is None or mark.message < judged))
    ]
    if not marks:
        return None
    marked = _rendered(render, messages, tools, marks)
    unseen = [m for i, m in enumerate(marks) if marked is None or _number(i) not in marked]
    if not unseen:
        return None
    plain = render(messages, tools)
    for mark in unseen:
        whole = mark.what == "content" and mark.message is not None and mark.message < judged
        same = [m for m in marks if m.path == mark.path] if whole else [mark]
        changed = (_rendered(render, messages, tools, [m]) for m in same)
        if all(m in unseen for m in same) and all(text == plain for text in changed):
            return _told(mark, messages)
    return None


def _told(mark: Mark, messages: list[Message]) -> str:
    if mark.message is None:
        return mark.what
    role = messages[mark.message]["role"]
    what = "a thought" if mark.thought and mark.what == "content" else f"`{mark.what}`"
    return f"{what} of message {mark.message + 1} ({role!r})"


def _rendered(
    render: Render, messages: list[Message], tools: Tools | None, marks: Sequence[Mark]
) -> str | None:
    """The rendering of the marked conversation, None where the template refuses it."""
    changed: dict[str, Any] = {"messages": deepcopy(messages), "tools": deepcopy(tools)}
    # From the right, so that a mark does not move those before it in the same text.
    numbered = sorted(enumerate(marks), key=lambda pair: -(pair[1].at or 0))
    for i, mark in numbered:
        *inside, key = mark.path
        at: Any = changed
        for step in inside:
            at = at[step]
        leaf = at[key]
        at[key] = leaf[: mark.at] + _number(i) + leaf[mark.at :] if mark.at else int(_number(i))
    try:
        return render(changed["messages"], changed["tools"])
    except (TemplateError, ValueError, TypeError):
        return None


def _number(i: int) -> str:
    return f"{_MARK}{i:05}"


def _marks(messages: list[Message], tools: Tools | None) -> Iterator[Mark]:
    for i, message in enumerate(messages):
        for key, value in message.items():
            path: Path = ("messages", i, key)
            if key == "content":
                answers = message["role"] == "assistant"
                yield from _in_content(path, value or "", i, answers)
            elif key == "tool_calls":
                for n, call in enumerate(value):
                    yield from _in_call((*path, n), call, i, f"tool_calls[{n}]")
            elif key != "role":
                yield from _in_leaf(path, value, i, key, key in THOUGHT_KEYS)
    for n, tool in enumerate(tools or ()):
        function = tool.get("function")
        at: Path = ("tools", n, "function") if isinstance(function, dict) else ("tools", n)
        name = (function if isinstance(function, dict) else tool).get("name")
        yield from _in_leaf((*at, "name"), name, None, f"tools[{n}]")


def _in_content(path: Path, text: str, message: int, answers: bool) -> Iterator[Mark]:
    start = 0
    for tag in [*_THOUGHT_TAG.finditer(text), None]:
        end = tag.start() if tag else len(text)
        thought = answers and tag is not None and tag[0] in _THOUGHT_ENDS
        for at in _places(text[start:end]):
            yield Mark(path, start + at, message, "content", thought)
        start = tag.end() if tag else end


def _in_call(path: Path, call: Any, message: int, what: str) -> Iterator[Mark]:
    """A call's name and arguments; its id and kind are the protocol's."""
    if isinstance(call, dict):
        if isinstance(function := call.get("function"), dict):
            path, call, what = (*path, "function"), function, f"{what}.function"
        for key in ("name", "arguments"):
            if key in call:
                yield from _in_leaves((*path, key), call[key], message, f"{what}.{key}")


def _in_leaves(path: Path, value: Any, message: int, what: str) -> Iterator[Mark]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _in_leaves((*path, key), inner, message, f"{what}.{key}")
    else:
        yield from _in_leaf(path, value, message, what)


def _in_leaf(
    path: Path, value: Any, message: int | None, what: str, thought: bool = False
) -> Iterator[Mark]:
    if isinstance(value, str):
        for at in _places(value):
            yield Mark(path, at, message, what, thought)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield Mark(path, None, message, what, thought)


def _places(text: str) -> list[int]:
    """Near a text's start, in its middle and near its end, inside none of its tags."""
    core = text.strip()
    if not core:
        return []
    first = text.index(core)
    tags = [(t.start(), t.end()) for t in _TAG.finditer(core)]
    places = set()
    for at in (1, len(core) // 2, len(core) - 1):
        a, b = next(((a, b) for a, b in tags if a < at < b), (at, at))
        at = b if b < len(core) else a
        places.add(first + max(at, 1))
    return sorted(places)
