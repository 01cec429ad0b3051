"""Parse preference records in the common formats, and merge them into groups of text.

A record's columns determine its format. Prompt and responses are text, one message or a list of
messages (`{"role": …, "content": …}` and those of MESSAGE_KEYS that have a value; other keys are
ignored and reported):

    chosen, rejected               one pair; implicit prompt: the messages that both begin with
    prompt, chosen, rejected       one pair; explicit prompt: responses of messages may repeat it,
                                   even if it is text
    … rejected is a list           best-of-N: chosen wins against each
    … chosen is a list too         each chosen wins against each rejected; three of each is
                                   RM-Bench's shape, in which list positions are styles
    … responses, ranks             K-wise, 1 = best: every strictly ordered pair
    … responses, scores            K-wise, higher = better

Text without a prompt that begins with "\\n\\nHuman:" is hh-rlhf's flat format and becomes messages;
other text without a prompt stays whole, with the prompt "". Optional columns for a whole record:
`margin`, `label` (probability that chosen wins), `subset` (RM-Bench: `domain`) and `tools` (a list
of JSON schemas, or that list as a JSON string). `chosen_finished` and `rejected_finished` (lists if
chosen and rejected are), or `finished` (a list, with `responses`): true if a response is complete,
false if the sampler's token limit cut it.

A corpus to be scored has one record per prompt, with `response`, `responses` or `messages`.

All groups are held in memory. Does not know about tokens, templates, configuration or Ray.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from rayrm.data.sources import open_sources
from rayrm.errors import DataError

# Keys of a message, besides role and content, that a chat template gets. A key with the value null,
# "", [] or {} counts as absent, since Parquet gives every message all keys.
MESSAGE_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

Message = dict[str, Any]
"""role, content (text, or None if there are tool_calls), those of MESSAGE_KEYS with a value."""
Tool = dict[str, Any]
Text = str | list[Message]

_JUDGED_COLUMNS = {"chosen", "rejected", "responses", "ranks", "scores"}
_OPTIONAL_COLUMNS = {"prompt", "margin", "label", "subset", "tools"}
_PAIR_FLAGS = {"chosen_finished", "rejected_finished"}
_SAMPLED_COLUMNS = {"response", "responses", "messages"}
_COLUMNS = _JUDGED_COLUMNS | _OPTIONAL_COLUMNS | _PAIR_FLAGS | {"finished"}
_ACCEPTED = (
    "a record has chosen and rejected (one response, or a list of them), or responses with ranks "
    "(1 = best) or scores (higher = better); prompt, margin, label, subset and tools are optional"
)

# Columns and message keys that are refused: without them, a row would not be the one judged.
_CONTEXT_COLUMNS = ("functions", "documents", "chat_template_kwargs", "system", "history")
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_REFUSED_KEYS = {"function_call": "tool_calls", "reasoning": "reasoning_content"}
# Columns that are refused if text has no prompt, since they probably hold it.
_PROMPT_ALIASES = ("question", "instruction", "query", "input", "context")

# Names of RM-Bench's responses, each in three styles from concise to formatted (Liu et al. 2024).
_STYLED = [f"{column}[{i}]" for column in ("chosen", "rejected") for i in range(3)]

_FLAT_START = "\n\nHuman:"
_FLAT_TURN = re.compile(r"\n\n(Human|Assistant):")
_FLAT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """One pair of a group; `chosen` and `rejected` are indices into `Group.responses`."""

    chosen: int
    rejected: int
    margin: float = 0.0
    label: float = 1.0
    """Probability that chosen wins, in [0, 1]."""
    choice: int = 0
    """Number, unique within the group, that is shared by a record's pairs with the same chosen."""
    styles: tuple[int, int] | None = None
    """RM-Bench's styles of chosen and rejected, 0 to 2; None for data of another shape."""
    tie: bool = False
    """The two responses were judged equal: neither is preferred, and label is 0.5."""


@dataclass(frozen=True)
class Group:
    """One prompt, the distinct responses to it, and the preferences between them."""

    prompt: Text
    """"" or [] if the records have no prompt."""
    responses: list[Text]
    """All text or all messages, like the prompt. Each is part of a preference."""
    preferences: list[Preference]
    finished: list[bool]
    """Per response; False: cut at the sampler's token limit."""
    subset: str
    source: str
    """"file:row" of the first record, rows counted from 1. Only for log and error messages."""
    tools: list[Tool] | None = None
    """JSON schemas of the tools that the prompt offers."""


@dataclass
class ReadReport:
    """Counts of what was read, merged, dropped, skipped and ignored."""

    records: int = 0
    groups: int = 0
    pairs: int = 0
    """Preferences in all groups."""
    merged: int = 0
    """Records that were added to the group of an earlier record."""
    ties: int = 0
    """Pairs of equal rank, which are preferences only with read_groups(ties=True), and pairs of
    identical responses, which never are."""
    dropped: int = 0
    """Groups dropped because all their pairs are ties."""
    bad: list[str] = field(default_factory=list)
    """One error message per skipped record."""
    ignored_columns: list[str] = field(default_factory=list)
    """Unknown columns that have values; `message.KEY` is a key of a message."""
    ignored_files: list[str] = field(default_factory=list)
    """Files matched by a glob or found in a directory, but not read: another type or split."""

    def __str__(self) -> str:
        parts = [f"{self.records} records: {self.groups} groups, {self.pairs} pairs"]
        counts = {
            "merged": self.merged,
            "ties": self.ties,
            "groups dropped": self.dropped,
            "bad": len(self.bad),
            "files ignored": len(self.ignored_files),
        }
        parts += [f"{count} {name}" for name, count in counts.items() if count]
        if self.ignored_columns:
            parts.append(f"ignored columns: {' '.join(self.ignored_columns)}")
        return ", ".join(parts)


def read_groups(
    paths: str | Sequence[str],
    *,
    split: str = "train",
    on_bad_record: Literal["error", "skip"] = "error",
    ties: bool = False,
) -> tuple[list[Group], ReadReport]:
    """Read preference records and merge those with equal prompt, subset and tools into groups.

    Args:
        paths: Each a .json or .jsonl file (.gz too), .parquet, .arrow, a directory written by
            `Dataset.save_to_disk`, a directory of such files (recursively, in sorted order), a
            glob, or a hub dataset: OWNER/NAME[/CONFIGURATION][@SPLIT], prefixed with "hub:" if a
            local path has the same name.
        split: Split to read from a hub dataset named without a split, from a saved `DatasetDict`,
            and from a directory whose file names indicate several splits.
        on_bad_record: `skip` adds the error message to the report and continues.
        ties: Also make a preference, a `tie`, of two different responses of equal rank or score.

    Returns:
        The groups, in order of first appearance, and the report.

    Raises:
        DataError: Nothing at a path, an unreadable or empty file, a bad record (names file, row and
            field), or no preference at all. Rows count from 1: lines in JSON Lines, else records.
    """
    report = ReadReport()
    ignored: set[str] = set()
    merger = _Merger(report, ties)
    names = [paths] if isinstance(paths, str) else list(paths)
    sources = [
        source for name in names for source in open_sources(name, split, report.ignored_files)
    ]
    for name, rows in sources:
        before = report.records
        for row, value in rows:
            report.records += 1
            try:
                merger.add(_parse(value, ignored), f"{name}:{row}")
            except DataError as error:
                message = f"{name}, row {row}: {error}"
                if on_bad_record == "error":
                    raise DataError(message) from None
                report.bad.append(message)
        if report.records == before:
            raise DataError(f"{name}: no records; {_ACCEPTED}.")
    groups = merger.finish()
    report.ignored_columns = sorted(ignored)
    if not groups:
        first = f" First bad record: {report.bad[0]}" if report.bad else ""
        raise DataError(f"{', '.join(names)}: no preference to learn from ({report}).{first}")
    return groups, report


@dataclass(frozen=True)
class Sampled:
    """A prompt and unjudged responses to it; an invalid response is replaced by its DataError."""

    prompt: Text
    responses: list[Text | DataError]
    finished: list[bool]
    """Per response; False: cut at the sampler's token limit."""
    tools: list[Tool] | None = None
    ignored: frozenset[str] = frozenset()
    """`message.KEY` for every unknown key of messages."""


def read_sampled(value: Any) -> Sampled:
    """Parse a record to score: prompt and response, prompt and responses (a list), or messages.

    The last message is the response. Optional: `tools` and `finished` (a list if responses are
    given). Raises DataError, which names the field.
    """
    record = _record(value)
    found = record.keys() & _SAMPLED_COLUMNS
    if len(found) != 1 or ("messages" in found and "prompt" in record):
        columns = ", ".join(record) or "none"
        raise DataError(
            "the record must have exactly one of: prompt and response; prompt and responses (a "
            f"list); messages (found: {columns})."
        )
    (column,) = found
    raw, tools, ignored = record[column], _tools(record), set[str]()
    prompt: Text = _text("prompt", record.get("prompt", ""), ignored)
    finished = record.get("finished", True)
    if column == "messages":
        if not isinstance(raw, list) or not raw:
            raise DataError(f"`messages` is {_kind(raw)}; must be a list of at least one message.")
        *before, last = _messages("messages", raw, ignored)
        return Sampled(
            before, [[last]], _flags("finished", [finished], 1), tools, frozenset(ignored)
        )
    if prompt == "":
        _refuse(record, _PROMPT_ALIASES, "if it is the prompt, rename the column to prompt")
    if column == "response":
        named, flags = {"response": raw}, _flags("finished", [finished], 1)
    elif isinstance(raw, list) and raw:
        named = {f"responses[{i}]": response for i, response in enumerate(raw)}
        flags = _flags("finished", [True] * len(raw) if finished is True else finished, len(raw))
    else:
        raise DataError(f"`responses` is {_kind(raw)}; must be a list of at least one response.")
    texts = {name: _text_or_error(name, response, ignored) for name, response in named.items()}
    messages = {name: text for name, text in texts.items() if isinstance(text, list) and text}
    if prompt and messages:
        prompt, rest = _without_repetition(prompt, messages)
        texts |= rest
    return Sampled(prompt, list(texts.values()), flags, tools, frozenset(ignored))


def _text_or_error(name: str, raw: Any, ignored: set[str]) -> Text | DataError:
    try:
        return _text(name, raw, ignored)
    except DataError as error:
        return error


def data_fingerprint(groups: Sequence[Group]) -> str:
    """Return the SHA-256 (hex) of the groups' content and order, without file names and choices.

    Groups without message keys, tools and ties have the fingerprint that older versions gave them.
    """
    digest = hashlib.sha256()
    for group in groups:
        preferences = [
            [p.chosen, p.rejected, p.margin, p.label, *([True] if p.tie else [])]
            for p in group.preferences
        ]
        texts = [_in_order(group.prompt), [_in_order(response) for response in group.responses]]
        content = [*texts, preferences, group.finished, group.subset]
        if group.tools:
            content.append(json.dumps(group.tools))
        digest.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _in_order(text: Text) -> Text:
    """Replace tool calls by their JSON, to keep the order of keys, which a template renders."""
    if isinstance(text, str):
        return text
    return [
        {**m, "tool_calls": json.dumps(m["tool_calls"])} if "tool_calls" in m else m for m in text
    ]


# Records → groups


@dataclass(frozen=True)
class _Record:
    """A record of any format; pairs (better, worse) and ties are indices into responses."""

    prompt: Text
    responses: list[Text]
    finished: list[bool]
    pairs: list[tuple[int, int]]
    ties: list[tuple[int, int]]
    margin: float
    label: float
    subset: str
    tools: list[Tool] | None
    styled: bool
    """Responses 0 to 2 are chosen and 3 to 5 rejected, each in RM-Bench's three styles."""


class _Merger:
    """Merges records into groups, and counts what it merges and drops in the report."""

    def __init__(self, report: ReadReport, keeps_ties: bool) -> None:
        self._report = report
        self._keeps_ties = keeps_ties
        self._groups: dict[Hashable, tuple[Group, dict[Hashable, int]]] = {}

    def add(self, record: _Record, source: str) -> None:
        # Records without a prompt are not merged, since they may answer different prompts.
        prompt_key = (record.subset, _frozen(record.prompt), json.dumps(record.tools))
        key: Hashable = prompt_key if record.prompt else source
        if key in self._groups:
            self._report.merged += 1
        else:
            group = Group(record.prompt, [], [], [], record.subset, source, record.tools)
            self._groups[key] = group, {}
        group, places = self._groups[key]

        keys = [(_frozen(r), f) for r, f in zip(record.responses, record.finished, strict=True)]
        pairs = [(better, worse) for better, worse in record.pairs if keys[better] != keys[worse]]
        self._report.ties += len(record.ties) + len(record.pairs) - len(pairs)
        ties = [(a, b) for a, b in record.ties if self._keeps_ties and keys[a] != keys[b]]
        for i in sorted({i for pair in (*pairs, *ties) for i in pair}):
            if keys[i] not in places:
                places[keys[i]] = len(group.responses)
                group.responses.append(record.responses[i])
                group.finished.append(record.finished[i])
        # A choice has the index of its first preference in the group.
        choices: dict[int, int] = {}
        for better, worse in pairs:
            choice = choices.setdefault(better, len(group.preferences))
            group.preferences.append(
                Preference(
                    places[keys[better]],
                    places[keys[worse]],
                    record.margin,
                    record.label,
                    choice,
                    (better, worse - 3) if record.styled else None,
                )
            )
        for a, b in ties:
            choice = len(group.preferences)
            tied = places[keys[a]], places[keys[b]]
            group.preferences.append(Preference(*tied, label=0.5, choice=choice, tie=True))

    def finish(self) -> list[Group]:
        """Return the groups that have a preference, and complete the report."""
        groups = [group for group, _ in self._groups.values() if group.preferences]
        self._report.groups = len(groups)
        self._report.pairs = sum(len(group.preferences) for group in groups)
        self._report.dropped = len(self._groups) - len(groups)
        return groups


def _frozen(text: Text) -> Hashable:
    return text if isinstance(text, str) else tuple(map(_frozen_message, text))


def _frozen_message(message: Message) -> Hashable:
    return tuple(
        json.dumps(value) for value in map(message.get, ("role", "content", *MESSAGE_KEYS))
    )


# One record


def _parse(value: Any, ignored: set[str]) -> _Record:
    """Return the record in `value`, and add its unknown columns and message keys to `ignored`.

    Raises DataError, which names the field.
    """
    record = _record(value)
    if _is_list_of_responses(record.get("chosen")) and "subset" not in record:
        record["subset"] = record.pop("domain", "")
    ignored.update(record.keys() - _COLUMNS)

    judged = record.keys() & _JUDGED_COLUMNS
    if judged == {"chosen", "rejected"}:
        named, finished, pairs, ties = _pair(record)
    elif judged in ({"responses", "ranks"}, {"responses", "scores"}):
        named, finished, pairs, ties = _ranking(record)
    else:
        found = ", ".join(record) or "none"
        raise DataError(f"the columns match no format (found: {found}); {_ACCEPTED}.")

    prompt, responses = _prompt_and_responses(record.get("prompt"), named, ignored)
    if prompt == "":
        _refuse(record, _PROMPT_ALIASES, "if it is the prompt, rename the column to prompt")
    subset = record.get("subset", "")
    if not isinstance(subset, str):
        raise DataError(f"`subset` is {_kind(subset)}; must be text.")
    return _Record(
        prompt=prompt,
        responses=responses,
        finished=finished,
        pairs=pairs,
        ties=ties,
        margin=_number("margin", record.get("margin", 0.0)),
        label=_number("label", record.get("label", 1.0), low=0.0, high=1.0),
        subset=subset,
        tools=_tools(record),
        styled=[name for name, _ in named] == _STYLED,
    )


def _record(value: Any) -> dict[str, Any]:
    """Return the columns that have a value.

    Raises DataError if `value` is no object, could not be decoded, or has a refused column.
    """
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"the record is {_kind(value)}, not an object.")
    # `datasets` fills the columns that a record lacks with None.
    record = {column: entry for column, entry in value.items() if entry is not None}
    _refuse(record, _CONTEXT_COLUMNS + _MEDIA_COLUMNS, "put it into the prompt as text")
    return record


_Judged = tuple[list[tuple[str, Any]], list[bool], list[tuple[int, int]], list[tuple[int, int]]]
"""Responses as (field, response), finished flags, (better, worse) pairs, ties."""


def _pair(record: dict[str, Any]) -> _Judged:
    if "finished" in record:
        raise DataError("`finished` is for responses; use chosen_finished, rejected_finished.")
    chosen, chosen_finished = _side(record, "chosen")
    rejected, rejected_finished = _side(record, "rejected")
    pairs = [(i, len(chosen) + j) for i in range(len(chosen)) for j in range(len(rejected))]
    return chosen + rejected, chosen_finished + rejected_finished, pairs, []


def _side(record: dict[str, Any], column: str) -> tuple[list[tuple[str, Any]], list[bool]]:
    """Return the one or several responses of a column as (field, response), and their flags."""
    value, flags = record[column], f"{column}_finished"
    if _is_list_of_responses(value):
        named = [(f"{column}[{i}]", response) for i, response in enumerate(value)]
        return named, _flags(flags, record.get(flags, [True] * len(named)), len(named))
    return [(column, value)], _flags(flags, [record.get(flags, True)], 1)


def _is_list_of_responses(value: Any) -> bool:
    """Return whether it is several responses, not one (text, or the messages of one)."""
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict)


def _ranking(record: dict[str, Any]) -> _Judged:
    if misplaced := sorted(record.keys() & _PAIR_FLAGS):
        raise DataError(f"`{misplaced[0]}` is for chosen and rejected; use finished.")
    responses = record["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise DataError("`responses` must be a list of at least two responses.")
    column, sign = ("ranks", -1.0) if "ranks" in record else ("scores", 1.0)
    values = record[column]
    if not isinstance(values, list) or len(values) != len(responses):
        raise DataError(f"`{column}` must be a list of {len(responses)} numbers, one per response.")
    quality = [sign * _number(f"{column}[{i}]", value) for i, value in enumerate(values)]
    pairs = [
        (i, j) if quality[i] > quality[j] else (j, i)
        for i, j in combinations(range(len(quality)), 2)
        if quality[i] != quality[j]
    ]
    ties = [(i, j) for i, j in combinations(range(len(quality)), 2) if quality[i] == quality[j]]
    finished = record.get("finished", [True] * len(responses))
    named = [(f"responses[{i}]", response) for i, response in enumerate(responses)]
    return named, _flags("finished", finished, len(responses)), pairs, ties


def _prompt_and_responses(
    raw_prompt: Any, named: list[tuple[str, Any]], ignored: set[str]
) -> tuple[Text, list[Text]]:
    """Check prompt and responses, and split off an implicit or repeated prompt.

    named: (field, response) pairs.
    """
    texts = {name: _text(name, raw, ignored) for name, raw in named}
    prompt = None if raw_prompt is None else _text("prompt", raw_prompt, ignored)
    if prompt is None and any(
        isinstance(t, str) and t.startswith(_FLAT_START) for t in texts.values()
    ):
        texts = {name: _flat_turns(name, text) for name, text in texts.items()}
    for name, text in texts.items():
        _check_response(name, text)

    conversations = {name: text for name, text in texts.items() if isinstance(text, list)}
    if len(conversations) == len(texts):
        if prompt:
            prompt, responses = _without_repetition(prompt, conversations)
            return prompt, list(responses.values())
        if not isinstance(prompt, list):
            n = _shared_messages(list(conversations.values()))
            first = next(iter(conversations.values()))
            return first[:n], [messages[n:] for messages in conversations.values()]
    everything = texts if prompt is None else {"prompt": prompt, **texts}
    (first_name, example), *others = everything.items()
    for name, text in others:
        if isinstance(text, str) != isinstance(example, str):
            raise DataError(
                f"`{first_name}` is {_kind(example)} but `{name}` is {_kind(text)}; a record must "
                'be all text or all messages ([{"role": "assistant", "content": …}]).'
            )
    return prompt if prompt is not None else "", list(texts.values())


def _check_response(name: str, text: Text) -> None:
    last = text if isinstance(text, str) else text[-1]["content"] or "" if text else ""
    if not last.strip() and not (text and isinstance(text, list) and len(text[-1]) > 2):
        raise DataError(f"`{name}` is empty; there is nothing to score.")
    if isinstance(text, list) and text[-1]["role"] != "assistant":
        role = text[-1]["role"]
        raise DataError(f"`{name}` ends in a {role!r} message; must end in an assistant message.")


def _without_repetition(
    prompt: Text, responses: dict[str, list[Message]]
) -> tuple[list[Message], dict[str, list[Message]]]:
    """Return the prompt as messages, and the responses without it, by field."""
    if isinstance(prompt, str):
        prompt = _as_messages(prompt, responses)
    n = len(prompt)
    rest = {name: text[n:] if text[:n] == prompt else text for name, text in responses.items()}
    if repetition := [name for name, text in rest.items() if not text]:
        raise DataError(f"`{repetition[0]}` is the prompt alone; a response must follow it.")
    return prompt, rest


def _as_messages(prompt: str, responses: dict[str, list[Message]]) -> list[Message]:
    """Return a text prompt as messages.

    These are the messages that all responses begin with, if the prompt is a user message there, or
    else one user message. Raises DataError if the responses neither repeat the prompt nor all begin
    with an assistant message.
    """
    (name, first), *_ = responses.items()
    shared = first[: _shared_messages(list(responses.values()))]
    of_user = [m["content"] for m in shared if m["role"] == "user" and m["content"]]
    if any(content.strip() == prompt.strip() for content in of_user):
        return shared
    if all(messages[0]["role"] == "assistant" for messages in responses.values()):
        return [{"role": "user", "content": prompt}]
    raise DataError(
        f"`prompt` is text, but the messages of `{name}` neither repeat it in a user message that "
        "all responses share, nor begin with an assistant message; give the prompt as messages."
    )


def _shared_messages(conversations: list[list[Message]]) -> int:
    """Return the number of leading messages that all share; each keeps at least its last."""
    shortest = min(map(len, conversations)) - 1
    first = conversations[0]
    return next(
        (i for i in range(shortest) if any(c[i] != first[i] for c in conversations)), shortest
    )


def _flat_turns(name: str, text: Text) -> list[Message]:
    """Return hh-rlhf's flat text as messages, with stripped contents."""
    before, *turns = _FLAT_TURN.split(text) if isinstance(text, str) else [""]
    if before or not turns or turns[-2] != "Assistant":
        raise DataError(
            f'`{name}` must begin with "\\n\\nHuman:" and end in an "\\n\\nAssistant:" turn, '
            "since another response of the record begins like that."
        )
    return [
        {"role": _FLAT_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


# One field


def _text(name: str, raw: Any, ignored: set[str]) -> Text:
    if isinstance(raw, str):
        return _unicode(name, raw)
    if isinstance(raw, dict):
        return [_message(name, raw, ignored)]
    if isinstance(raw, list):
        return _messages(name, raw, ignored)
    raise DataError(f"`{name}` is {_kind(raw)}; must be text or a list of messages.")


def _messages(name: str, raw: list[Any], ignored: set[str]) -> list[Message]:
    return [_message(f"{name}[{i}]", message, ignored) for i, message in enumerate(raw)]


def _message(name: str, raw: Any, ignored: set[str]) -> Message:
    if not isinstance(raw, dict):
        raise DataError(f'`{name}` is {_kind(raw)}; a message is {{"role": …, "content": …}}.')
    role, content, keys = raw.get("role"), raw.get("content"), dict[str, Any]()
    if raw.keys() - {"role", "content"}:
        for key, better in _REFUSED_KEYS.items():
            if raw.get(key):
                raise DataError(f"`{name}.{key}` would be lost; a template reads `{better}`.")
        present = {key for key, entry in raw.items() if entry is not None}
        ignored.update(f"message.{key}" for key in present - {"role", "content", *MESSAGE_KEYS})
        keys = {key: raw[key] for key in MESSAGE_KEYS if not _is_absent(raw.get(key))}
        for key, entry in keys.items():
            _check_key(f"{name}.{key}", key, entry)
    if not isinstance(role, str) or not role:
        raise DataError(f"`{name}.role` is {_kind(role)}; must be text such as user or assistant.")
    if isinstance(content, str):
        content = _unicode(f"{name}.content", content)
    elif content is not None or "tool_calls" not in keys:
        raise DataError(f"`{name}.content` is {_kind(content)}; must be text.")
    return {"role": role, "content": content, **keys}


def _check_key(name: str, key: str, value: Any) -> None:
    if key == "tool_calls":
        _check_objects(name, value)
    elif not isinstance(value, str):
        raise DataError(f"`{name}` is {_kind(value)}; must be text.")
    else:
        _unicode(name, value)


def _tools(record: dict[str, Any]) -> list[Tool] | None:
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError("`tools` is text, but not JSON; must be a list of objects.") from None
    if _is_absent(tools):
        return None
    _check_objects("tools", tools)
    assert isinstance(tools, list)
    return tools


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _check_objects(name: str, value: Any) -> None:
    """Raise DataError unless it is a list of objects that JSON and UTF-8 can encode."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"`{name}` is {_kind(value)}; must be a list of objects.")
    try:
        _unicode(name, json.dumps(value, ensure_ascii=False))
    except (TypeError, RecursionError) as error:
        raise DataError(f"`{name}` cannot be written as JSON: {error}.") from None


def _unicode(name: str, text: str) -> str:
    # JSON can contain a lone surrogate (half an emoji: "\ud83d"), which no tokenizer accepts.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"`{name}` has a lone surrogate at character {error.start}.") from None
    return text


def _number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        allowed = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
        raise DataError(f"`{name}` is {value!r}; must be {allowed}.")
    return float(value)


def _flags(name: str, values: Any, count: int) -> list[bool]:
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(value, bool) for value in values)
    ):
        raise DataError(f"`{name}` must be true or false for each of the {count} response(s).")
    return values


def _refuse(record: dict[str, Any], columns: tuple[str, ...], advice: str) -> None:
    for column in columns:
        if record.get(column):
            raise DataError(f"`{column}` would be lost; {advice}.")


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    names = {str: "text", list: "a list", dict: "an object", bool: "true/false", int: "a number"}
    return names.get(type(value), f"of type {type(value).__name__}")
