"""Text → token ids, one way for training, evaluation and serving.

Chat format: the chat template's text of prompt and response, which ends in the end of turn
(chat.py). Text format: prompt, separator, response, EOS. Also: which token pads, and how an
over-long row is cut. Knows nothing of groups or models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rayrm.data.records import Message, Text
from rayrm.errors import EmptyResponse, InvalidRow, InvalidTokenIds, RowError, RowTooLong
from rayrm.packing import Ids, common_prefix
from rayrm.rows import Row, Tokens, Tools, check_row, is_empty, is_ids, is_messages, prompt_key
from rayrm.text.chat import PROMPT, RESPONSE, ChatTemplate, Rule, Thoughts, eos, pad_of
from rayrm.text.ends import Ends

Overlong = Literal["error", "truncate"]

# Characters that a normalizer makes one of, at most: NFC composes up to four.
COMPOSED = 4

# Roles of what is said to the model before the first turn.
_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class TemplateSpec:
    """What must be the same in training and serving; stored in the export.

    fingerprint is that of the tokenizer as its makers published it, before a pad token was added.
    rule: how a chat row is composed (chat.py). thoughts "drop": a response is judged without
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
            assert is_messages(row.response)
            first, *rest = row.response
            other = [{**first, "content": _other_text(first.get("content") or "")}, *rest]
        row = row._replace(response=other)
        ids_of_other = self._join(row, self.tokenize(self._texts(row)))
        return len(ids) - common_prefix([ids, ids_of_other])

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

    def render(self, messages: list[Message], tools: Tools | None, finished: bool) -> str:
        rule, thoughts = self.spec.rule, self.spec.thoughts
        return self.chat.compose(messages, tools, finished=finished, rule=rule, thoughts=thoughts)

    def refuse_dropped(
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
        response, _ = self.ends.split(row.response)
        if not response:
            raise EmptyResponse("the response is empty: there is nothing to score")
        return [row.prompt, response]

    def _join(self, row: Row, pieces: list[list[int]]) -> Ids:
        if self.spec.format == "chat":
            return np.array(pieces[0], dtype=np.int32)
        prompt, response = pieces
        bos = self.tokenizer.bos_token_id
        head = [bos] if self._adds_bos and prompt[:1] != [bos] else []
        separator = self.tokenize([self.spec.separator])[0] if row.prompt else []
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
            self.check_length(texts)
            if self.spec.format == "chat":
                messages, judged = self._conversation(row)
                prompt = prompt_key(row.prompt, row.tools)
                self.refuse_dropped(messages, row.tools, judged, row.finished, prompt in asked)
                asked.add(prompt)
            return texts
        except RowError as error:
            return error

    def _texts(self, row: Row) -> list[str]:
        if self.spec.format == "text":
            return self._compose_text(row)
        return [self.render(self._conversation(row)[0], row.tools, row.finished)]

    def _encode(
        self, composed: Sequence[list[str] | Ids | RowError], rows: Sequence[Row]
    ) -> list[Ids | RowError]:
        texts = [text for parts in composed if isinstance(parts, list) for text in parts]
        ids = iter(self.tokenize(texts))
        return [
            self._join(row, [next(ids) for _ in parts]) if isinstance(parts, list) else parts
            for row, parts in zip(rows, composed, strict=True)
        ]

    @cached_property
    def ends(self) -> Ends:
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

    def check_length(self, texts: list[str]) -> None:
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

    def tokenize(self, texts: list[str]) -> list[list[int]]:
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
            return [self._join(row, self.tokenize(self._texts(row))) for row in rows]
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
        pattern, whole = (np.array(self.tokenize([t])[0]) for t in (header.rstrip(), header))
        found = [
            i
            for i in range(len(prompt) - len(pattern) + 1)
            if np.array_equal(prompt[i : i + len(pattern)], pattern)
        ]
        space = len(whole) - len(pattern)
        return [(i, i + len(pattern) + space) for i in found]


def _as_messages(value: Text | Tokens, role: str) -> list[Message]:
    """Messages as they are given; text as one of that role, a prompt without text as none."""
    if isinstance(value, str):
        return [turn(role, value)] if value or role == "assistant" else []
    if is_empty(value):
        return []
    assert is_messages(value)
    return list(value)


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _other_text(text: str) -> str:
    """A text that begins differently, also where a template strips both."""
    return "B" if text.lstrip().startswith("A") else "A"


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
        return source + chat.render([turn("user", PROMPT), turn("assistant", RESPONSE)])
    except InvalidRow:  # whatever renders rows by it says so
        return source
