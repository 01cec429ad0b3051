"""Text → token ids, one way for training, evaluation and serving.

Chat format: the chat template's text of prompt and response, which ends in the end of turn
(rendering.py). Text format: prompt, separator, response, EOS. Also: which token pads, and how an
over-long row is cut. Knows nothing of groups or models.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rayrm.data import MESSAGE_KEYS, Message, Text
from rayrm.errors import EmptyResponse, InvalidRow, InvalidTokenIds, RowError, RowTooLong
from rayrm.packing import Ids, common_prefix
from rayrm.rendering import PROMPT, RESPONSE, ChatTemplate, Rule, Thoughts, eos, pad_of
from rayrm.sampled import Ends

Tokens = Sequence[int] | NDArray[np.integer]
Tools = Sequence[Mapping[str, Any]]
Overlong = Literal["error", "truncate"]

# Characters that a normalizer makes one of, at most: NFC composes up to four.
COMPOSED = 4

# Where a tokenizer keeps its fingerprint, beside what it was made of.
_REMEMBERED = "_rayrm_fingerprint"

# Roles of what is said to the model before the first turn.
_SYSTEM = ("system", "developer")

# What other models' chat templates put around turns: ChatML and Llama 3, DeepSeek, Gemma, Mistral.
_TURN_MARKS = re.compile(
    r"<\|[^\s<>|]+\|>|<｜[^\s<>｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]"  # noqa: RUF001
)


class Row(NamedTuple):
    """One prompt and one response, both text, both messages (or text), or both token ids.

    An unfinished response was cut at the sampler's token limit: it is never closed with an end.
    tools: what the prompt says can be called, as JSON schemas, for the chat template.
    """

    prompt: Text | Tokens
    response: Text | Tokens
    finished: bool = True
    tools: Tools | None = None


@dataclass(frozen=True)
class TemplateSpec:
    """What must be the same in training and serving; stored in the export.

    fingerprint is that of the tokenizer as its makers published it, before a pad token was added.
    rule: how a chat row is composed (rendering.py). thoughts "drop": a response is judged without
    the thought that it begins with. ends: tokens besides the tokenizer's own that end a text for
    the base model.
    """

    format: Literal["chat", "text"]
    separator: str
    max_length: int
    fingerprint: str
    rule: Rule = "template"
    thoughts: Thoughts = "keep"
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """Turns rows into ids by a spec and the tokenizer it was made for."""

    tokenizer: PreTrainedTokenizerBase
    spec: TemplateSpec

    def encode(self, rows: Sequence[Row]) -> list[Ids | RowError]:
        """Ids of each row at full length, int32 [tokens], or the error of that row.

        Text of more than most_characters is RowTooLong untokenised, since that takes time without
        bound. It cannot lose the left of its prompt either: how a tail's ids stand in the whole,
        only the ids of the whole tell. What the chat template would drop of a row is InvalidRow.
        """
        asked: set[object] = set()
        return self._encode([self._compose(row, asked) for row in rows], rows)

    def fit(self, row: Row, ids: Ids, overlong: Overlong) -> tuple[Ids | RowError, bool]:
        """The row's ids within max_length and whether its prompt was cut: fit_alike of one row."""
        fitted, cut = self.fit_alike([row], [ids], overlong)
        return fitted[0], cut

    def fit_alike(
        self, rows: Sequence[Row], ids: Sequence[Ids], overlong: Overlong
    ) -> tuple[list[Ids | RowError], bool]:
        """Ids within max_length of rows that have one prompt, cut alike, and whether it was cut.

        Only a prompt's left is ever cut: whole turns first, then the text of the turn that is left.
        What begins a text, the system message and that turn's header stay. A row that does not fit
        with any of its prompt is RowTooLong; the others are cut as the longest of them needs.
        """
        longest = self.spec.max_length
        if max(map(len, ids)) <= longest:
            return list(ids), False
        fitted: list[Ids | RowError] = list(ids)
        if overlong == "error":
            for i, (row, of) in enumerate(zip(rows, ids, strict=True)):
                fitted[i] = of if len(of) <= longest else self._too_long(row, of)
            return fitted, False
        left = sorted(range(len(rows)), key=lambda i: -len(ids[i]))
        while left and len(ids[left[0]]) > longest:
            cut = self._cut([rows[i] for i in left], [ids[i] for i in left])
            if cut is not None:
                for i, of in zip(left, cut, strict=True):
                    fitted[i] = of
                return fitted, True
            first = left.pop(0)
            fitted[first] = self._too_long(rows[first], ids[first])
        return fitted, False

    def response_tokens(self, row: Row, ids: Ids) -> int:
        """Tokens of the response with its end, as they stand at the end of the row's ids.

        Found by where the ids part from those of another response: how much a template writes
        behind a response, and what merges at its start, is its own affair.
        """
        if is_ids(row.response):
            return len(row.response)
        if isinstance(row.response, str):
            other: Text = _other_text(row.response)
        else:
            assert _is_messages(row.response)
            first, *rest = row.response
            other = [{**first, "content": _other_text(first.get("content") or "")}, *rest]
        row = row._replace(response=other)
        ids_of_other = self._join(row, self._tokenize(self._texts(row)))
        return len(ids) - common_prefix([ids, ids_of_other])

    def sampled_row(self, prompt: str, sampled: str) -> Row:
        """The row of a prompt and the text that was sampled to it, special tokens and all.

        Padding on either side is left out, and the row is finished if the text ends in its end of
        turn (text format: EOS) or another end of the model. A prompt that this chat template has
        rendered already, with the start of the answer, is not rendered again: that row is the ids
        of the whole conversation. Raises InvalidRow for a prompt that another template has rendered
        and for lone surrogates, EmptyResponse where nothing was sampled, RowTooLong as encode does.
        """
        check_row(Row(prompt, sampled))
        ends = self._ends
        prompt = ends.without_left_pads(prompt, self.tokenizer.bos_token)
        content, finished = ends.split(sampled)
        if self.spec.format == "text":
            return Row(prompt, content, finished)
        opening = self.chat.opening
        if not opening.strip():
            raise InvalidRow(
                "this model's chat template does not mark where an answer starts, so a rendered "
                "prompt cannot be told from a plain one: send prompt and response"
            )
        if opening not in prompt:
            marks = [t for t in self.chat.special_tokens if t in prompt]
            if marks or (marks := _TURN_MARKS.findall(prompt)):
                raise InvalidRow(
                    f"the prompt holds {marks[0]!r}, but not {opening!r}, with which this "
                    "model's chat template starts an answer: it was rendered by another template, "
                    "send its text or messages"
                )
            return Row(prompt, content, finished)
        before, _, prefill = prompt.rpartition(opening)
        answer = [_turn("user", PROMPT), _turn("assistant", prefill + content)]
        if finished and self.spec.rule == "template":
            # The answer's turn as in training: a template may write more than it starts one with.
            self._refuse_dropped(answer, None, 1, True)
            text = before + self._rendered(answer, None, True).partition(PROMPT)[2]
        else:
            judged = self.chat.judged(answer[-1], self.spec.thoughts, finished)["content"]
            end = self.chat.closing[1] if finished else ""
            text = self.chat.join(before + opening, judged) + end
        self._check_length([max(prompt, text, key=len)])
        prompt_ids, ids = (np.array(x, np.int32) for x in self._tokenize([prompt, text]))
        n = common_prefix([np.append(prompt_ids, -1), ids])
        return Row(ids[:n], ids[n:], finished)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template, of specs with the chat format."""
        return ChatTemplate(self.tokenizer, self.spec.ends)

    # chat ------------------------------------------------------------------------------------

    def _conversation(self, row: Row) -> tuple[list[Message], int]:
        """A row's messages, and the index of the response's first."""
        prompt, response = _as_messages(row.prompt, "user"), _as_messages(row.response, "assistant")
        if not response:
            raise EmptyResponse("the response is empty: there is nothing to score")
        if not prompt and len(response) == 1:
            raise InvalidRow(
                "the row has no prompt to put into the chat template: give one, or train with "
                "data.format: text"
            )
        if response[-1]["role"] != "assistant":
            role = response[-1]["role"]
            raise InvalidRow(f"a response ends with an assistant message, got {role!r}")
        return [*prompt, *response], len(prompt)

    def _rendered(self, messages: list[Message], tools: Tools | None, finished: bool) -> str:
        rule, thoughts = self.spec.rule, self.spec.thoughts
        return self.chat.compose(messages, tools, finished=finished, rule=rule, thoughts=thoughts)

    def _refuse_dropped(
        self,
        messages: list[Message],
        tools: Tools | None,
        judged: int,
        finished: bool,
        asked: bool = False,
    ) -> None:
        """Raises InvalidRow for a row of which the chat template drops something."""
        dropped = self.chat.first_dropped(
            messages,
            tools,
            judged=judged,
            asked=asked,
            finished=finished,
            rule=self.spec.rule,
            thoughts=self.spec.thoughts,
        )
        if dropped:
            raise InvalidRow(
                f"the chat template drops {dropped}: a reward would not depend on it, so leave it "
                "out, or use a template that renders it"
            )

    # text ------------------------------------------------------------------------------------

    def _compose_text(self, row: Row) -> list[str]:
        if not (isinstance(row.prompt, str) and isinstance(row.response, str)) or row.tools:
            raise InvalidRow(
                f"{'tools' if row.tools else 'messages'} need a chat template and this model has "
                "none: give text, or train with data.chat_template"
            )
        response, _ = self._ends.split(row.response)
        if not response:
            raise EmptyResponse("the response is empty: there is nothing to score")
        return [row.prompt, response]

    def _join(self, row: Row, pieces: list[list[int]]) -> Ids:
        if self.spec.format == "chat":
            return np.array(pieces[0], dtype=np.int32)
        prompt, response = pieces
        bos = self.tokenizer.bos_token_id
        head = [bos] if self._adds_bos and prompt[:1] != [bos] else []
        separator = self._tokenize([self.spec.separator])[0] if row.prompt else []
        end = [self.tokenizer.eos_token_id] if row.finished else []
        return np.array([*head, *prompt, *separator, *response, *end], dtype=np.int32)

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][0] == bos

    # both ------------------------------------------------------------------------------------

    def _compose(self, row: Row, asked: set[object]) -> list[str] | Ids | RowError:
        """The texts to tokenise for a row, or its ids as given, or its error.

        asked: prompts of which the chat template is known to drop nothing.
        """
        try:
            check_row(row)
            if is_ids(row.response):
                return self._check_ids(row)
            texts = self._texts(row)
            self._check_length(texts)
            if self.spec.format == "chat":
                messages, judged = self._conversation(row)
                prompt = prompt_key(row.prompt, row.tools)
                self._refuse_dropped(messages, row.tools, judged, row.finished, prompt in asked)
                asked.add(prompt)
            return texts
        except RowError as error:
            return error

    def _texts(self, row: Row) -> list[str]:
        if self.spec.format == "text":
            return self._compose_text(row)
        return [self._rendered(self._conversation(row)[0], row.tools, row.finished)]

    def _encode(
        self, composed: Sequence[list[str] | Ids | RowError], rows: Sequence[Row]
    ) -> list[Ids | RowError]:
        texts = [text for parts in composed if isinstance(parts, list) for text in parts]
        ids = iter(self._tokenize(texts))
        return [
            self._join(row, [next(ids) for _ in parts]) if isinstance(parts, list) else parts
            for row, parts in zip(rows, composed, strict=True)
        ]

    @cached_property
    def _ends(self) -> Ends:
        """What may stand behind a response and is not of it."""
        if self.spec.format == "chat":
            return self.chat.tokens
        end = eos(self.tokenizer)
        return Ends(end, (end,), frozenset(self.spec.ends) - {end}, pad_of(self.tokenizer))

    @cached_property
    def most_characters(self) -> int:
        """Characters that a text of max_length tokens has at most, so that more cannot fit.

        A token covers no more of them than its entry in the vocabulary has, before a normalizer
        composed them. Exact unless the tokenizer drops text, as the special tokens of Phi-3 do
        with the spaces beside them: so long a row is refused though without them it would fit.
        """
        return self.spec.max_length * COMPOSED * max(map(len, self.tokenizer.get_vocab()))

    def _check_length(self, texts: list[str]) -> None:
        """Raises RowTooLong for a row that is too long by its characters."""
        characters = sum(map(len, texts))
        if characters > self.most_characters:
            raise RowTooLong(
                f"row has {characters} characters, {self.spec.max_length} tokens hold at most "
                f"{self.most_characters}: shorten it, or raise max_length (a row beyond that is "
                "not tokenised, and its prompt not cut)"
            )

    def _check_ids(self, row: Row) -> Ids:
        prompt, response = (np.asarray(x) for x in (row.prompt, row.response))
        if not len(response):
            raise EmptyResponse("the response is empty: there is nothing to score")
        ids = np.concatenate([prompt, response]) if len(prompt) else response
        bad = ids[(ids < 0) | (ids >= len(self.tokenizer))]
        if len(bad):
            raise InvalidTokenIds(
                f"token id {bad[0]} is outside the tokenizer's vocabulary of {len(self.tokenizer)}"
            )
        return ids.astype(np.int32)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    # length ----------------------------------------------------------------------------------

    def _too_long(self, row: Row, ids: Ids) -> RowTooLong:
        return RowTooLong(
            f"row has {len(ids)} tokens (response: {self.response_tokens(row, ids)}), the limit is "
            f"{self.spec.max_length}: shorten it, raise max_length, or ask for its prompt to be "
            'cut with overlong="truncate" (a response is never cut)'
        )

    def _cut(self, rows: Sequence[Row], ids: Sequence[Ids]) -> list[Ids] | None:
        """The rows with the most of their prompt with which the longest, the first, fits."""
        if self.spec.format == "text" or is_ids(rows[0].response):
            return self._cut_ids(rows, ids)
        prompt = _as_messages(rows[0].prompt, "user")
        system = next((i for i, m in enumerate(prompt) if m["role"] not in _SYSTEM), len(prompt))
        kept, turns = prompt[:system], prompt[system:]
        starts = [i for i, message in enumerate(turns) if message["role"] == turns[0]["role"]]
        if not starts:
            return None

        def from_turn(start: int) -> list[Ids] | None:
            return self._with_prompt(rows, [*kept, *turns[start:]])

        def fits(start: int) -> bool:
            cut = from_turn(start)
            return cut is not None and self._excess(cut) <= 0

        # Fewer turns are shorter, so that not each number of them has to be tokenised.
        fewest = bisect_left(starts, True, lo=1, key=fits)
        if fewest < len(starts):
            return from_turn(starts[fewest])
        first, *rest = turns[starts[-1] :]
        text, dropped = first.get("content") or "", 0
        begins = self._begins(text)
        cut = from_turn(starts[-1])
        while cut and (excess := self._excess(cut)) > 0:
            dropped += excess
            if dropped >= len(begins):
                return None
            left = {**first, "content": text[begins[dropped] :]}
            cut = self._with_prompt(rows, [*kept, left, *rest])
        return cut

    def _with_prompt(self, rows: Sequence[Row], prompt: list[Message]) -> list[Ids] | None:
        """The rows' ids with that prompt, None where the chat template refuses it."""
        try:
            rows = [row._replace(prompt=prompt) for row in rows]
            return [self._join(row, self._tokenize(self._texts(row))) for row in rows]
        except InvalidRow:
            return None

    def _excess(self, ids: Sequence[Ids]) -> int:
        return max(map(len, ids)) - self.spec.max_length

    def _begins(self, text: str) -> list[int]:
        """Where in the text each of its tokens begins."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoded["offset_mapping"]]

    def _cut_ids(self, rows: Sequence[Row], ids: Sequence[Ids]) -> list[Ids] | None:
        """As _cut, where turns can only be told by the ids of a user's header."""
        longest, excess = ids[0], self._excess(ids)
        prompt = len(longest) - self.response_tokens(rows[0], longest)
        headers = self._headers(longest[:prompt])
        begins = headers[0][0] if headers else int(self._begins_text(longest))
        for start, _ in headers[1:]:
            if start - begins >= excess:
                return [np.concatenate([of[:begins], of[start:]]) for of in ids]
        start, end = headers[-1] if headers else (begins, begins)
        rest = end + excess - (start - begins)
        if rest >= prompt:
            return None
        return [np.concatenate([of[:begins], of[start:end], of[rest:]]) for of in ids]

    def _begins_text(self, ids: Ids) -> bool:
        return self._adds_bos and len(ids) > 0 and int(ids[0]) == self.tokenizer.bos_token_id

    def _headers(self, prompt: Ids) -> list[tuple[int, int]]:
        """Where the user's turns begin, and where their headers end."""
        if self.spec.format == "text" or not (header := self.chat.user_header):
            return []
        pattern, whole = (np.array(self._tokenize([t])[0]) for t in (header.rstrip(), header))
        found = [
            i
            for i in range(len(prompt) - len(pattern) + 1)
            if np.array_equal(prompt[i : i + len(pattern)], pattern)
        ]
        space = len(whole) - len(pattern)
        return [(i, i + len(pattern) + space) for i in found]


def check_row(row: Row) -> None:
    """Raises InvalidRow unless prompt and response are both ids, or text and messages.

    An empty list or array goes with either: no prompt, or an empty response.
    """
    kinds = {_kind(value) for value in (row.prompt, row.response) if not _is_empty(value)}
    if "none" in kinds or ("ids" in kinds and len(kinds) > 1):
        wrong = _wrong_key(row.prompt) or _wrong_key(row.response)
        raise InvalidRow(
            "prompt and response must both be text, messages "
            '({"role": …, "content": …} with text content) or token ids; '
            f"got {wrong or f'{_describe(row.prompt)} and {_describe(row.response)}'}"
        )
    if row.tools and "ids" in kinds:
        raise InvalidRow("token ids hold what the tools were rendered to: leave tools out")
    if row.tools is not None and not (_is_objects(row.tools) and _is_json(row.tools)):
        raise InvalidRow(f"tools must be a list of JSON schemas, got {_describe(row.tools)}")


def _is_empty(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return not value.size
    return isinstance(value, list | tuple) and not value


def _kind(value: object) -> Literal["text", "messages", "ids", "none"]:
    if _is_text(value):
        return "text"
    if isinstance(value, np.ndarray):
        return "ids" if value.ndim == 1 and (value.dtype.kind in "iu" or not value.size) else "none"
    if isinstance(value, list | tuple):
        if all(issubclass(t, int | np.integer) and t is not bool for t in set(map(type, value))):
            return "ids"
        if _is_messages(value) and _is_json(value):
            return "messages"
    return "none"


def _is_messages(value: object) -> TypeGuard[Sequence[Message]]:
    return isinstance(value, list | tuple) and all(
        isinstance(m, dict) and _is_text(m.get("role")) and not any(_wrong_keys(m)) for m in value
    )


def _wrong_keys(message: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a message whose values no template could render as what they are."""
    content, calls = message.get("content"), message.get("tool_calls")
    if not _is_text(content) and not (content is None and calls):
        yield "content"
    if calls is not None and not _is_objects(calls):
        yield "tool_calls"
    for key in MESSAGE_KEYS:
        if key != "tool_calls" and message.get(key) is not None and not _is_text(message[key]):
            yield key


def _wrong_key(value: object) -> str | None:
    """What of messages is of the wrong type, in words."""
    if isinstance(value, list | tuple):
        for i, message in enumerate(value):
            for key in _wrong_keys(message) if isinstance(message, dict) else ():
                return f"`{key}` of message {i + 1} as {reprlib.repr(message.get(key))}"
    return None


def _is_objects(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string without lone surrogates, which no tokenizer takes."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_ids(value: object) -> bool:
    """Whether a prompt or response is token ids."""
    return _kind(value) == "ids"


def _as_messages(value: Text | Tokens, role: str) -> list[Message]:
    """Messages as they are given; text as one of that role, a prompt without text as none."""
    if isinstance(value, str):
        return [_turn(role, value)] if value or role == "assistant" else []
    if _is_empty(value):
        return []
    assert _is_messages(value)
    return list(value)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _other_text(text: str) -> str:
    """A text that begins differently, also where a template strips both."""
    return "B" if text.lstrip().startswith("A") else "A"


def prompt_key(prompt: Text | Tokens, tools: Tools | None = None) -> object:
    """Equal for equal prompts: rows with one key belong to one group."""
    if tools:
        return prompt_key(prompt), json.dumps(tools)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, np.ndarray) or is_ids(prompt):
        return np.asarray(prompt, dtype=np.int32).tobytes()
    return json.dumps(prompt)


def _describe(value: object) -> str:
    kind = _kind(value)
    return kind if kind != "none" else f"{type(value).__name__} {reprlib.repr(value)}"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes token ids mean the same: sha256 over the vocabulary, id by id.

    Remembered by the tokenizer until tokens are added to it: of 150 000 it takes half a second.
    """
    made_of = getattr(tokenizer, "_tokenizer", None)
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    of, then, known = vars(tokenizer).get(_REMEMBERED, (None, None, ""))
    if not known or of is not made_of or then != (len(tokenizer), added):
        vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items())
        known = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
        vars(tokenizer)[_REMEMBERED] = made_of, (len(tokenizer), added), known
    return known


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a pad token that no row has; True if it had to be added.

    transformers pools the last id that is not pad, so pad = EOS pools one token early.
    """
    written = _written(tokenizer)
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    pad = tokenizer.pad_token
    if pad and pad not in taken and pad not in written:
        return False
    special = [t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    free = [t for t in special if t not in taken and t not in written]
    if not free:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return True
    named = [t for t in free if "pad" in t.lower()]
    unknown = [t for t in free if t == tokenizer.unk_token]
    tokenizer.pad_token = (named or unknown or free)[0]
    return False


def _written(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, and what it writes by putting tokens together ('<|' + role + '|>')."""
    if not (template := tokenizer.chat_template):
        return ""
    source = "".join(template.values()) if isinstance(template, dict) else template
    chat = ChatTemplate(tokenizer)
    try:
        return source + chat.render([_turn("user", PROMPT), _turn("assistant", RESPONSE)])
    except InvalidRow:  # whatever renders rows by it says so
        return source
